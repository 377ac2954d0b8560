"""Integrity of a shard: whether it is what its manifest says. Every byte is read.

Of a shard: existence, size, SHA-256, an unbroken walk over the headers to the end marker, the same keys in the same order as
in the manifest, and the same samples in webdataset's own reader. Of a sample: offset, length, CRC-32, SHA-256, the label
next to it, that the training reader decodes it, and its width and height.
Plain WebDataset readers take a damaged header or a cut between two members for the end of the archive, so the findings say how
many samples they would lose. Our reader goes by offset and checksum instead.
`pipeline.runs.finished.verification` applies this to all shards of a dataset and says how to repair them.
Units: bytes, offsets from the start of the tar. A tar is read at most twice, from disk; from a bucket it is downloaded once.
Errors: damage is a Finding, not an exception; StorageError when a store is down."""

import contextlib
import hashlib
import os
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from pipeline.data.dataset.address import is_indexed, locate_shard, shard_address
from pipeline.data.dataset.facts import DatasetCounts
from pipeline.data.dataset.schema import NO_LABEL, SampleRow, ShardRow
from pipeline.data.images.pictures import decode
from pipeline.data.sources.tars import (
    DamagedTar,
    Entry,
    Member,
    TarSample,
    contents_of,
    group_members,
    iter_entries,
    read_by_webdataset,
    regular_members,
)
from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store
from pipeline.storage.files import file_sha256, local_copy

Damage = Literal["missing", "cut", "trailing", "header", "bytes", "swapped", "members", "sample", "manifest", "orphan"]
"""missing: no such object. cut: shorter than written. trailing: something follows its end. header: bytes outside the images
differ. bytes: an image's bytes differ. swapped: it is another shard. members: its samples are not the manifest's. sample: the
bytes are the manifest's, but do not decode to what it says. manifest: a table is not the one that the step wrote. orphan: a tar
that the manifest does not name."""
Labels = Literal["numbers", "other"]
"""Whether the tar's .cls members hold the manifest's label numbers. They do unless parts were joined or tars were indexed."""
_NAMED = 5
"""Damaged samples of a shard that are named; the others are only counted."""
_CHUNK = 2**20


@dataclass(frozen=True)
class Finding:
    """One piece of damage."""

    damage: Damage
    where: str
    """Address of the shard or table."""
    what: str
    shard: int | None = None
    sample: str = ""
    """Key of the first sample concerned."""
    source: str = ""
    """The source of that sample."""
    repair: str = ""
    delete: tuple[str, ...] = ()
    """Addresses of the objects to delete for the repair."""


@dataclass(frozen=True)
class ShardReport:
    """What was read of one shard, and what is damaged."""

    shard: int
    split: str
    samples: int
    """According to the manifest."""
    served: int
    bytes: int
    sha256: str
    """Of the object that was found, or an empty string if there is none."""
    findings: tuple[Finding, ...] = field(default=())


@dataclass(frozen=True)
class Verification:
    """The result of reading a whole dataset."""

    step: str
    step_uri: str
    digest: str
    shards: int
    samples: int
    bytes: int
    """Bytes that were read."""
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.findings


