"""WebDataset tars of other authors become shards without being copied: a task indexes one tar where it is.

It walks the headers, reads each image once, checks that training can read it unchanged, and writes a record like that of a
written shard (`shard_record.py`), whose `key` is the tar's address. A tar in a bucket is downloaded once for that.
Sample: its one image member (`jpg`, `jpeg`, `png`, ...); its label is in `cls` (a whole number or a word) or in a field of
`json`. Samples without an image, or whose image would need re-encoding, go to quarantine, so listed = stored + quarantined.
Links have the bytes of the file that they name. Hidden files, links that lead nowhere, and files that are neither regular nor
links belong to no sample and are counted by reason.
A damaged tar, or one in which webdataset's own reader finds other samples, is refused as a whole (`sources/tars.py`). A
flipped bit inside an image is noticed only if the image no longer decodes; afterwards its CRC-32 is known.
Units: bytes; sample ids count from 0 in each tar, including quarantined samples.
Errors: DataError naming the tar; StorageError when a store is down."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.dataset.schema import NO_LABEL, QuarantineRow, SampleRow, SnapshotRow
from pipeline.data.images.intake import Accepted, IntakePolicy, Refused, accept_unchanged
from pipeline.data.sharding.shard_plan import ShardPlan
from pipeline.data.sharding.shard_record import (
    OTHER_EXAMPLES,
    OtherMembersRecord,
    ShardRecord,
    ShardResult,
    quarantine_row,
    read_record,
    record_key,
    sample_columns,
    sample_row,
    write_record,
)
from pipeline.data.sharding.shard_writer import too_many_bytes
from pipeline.data.sources.listing import IMAGE_SUFFIXES, OPTIONAL_SUFFIXES
from pipeline.data.sources.splits import class_order
from pipeline.data.sources.tars import (
    Member,
    OtherMember,
    TarSample,
    check_agreement,
    content_of,
    contents_of,
    group_members,
    iter_entries,
    regular_members,
)
from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.files import file_sha256, local_copy


def index_tar(
    plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy, label_field: str | None
) -> ShardResult:
    """Index the tar and write its record, or return the record at once if it exists."""
    root = open_store(root_uri)
    key = record_key(plan.digest)
    if root.exists(key):
        return read_record(root, key, reused=True)
    row: SnapshotRow
    (row,) = plan.samples.to_pylist()
    store = open_store(source)
    address = _address(store, row["path"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = local_copy(store, row["path"], Path(folder) / "shard.tar")
            record = _index(plan, row, path, address, policy, label_field)
        except (MissingObject, FileNotFoundError) as error:
            raise DataError(f"{address} no longer exists. Put it back, or name a new data.snapshot") from error
    return write_record(root, key, record)


def image_of(sample: TarSample) -> Member | Refused:
    """Return the image of a sample: its only member with an image's suffix, or the only one whose whole suffix is that."""
    whole = [name for name in sample.members if f".{name}" in IMAGE_SUFFIXES]
    partly = [name for name in sample.members if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    names = whole or partly
    # HEIC and AVIF cannot be served from a tar, so they are no rivals of an image that can
    names = [name for name in names if f".{name.rpartition('.')[2]}" not in OPTIONAL_SUFFIXES] or names
    if len(names) == 1:
        return sample.members[names[0]]
    if not names:
        return Refused("no_image", f"only {', '.join(sample.members)}")
    return Refused(
        "several_images",
        f"{', '.join(names)} under one key: webdataset cuts names at the first dot. Give each image a key without dots",
    )


def label_of(sample: TarSample, file: BinaryIO, label_field: str | None) -> str | Refused | None:
    """Return the class's name from `cls`, else from a field of `json`, or None if the sample has no label."""
    if "cls" in sample.members:
        text = content_of(sample.members["cls"], file)
        try:
            value: Any = text.decode().strip()
            value = int(value) if value.lstrip("-").isdecimal() else value
        except UnicodeDecodeError:
            return Refused("bad_label", "its .cls is not text")
    elif "json" in sample.members and label_field is not None:
        try:
            fields = json.loads(content_of(sample.members["json"], file))
        except ValueError as error:
            return Refused("bad_label", f"its .json is not JSON ({error})")
        value = fields.get(label_field) if isinstance(fields, Mapping) else None
        value = value.strip() if isinstance(value, str) else value
    else:
        return None
    if value is None or value == "" or (type(value) is int and value < 0):
        return None
    # not isinstance: JSON's true would pass for a whole number
    if type(value) not in (int, str):
        return Refused("bad_label", f"its label is a {type(value).__name__}; write a whole number or text")
    return str(value)


def _index(
    plan: ShardPlan,
    tar: SnapshotRow,
    path: Path,
    address: str,
    policy: IntakePolicy,
    label_field: str | None,
) -> ShardRecord:
    entries = list(iter_entries(path, address))
    # before any image is read: a tar that readers see differently must not become a dataset
    check_agreement(group_members(regular_members(entries), address), path, address)
    contents = contents_of(entries)
    found = group_members(contents.members, address)
    stored: list[tuple[str | None, SampleRow]] = []  # class name and row
    quarantined: list[tuple[str | None, QuarantineRow]] = []
    with path.open("rb") as file:
        for number, sample in enumerate(found):
            member, label = image_of(sample), label_of(sample, file, label_field)
            name = label if isinstance(label, str) else None
            # a quarantined sample may have no single member to name, so its row starts as that of its key
            row: SnapshotRow = {**tar, "sample_id": number, "path": f"{tar['path']}/{sample.key}", "size": 0}
            if isinstance(member, Member):
                row |= {"path": f"{tar['path']}/{member.name}", "size": member.size}
            image = _accept(file, member, label, policy)
            if isinstance(image, Refused):
                quarantined.append((name, quarantine_row(row, image)))
            elif isinstance(member, Member):
                where = {"shard": plan.shard, "offset": member.offset}
                stored.append((name, sample_row(row, image, **where, split=plan.split, key=sample.key)))
    # classes are known only now, so labels are filled in last
    classes = class_order({name for name, _ in (*stored, *quarantined) if name is not None})
    label_number = {name: label for label, name in enumerate(classes)} | {None: NO_LABEL}
    samples: list[SampleRow] = [{**row, "label": label_number[name]} for name, row in stored]
    quarantine: list[QuarantineRow] = [{**row, "label": label_number[name]} for name, row in quarantined]
    return {
        "shard": plan.shard,
        "split": plan.split,
        # empty where nothing is served, since shards.parquet lists only shards with samples
        "key": address if samples else "",
        "bytes": path.stat().st_size if samples else 0,
        "sha256": file_sha256(path) if samples else "",
        "samples": sample_columns(samples),
        "quarantine": quarantine,
        "classes": list(classes),
        **_other_columns([*contents.others, *in_no_sample(contents.members, found)], tar["path"]),
    }


def in_no_sample(members: Sequence[Member], found: Sequence[TarSample]) -> list[OtherMember]:
    """Return the members that the grouping left out: those without a key, and webdataset's own (`__index__`)."""
    used = {member.name for sample in found for member in sample.members.values()}
    return [OtherMember(member.name, "no sample") for member in members if member.name not in used]


def _other_columns(others: Sequence[OtherMember], path: str) -> OtherMembersRecord:
    """Return the count of the files that belong to no sample, the count of each reason, and examples of each."""
    by_reason: dict[str, list[str]] = {}
    for other in others:
        by_reason.setdefault(other.reason, []).append(f"{path}/{other.name}")
    return {
        "other_members": len(others),
        "other_reasons": {reason: len(names) for reason, names in by_reason.items()},
        "other_examples": {reason: names[:OTHER_EXAMPLES] for reason, names in by_reason.items()},
    }


def _accept(
    file: BinaryIO, member: Member | Refused, label: str | Refused | None, policy: IntakePolicy
) -> Accepted | Refused:
    if isinstance(member, Refused):
        return member
    if isinstance(label, Refused):
        return label
    return too_many_bytes(member.size, policy) or accept_unchanged(content_of(member, file), policy)


def _address(store: Store, path: str) -> str:
    """Return the address of a file of the source, from which `locate_shard` finds its folder again."""
    folder, _, name = path.rpartition("/")
    # store.at() quotes the folder as a store's URI is quoted; the name stays as it is
    return f"{store.at(folder).uri if folder else store.uri}/{name}"
