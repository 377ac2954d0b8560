"""WebDataset tars made by others, indexed where they are: nothing of them is written anew.

A task takes one tar: it walks the headers, groups adjacent members as webdataset does (key = path up to the first dot of
the base name), reads each image once, checks that it is one that training can read as it is, and puts a row like a
shard's: `rows/<plan digest>.json`, whose `key` is the tar's address. A tar of a bucket is downloaded once for that.
Sample: the one image member (`jpg`, `jpeg`, `png`, ...), its label in `cls` (a whole number or a word) or in a field of
`json`. Samples without one, or that would need encoding anew, go to quarantine, so that listed = stored + quarantined.
Refused whole is a tar that readers would cut short in silence: a damaged header, a cut, no end marker, bytes after it, two
members of one name, or one in which webdataset's own reader finds other keys. A flipped bit inside an image shows only
where it does not decode; from here on its CRC-32 is known.
Units: bytes; sample ids count from 0 in each tar, quarantined ones included.
Errors: DataError naming the tar; StorageError when a store is down."""

import json
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.dataset.manifest import NO_LABEL, SAMPLES
from pipeline.data.dataset.shard_plan import IntakePolicy, ShardPlan, ShardPlans
from pipeline.data.dataset.shard_writer import (
    ShardRow,
    file_sha256,
    quarantine_row,
    sample_row,
    stored_row,
    too_many_bytes,
)
from pipeline.data.images.intake import Refused, Taken, check_in_place
from pipeline.data.sources.listing import IMAGE_SUFFIXES, encodable
from pipeline.data.sources.splits import class_order
from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.files import local_copy

_END_MARKER = 2 * tarfile.BLOCKSIZE
_CHUNK = 2**20
_DAMAGED = "Fetch it again from where it came, or remove it and name a new data.snapshot"


class Member(NamedTuple):
    """A regular file of a tar."""

    name: str
    offset: int  # to the first byte of its content
    size: int


@dataclass(frozen=True)
class TarSample:
    """Adjacent members with one key."""

    key: str
    members: Mapping[str, Member]
    """By suffix, in lower case: what follows the first dot."""


def plan_tars(snapshot: Any, *, policy: IntakePolicy, label_field: str | None) -> ShardPlans:
    """One plan a tar (a row of the snapshot), split by split, in path order."""
    splits = snapshot.column("split").to_pylist()
    runs = [(splits[row], np.array([row])) for row in sorted(range(len(splits)), key=lambda row: (splits[row], row))]
    return ShardPlans(snapshot, runs, policy, tar_label_field=label_field)