def check_shard(root: Store, shard: ShardRow, samples: Sequence[SampleRow], *, labels: Labels) -> ShardReport:
    """Read a whole shard and compare it with its row and its samples in the manifest, which come by offset."""
    where = shard_address(root, shard["key"])
    served = sum(sample["served"] for sample in samples)
    report = ShardReport(shard["shard"], shard["split"], len(samples), served, 0, "")
    store, key = locate_shard(root, shard["key"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = local_copy(store, key, Path(folder) / "shard.tar")
            size, sha256 = path.stat().st_size, file_sha256(path)
        # FileNotFoundError too: of a local store, `local_copy` returns the path unchecked
        except (MissingObject, FileNotFoundError):
            lost = f"there is no such object; it held {len(samples)} samples"
            return replace(report, findings=(_finding("missing", where, lost, shard, samples[:1]),))
        tar = _Tar(path, where, size, sha256)
        # a tuple, so that all is read before the folder with the download goes
        found = tuple(_findings(tar, shard, samples, labels=labels))
    return replace(report, bytes=size, sha256=sha256, findings=found)


def check_totals(
    shards: Sequence[ShardRow], reports: Sequence[ShardReport], counts: DatasetCounts, where: str
) -> list[Finding]:
    """Compare the sums over shards.parquet and over samples.parquet with the counts in manifest.json."""
    found = []
    for split, count in counts.splits.items():
        reported = [report for report in reports if report.split == split]
        listed = [shard for shard in shards if shard["split"] == split]
        sums = {
            "samples.parquet": (sum(one.samples for one in reported), sum(one.served for one in reported)),
            "shards.parquet": (sum(shard["samples"] for shard in listed), sum(shard["served"] for shard in listed)),
        }
        for table, (stored, served) in sums.items():
            if (stored, served) != (count.stored, count.served):
                what = (
                    f"{table} has {stored} samples of {split}, {served} of them served; manifest.json says {count.stored} and "
                    f"{count.served}"
                )
                found.append(Finding("manifest", where, what))
    return found


def name_swapped(shards: Sequence[ShardRow], reports: Sequence[ShardReport]) -> list[ShardReport]:
    """Reduce the findings of a shard that holds exactly the bytes of another shard to a single one that says so."""
    owner = {shard["sha256"]: shard["shard"] for shard in shards}
    named = []
    for report in reports:
        other = owner.get(report.sha256, report.shard)
        # without findings the shard is whole: two may hold equal bytes, and `owner` knows only one of them
        if other != report.shard and report.findings:
            first = report.findings[0]
            swapped = replace(first, damage="swapped", what=f"it holds the bytes of shard {other}, not its own")
            named.append(replace(report, findings=(swapped,)))
        else:
            named.append(report)
    return named


@dataclass(frozen=True)
class _Tar:
    """The object that was found at a shard's key, as a local file."""

    path: Path
    where: str
    """Its address in the store."""
    size: int
    sha256: str


def _findings(tar: _Tar, shard: ShardRow, samples: Sequence[SampleRow], *, labels: Labels) -> Iterator[Finding]:
    entries, broken = _walk(tar)
    with tar.path.open("rb") as file:
        wrong = {one["key"]: problems for one in samples if (problems := list(_sample_problems(file, one)))}
    # a whole tar with a wrong sample means that the manifest is at fault rather than the bytes
    whole = tar.size == shard["bytes"] and tar.sha256 == shard["sha256"]
    if not whole or broken:
        yield _tar_finding(tar, shard, samples, regular_members(entries), broken, wrong=wrong.keys())
    # samples beyond the end of a cut tar are part of the finding above
    damaged = [one for one in samples if one["key"] in wrong and one["offset"] + one["length"] <= tar.size]
    for one in damaged[:_NAMED]:
        yield _finding("sample" if whole else "bytes", tar.where, "; ".join(wrong[one["key"]]), shard, [one])
    if len(damaged) > _NAMED:
        yield Finding(
            "bytes", tar.where, f"{len(damaged)} of {len(samples)} samples in all are damaged", shard["shard"]
        )
    # behind a broken header no member is known, and every sample there would be reported a second time
    if not broken:
        yield from _member_findings(tar, shard, samples, entries, labels=labels)


def _walk(tar: _Tar) -> tuple[list[Entry], str]:
    """Return the entries up to the end or the damage, and the damage or an empty string."""
    entries: list[Entry] = []
    try:
        for entry in iter_entries(tar.path, tar.where):
            entries.append(entry)  # noqa: PERF402 - extend would lose the entries before the damage
    except DamagedTar as damage:
        return entries, damage.what
    except DataError as error:
        return entries, str(error)
    return entries, ""


def _sample_problems(file: BinaryIO, sample: SampleRow) -> Iterator[str]:
    """Yield what is wrong with the bytes at a sample's offset."""
    data = os.pread(file.fileno(), sample["length"], sample["offset"])
    if len(data) < sample["length"]:
        yield f"cut off: {len(data)} of its {sample['length']} bytes are there"
        return
    if zlib.crc32(data) != sample["crc32"] or hashlib.sha256(data).hexdigest() != sample["sha256"]:
        yield (
            f"its {sample['length']} bytes at {sample['offset']} have changed (CRC-32 {zlib.crc32(data)}, written was "
            f"{sample['crc32']})"
        )
    try:
        # decoded and not read from the header: this is what training gets
        height, width, _ = decode(data).shape
    except DataError as error:
        yield str(error)
        return
    if (width, height) != (sample["width"], sample["height"]):
        yield f"it is {width} x {height} pixels, the manifest says {sample['width']} x {sample['height']}"


def _tar_finding(
    tar: _Tar,
    shard: ShardRow,
    samples: Sequence[SampleRow],
    members: Sequence[Member],
    broken: str,
    *,
    wrong: Collection[str],
) -> Finding:
    """Return the damage of the tar as a whole, with the first sample that a reader of the tar would lose."""
    reached = {member.offset for member in members}
    first = [one for one in samples if one["offset"] not in reached or one["key"] in wrong][:1]
    size, expected = tar.size, shard["bytes"]
    damage: Damage
    # the prefix is hashed too, or a shard that was replaced by a larger one would pass for an intact one
    if size > expected and _sha256_of(tar.path, expected) == shard["sha256"]:
        damage, what = "trailing", f"{size - expected} bytes follow its end; its own {expected} are intact"
    elif size < expected:
        gone = sum(one["offset"] + one["length"] > size for one in samples)
        damage, what = (
            "cut",
            f"{size} of its {expected} bytes are there, {gone} of {len(samples)} images are cut or gone",
        )
    elif size > expected:
        damage, what = "header", f"it has {size} bytes, written were {expected}"
    elif broken:
        damage, what = "header", "its SHA-256 is not the one it was written with"
    elif wrong:
        damage, what = "bytes", "its SHA-256 is not the one it was written with"
    else:
        damage = "header"
        what = "every sample is intact, but headers or padding (times, owners) are not those that were written"
    if broken:
        what += f"; {broken}"
    lost = _lost_to_webdataset(tar, samples)
    return _finding(damage, tar.where, f"{what}; {lost}" if lost else what, shard, first)


def _lost_to_webdataset(tar: _Tar, samples: Sequence[SampleRow]) -> str:
    """Return what webdataset would lose of the tar, or an empty string if it reads all samples."""
    read = 0
    try:
        for read, _ in enumerate(read_by_webdataset(tar.path, tar.where), 1):  # noqa: B007 - only the count is needed
            pass
    except DamagedTar:
        return f"webdataset reads {read} of {len(samples)} samples and fails"
    return "" if read == len(samples) else f"webdataset reads {read} of {len(samples)} samples and says nothing"


def _member_findings(
    tar: _Tar, shard: ShardRow, samples: Sequence[SampleRow], entries: Sequence[Entry], *, labels: Labels
) -> Iterator[Finding]:
    """Compare the samples of a tar whose headers are unbroken with the manifest's."""
    try:
        # grouped again with links and without hidden files: `regular` is what webdataset sees, `found` what we serve
        found = group_members(contents_of(entries).members, tar.where)
        regular = {sample.key for sample in group_members(regular_members(entries), tar.where)}
        theirs = [str(sample["__key__"]) for sample in read_by_webdataset(tar.path, tar.where)]
    except DataError as error:
        yield _finding("members", tar.where, str(error).removeprefix(f"{tar.where}: "), shard, samples[:1])
        return
    ours = [sample.key for sample in found]
    read = samples
    if is_indexed(shard["key"]):
        # ids follow the order of the tar; a link has its target's offset, wherever the link itself is
        samples = sorted(samples, key=lambda sample: sample["sample_id"])
        stored = {one["key"] for one in samples}
        # an indexed tar holds its quarantined samples too
        ours = [key for key in ours if key in stored]
        # to webdataset, hidden files tear a sample into several of one key, and links do not exist
        theirs = list(dict.fromkeys(key for key in theirs if key in stored))
        read = [one for one in samples if one["key"] in regular]
    for keys, expected, reader in ((ours, samples, "the tar"), (theirs, read, "webdataset's reader")):
        if difference := _first_difference(keys, expected):
            number, key, sample = difference
            counts = f"{len(keys)} samples, {len(expected)} in the manifest"
            what = (
                f"sample {number} is {key!r} in {reader} and {sample['key']!r} in the manifest ({counts})"
                if sample
                else f"{reader} has {counts}; the first one too many is {key!r}"
            )
            yield _finding("members", tar.where, what, shard, [sample] if sample else [])
            # once is enough: after a missing key every later one differs too
            return
    yield from _header_findings(tar, shard, samples, {sample.key: sample for sample in found}, labels=labels)


def _header_findings(
    tar: _Tar,
    shard: ShardRow,
    samples: Sequence[SampleRow],
    found: Mapping[str, TarSample],
    *,
    labels: Labels,
) -> Iterator[Finding]:
    """Compare offset, length and label of each sample with the tar's headers."""
    with tar.path.open("rb") as file:
        for sample in samples:
            members = found[sample["key"]].members
            # any member: a row does not say which suffix its image has
            if (sample["offset"], sample["length"]) not in {
                (member.offset, member.size) for member in members.values()
            }:
                what = f"the manifest has {sample['length']} bytes at {sample['offset']}, where no member of that length begins"
                yield _finding("members", tar.where, what, shard, [sample])
            if labels == "numbers":
                label = _label(file, members.get("cls"))
                if label != (None if sample["label"] == NO_LABEL else str(sample["label"])):
                    what = f"its .cls says {label!r}, its label in the manifest is {sample['label']}"
                    yield _finding("members", tar.where, what, shard, [sample])


def _label(file: BinaryIO, member: Member | None) -> str | None:
    if member is None:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        return os.pread(file.fileno(), member.size, member.offset).decode()
    return "not text"


def _first_difference(
    keys: Sequence[str], samples: Sequence[SampleRow]
) -> tuple[int, str | None, SampleRow | None] | None:
    """Return number (from 1), key in the tar and row in the manifest of the first difference, or None if there is none."""
    for number in range(max(len(keys), len(samples))):
        key = keys[number] if number < len(keys) else None
        sample = samples[number] if number < len(samples) else None
        if sample is None or key != sample["key"]:
            return number + 1, key, sample
    return None


def _sha256_of(path: Path, length: int) -> str:
    """Return the digest of the first `length` bytes."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while length and (data := file.read(min(_CHUNK, length))):
            content.update(data)
            length -= len(data)
    return content.hexdigest()


def _finding(damage: Damage, where: str, what: str, shard: ShardRow, samples: Sequence[SampleRow]) -> Finding:
    key, source = (samples[0]["key"], samples[0]["source"]) if samples else ("", "")
    return Finding(damage, where, what, shard["shard"], sample=key, source=source)