def index_tar(
    plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy, label_field: str | None
) -> ShardRow:
    """Indexes the tar and, last, writes its row; returns at once when the row exists."""
    root = open_store(root_uri)
    row_key = f"rows/{plan.digest}.json"
    if root.exists(row_key):
        return stored_row(root, row_key, reused=True)
    (planned,) = plan.samples.to_pylist()
    store = open_store(source)
    address = _address(store, planned["path"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = local_copy(store, planned["path"], Path(folder) / "shard.tar")
            document = _indexed(plan, planned, path, address, policy, label_field)
        except (MissingObject, FileNotFoundError) as error:
            raise DataError(f"{address} is not there any more. Put it back, or name a new data.snapshot") from error
    root.create(row_key, json.dumps(document, sort_keys=True).encode())
    return stored_row(root, row_key, reused=False)


class DamagedTar(DataError):
    """A tar that readers would cut short in silence, or cannot read; `what` is the damage without place and way out."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(f"{address}: {what}. {_DAMAGED}")
        self.what = what


def walk(path: Path, address: str) -> list[Member]:
    """The regular files of a tar; DamagedTar unless it is whole up to its end marker, and nothing follows."""
    return list(each_member(path, address))


def each_member(path: Path, address: str) -> Iterator[Member]:
    """The regular files of a tar up to its end, or to where it is damaged: then it raises DamagedTar.

    Python's reader takes a damaged header for the end of the archive; here the end is checked.
    """
    last = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.issparse():
                    raise DamagedTar(address, f"{member.name} is a sparse file, which has no one place in the tar")
                if member.isreg():
                    if not encodable(member.name):
                        raise DataError(
                            f"{address}: the name {member.name!r} is not UTF-8. Write the tar anew with other names"
                        )
                    last = member.name
                    yield Member(member.name, member.offset_data, member.size)
            _check_end(file, tar.offset, address, after=last or "its beginning")
    except tarfile.TarError as error:
        raise DamagedTar(address, f"it is no whole tar{f' after {last}' if last else ''}: {error}") from error


def group(members: list[Member], address: str) -> list[TarSample]:
    """Samples as webdataset's grouping makes them."""
    files = ({"fname": member.name, "data": member, "__url__": ""} for member in members if not _is_meta(member.name))
    try:
        found = list(group_by_keys(files))
    except ValueError as error:
        raise DataError(
            f"{address}: {error.args[0]}. webdataset cannot read it; give every member another name, without dots in keys"
        ) from error
    return [
        TarSample(sample["__key__"], {name: member for name, member in sample.items() if not name.startswith("__")})
        for sample in found
    ]


def check_agreement(samples: list[TarSample], path: Path, address: str) -> None:
    """DataError unless webdataset's own reader finds these samples, in this order, with contents of these lengths."""
    count = 0
    for count, theirs in enumerate(read_by_webdataset(path, address), 1):
        ours = samples[count - 1] if count <= len(samples) else None
        lengths = {name: len(data) for name, data in theirs.items() if not name.startswith("__")}
        if ours is None or ours.key != theirs["__key__"] or lengths != {n: m.size for n, m in ours.members.items()}:
            raise DamagedTar(
                address,
                f"sample {count} is {theirs['__key__']!r} to webdataset and {ours.key if ours else None!r} by the tar's headers",
            )
    if count != len(samples):
        raise DamagedTar(address, f"webdataset reads {count} samples, the headers tell of {len(samples)}")


def read_by_webdataset(path: Path, address: str) -> Iterator[dict[str, Any]]:
    """Samples as webdataset's own reader gives them, its own fields (`__key__`) among theirs."""
    try:
        with path.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTar(address, f"webdataset cannot read it ({error.args[0]})") from error


def image_of(sample: TarSample) -> Member | Refused:
    """The image of a sample: its only member with an image's suffix, or the only one whose whole suffix is that."""
    whole = [name for name in sample.members if f".{name}" in IMAGE_SUFFIXES]
    partly = [name for name in sample.members if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    names = whole or partly
    if len(names) == 1:
        return sample.members[names[0]]
    if not names:
        return Refused("no_image", f"only {', '.join(sample.members)}")
    return Refused(
        "several_images",
        f"{', '.join(names)} under one key: webdataset cuts names at the first dot. Give each image a key without dots",
    )


def label_of(sample: TarSample, file: BinaryIO, label_field: str | None) -> str | Refused | None:
    """The class's name: from `cls`, else from a field of `json`; None: it has none."""
    if "cls" in sample.members:
        text = _content(file, sample.members["cls"])
        try:
            value: Any = text.decode().strip()
            value = int(value) if value.lstrip("-").isdecimal() else value
        except UnicodeDecodeError:
            return Refused("bad_label", "its .cls is not text")
    elif "json" in sample.members and label_field is not None:
        try:
            fields = json.loads(_content(file, sample.members["json"]))
        except ValueError as error:
            return Refused("bad_label", f"its .json is not JSON ({error})")
        value = fields.get(label_field) if isinstance(fields, Mapping) else None
    else:
        return None
    if value is None or value == "" or (type(value) is int and value < 0):
        return None
    if type(value) not in (int, str):
        return Refused("bad_label", f"its label is a {type(value).__name__}; write a whole number or text")
    return str(value)


def _indexed(
    plan: ShardPlan,
    planned: Mapping[str, Any],
    path: Path,
    address: str,
    policy: IntakePolicy,
    label_field: str | None,
) -> dict[str, Any]:
    members = walk(path, address)
    found = group(members, address)
    check_agreement(found, path, address)
    rows: list[tuple[str | None, dict[str, Any]]] = []  # label and row of each stored sample
    quarantine: list[tuple[str | None, dict[str, Any]]] = []
    with path.open("rb") as file:
        for number, sample in enumerate(found):
            member, label = image_of(sample), label_of(sample, file, label_field)
            taken = _taken(file, member, label, policy)
            name = label if isinstance(label, str) else None
            line = dict(planned) | {"sample_id": number, "path": f"{planned['path']}/{sample.key}", "size": 0}
            if isinstance(member, Member):
                line |= {"path": f"{planned['path']}/{member.name}", "size": member.size}
            if isinstance(taken, Refused):
                quarantine.append((name, quarantine_row(line, taken)))
            elif isinstance(member, Member):
                rows.append((name, sample_row(plan, line, taken, key=sample.key) | {"offset": member.offset}))
    classes = class_order({name for name, _ in (*rows, *quarantine) if name is not None})
    label_number = {name: label for label, name in enumerate(classes)} | {None: NO_LABEL}
    stored = [row | {"label": label_number[name]} for name, row in rows]
    return {
        "shard": plan.shard,
        "split": plan.split,
        "key": address if stored else "",
        "bytes": path.stat().st_size if stored else 0,
        "sha256": file_sha256(path) if stored else "",
        "samples": {name: [row[name] for row in stored] for name in SAMPLES.names},
        "quarantine": [row | {"label": label_number[name]} for name, row in quarantine],
        "classes": list(classes),
        "other_members": len(members) - sum(len(sample.members) for sample in found),
    }


def _taken(
    file: BinaryIO, member: Member | Refused, label: str | Refused | None, policy: IntakePolicy
) -> Taken | Refused:
    if isinstance(member, Refused):
        return member
    if isinstance(label, Refused):
        return label
    if refused := too_many_bytes(member.size, policy):
        return refused
    return check_in_place(_content(file, member), max_pixels=policy.image_max_pixels)


def _address(store: Store, path: str) -> str:
    """Address of a file of the source, from which `locate` finds its folder again (a folder's URI is quoted, a name is not)."""
    folder, _, name = path.rpartition("/")
    return f"{store.at(folder).uri if folder else store.uri}/{name}"


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _check_end(file: BinaryIO, end: int, address: str, *, after: str) -> None:
    """The archive ends in two blocks of zeros, and nothing follows but zeros."""
    file.seek(end)
    length = 0
    while data := file.read(_CHUNK):
        if data.strip(b"\0"):
            at = end + length + len(data) - len(data.lstrip(b"\0"))
            raise DamagedTar(
                address,
                f"the header after {after} is damaged, or something follows the end of the archive (byte {at}), and readers would "
                "stop here in silence",
            )
        length += len(data)
    if length < _END_MARKER:
        raise DamagedTar(address, f"it ends after {after} without an end marker, so it was cut off")


def _is_meta(name: str) -> bool:
    """Whether webdataset passes over the member: `__name__` and what lies below such a folder."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")
