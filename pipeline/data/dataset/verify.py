"""Is a shard what its manifest says? Every byte is read, and what WebDataset readers would lose in silence is named.

Of a shard: present, size, SHA-256, an unbroken walk over the headers to the end marker, the same keys in the same order as
the manifest, and the same samples in webdataset's own reader. Of a sample: where it lies, length, CRC-32, SHA-256, the
label beside it, that the training reader decodes it, and its width and height.
Plain WebDataset readers take a damaged header or a cut between two members for the end of the archive: the findings say how
many samples would be gone. Ours reads by offset, with the checksum.
Units: bytes, offsets from the start of the tar. A tar is read twice at most, from disk; of a bucket it is downloaded once.
Errors: none for what is damaged (a Finding); StorageError when a store is down."""

import contextlib
import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline.data.dataset.manifest import NO_LABEL, locate, shard_address
from pipeline.data.dataset.shard_writer import file_sha256
from pipeline.data.dataset.tar_index import DamagedTar, Member, TarSample, each_member, group, read_by_webdataset
from pipeline.data.images.pictures import decode
from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store
from pipeline.storage.files import local_copy

Damage = Literal["missing", "cut", "trailing", "header", "bytes", "swapped", "members", "sample", "manifest", "orphan"]
"""missing: no such object. cut: shorter than written. trailing: something follows. header: bytes outside the images differ. bytes:
an image's bytes differ. swapped: it is another shard. members: other keys than the manifest's. sample: the bytes are those
of the manifest, and do not keep its promise. manifest: a table is not the one the step wrote. orphan: a tar no row names."""
Row = Mapping[str, Any]
"""Of samples.parquet, or of shards.parquet."""
_NAMED = 5
"""Samples of a shard that are named; the others are counted."""
_CHUNK = 2**20


@dataclass(frozen=True)
class Finding:
    """One damage."""

    damage: Damage
    where: str
    """Address of the shard or table."""
    what: str
    shard: int | None = None
    sample: str = ""
    """Key of the first sample concerned."""
    source: str = ""
    """Where that sample came from."""
    repair: str = ""
    delete: tuple[str, ...] = ()
    """Addresses of the objects to be deleted for it."""


@dataclass(frozen=True)
class ShardReport:
    """What was read of one shard, and what is wrong with it."""

    shard: int
    split: str
    samples: int
    """Rows of the manifest."""
    served: int
    bytes: int
    sha256: str
    """Of what lies there; empty: nothing does."""
    findings: tuple[Finding, ...] = field(default=())


@dataclass(frozen=True)
class Verification:
    """What reading a whole dataset came to."""

    step: str
    step_uri: str
    digest: str
    shards: int
    samples: int
    bytes: int
    """Read."""
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether everything is as the manifest says."""
        return not self.findings


def check_shard(root: Store, line: Row, rows: Sequence[Row], *, labels: Literal["numbers", "other"]) -> ShardReport:
    """Reads a whole shard. `line`: its row of shards.parquet; `rows`: its samples, by offset.

    `labels`: whether the tar's .cls hold the manifest's numbers, as they do unless parts were joined or tars indexed.
    """
    where = shard_address(root, line["key"])
    report = ShardReport(line["shard"], line["split"], len(rows), sum(row["served"] for row in rows), 0, "")
    store, key = locate(root, line["key"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = local_copy(store, key, Path(folder) / "shard.tar")
            size, sha256 = path.stat().st_size, file_sha256(path)
        except (MissingObject, FileNotFoundError):
            lost = f"there is no such object; it held {len(rows)} samples"
            return replace(report, findings=(_finding("missing", where, lost, line, rows[:1]),))
        found = tuple(_findings(path, where, line, rows, size=size, sha256=sha256, labels=labels))
    return replace(report, bytes=size, sha256=sha256, findings=found)


def check_totals(
    lines: Sequence[Row], reports: Sequence[ShardReport], counts: Mapping[str, Any], where: str
) -> list[Finding]:
    """The shards' rows and their samples against the counts in manifest.json."""
    found = []
    for split, count in counts["splits"].items():
        here = [report for report in reports if report.split == split]
        told = [line for line in lines if line["split"] == split]
        sums = {
            "samples.parquet": (sum(one.samples for one in here), sum(one.served for one in here)),
            "shards.parquet": (sum(line["samples"] for line in told), sum(line["served"] for line in told)),
        }
        for table, (stored, served) in sums.items():
            if (stored, served) != (count["stored"], count["served"]):
                what = (
                    f"{table} has {stored} samples of {split}, {served} of them served; manifest.json says {count['stored']} "
                    f"and {count['served']}"
                )
                found.append(Finding("manifest", where, what))
    return found


def name_swapped(lines: Sequence[Row], reports: Sequence[ShardReport]) -> list[ShardReport]:
    """A shard that holds exactly the bytes of another is one finding, and not one for each of its samples."""
    owner = {line["sha256"]: line["shard"] for line in lines}
    named = []
    for report in reports:
        other = owner.get(report.sha256, report.shard)
        if other != report.shard and report.findings:
            first = report.findings[0]
            swapped = replace(first, damage="swapped", what=f"it holds the bytes of shard {other}, not its own")
            named.append(replace(report, findings=(swapped,)))
        else:
            named.append(report)
    return named


def _findings(
    path: Path,
    where: str,
    line: Row,
    rows: Sequence[Row],
    *,
    size: int,
    sha256: str,
    labels: Literal["numbers", "other"],
) -> Iterator[Finding]:
    members, broken = _walked(path, where)
    with path.open("rb") as file:
        wrong = {row["key"]: problems for row in rows if (problems := list(_sample_problems(file, row)))}
    whole = size == line["bytes"] and sha256 == line["sha256"]
    if not whole or broken:
        yield _tar_finding(path, where, line, rows, members, broken, size=size, wrong=wrong)
    # what is cut off is told once, with the tar
    damaged = [row for row in rows if row["key"] in wrong and row["offset"] + row["length"] <= size]
    for row in damaged[:_NAMED]:
        yield _finding("sample" if whole else "bytes", where, "; ".join(wrong[row["key"]]), line, [row])
    if len(damaged) > _NAMED:
        yield Finding("bytes", where, f"{len(damaged)} of {len(rows)} samples in all are damaged", line["shard"])
    if not broken:
        yield from _member_findings(path, where, line, rows, members, labels=labels)


def _walked(path: Path, where: str) -> tuple[list[Member], str]:
    """The members up to the end or to the damage, and the damage."""
    members: list[Member] = []
    try:
        for member in each_member(path, where):
            members.append(member)  # noqa: PERF402 - extend would lose what came before the damage
    except DamagedTar as damage:
        return members, damage.what
    except DataError as error:
        return members, str(error)
    return members, ""


def _sample_problems(file: BinaryIO, row: Row) -> Iterator[str]:
    """What is wrong with the bytes at a sample's place."""
    data = os.pread(file.fileno(), row["length"], row["offset"])
    if len(data) < row["length"]:
        yield f"cut off: {len(data)} of its {row['length']} bytes are there"
        return
    if zlib.crc32(data) != row["crc32"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        yield f"its {row['length']} bytes at {row['offset']} are others (CRC-32 {zlib.crc32(data)}, written was {row['crc32']})"
    try:
        height, width, _ = decode(data).shape
    except DataError as error:
        yield str(error)
        return
    if (width, height) != (row["width"], row["height"]):
        yield f"it is {width} x {height} pixels, the manifest says {row['width']} x {row['height']}"


def _tar_finding(
    path: Path,
    where: str,
    line: Row,
    rows: Sequence[Row],
    members: Sequence[Member],
    broken: str,
    *,
    size: int,
    wrong: Mapping[str, Any],
) -> Finding:
    """The damage of the tar as a whole, and the first sample that it costs a reader of the tar."""
    reached = {member.offset for member in members}
    first = [row for row in rows if row["offset"] not in reached or row["key"] in wrong][:1]
    expected = line["bytes"]
    damage: Damage
    if size > expected and _sha256_of(path, expected) == line["sha256"]:
        damage, what = "trailing", f"{size - expected} bytes follow its end; its own {expected} are whole"
    elif size < expected:
        gone = sum(row["offset"] + row["length"] > size for row in rows)
        damage, what = "cut", f"{size} of its {expected} bytes are there, {gone} of {len(rows)} images are cut or gone"
    elif size > expected:
        damage, what = "header", f"{size} bytes, written were {expected}"
    elif broken:
        damage, what = "header", "its SHA-256 is another than when it was written"
    elif wrong:
        damage, what = "bytes", "its SHA-256 is another than when it was written"
    else:
        damage = "header"
        what = "every sample is whole, but headers or what lies between them (times, owners) are others than when it was written"
    if broken:
        what += f"; {broken}"
    lost = _lost(path, where, rows)
    return _finding(damage, where, f"{what}; {lost}" if lost else what, line, first)


def _lost(path: Path, where: str, rows: Sequence[Row]) -> str:
    """What webdataset would make of it."""
    read, error = 0, ""
    try:
        for read, _ in enumerate(read_by_webdataset(path, where), 1):  # noqa: B007 - the count is what is asked for
            pass
    except DamagedTar as damage:
        error = damage.what
    if error:
        return f"webdataset reads {read} of {len(rows)} samples and fails"
    return "" if read == len(rows) else f"webdataset reads {read} of {len(rows)} samples and says nothing"


def _member_findings(
    path: Path,
    where: str,
    line: Row,
    rows: Sequence[Row],
    members: list[Member],
    *,
    labels: Literal["numbers", "other"],
) -> Iterator[Finding]:
    """Of a tar whose headers are unbroken: its samples against the manifest's."""
    try:
        samples = group(members, where)
        theirs = [str(sample["__key__"]) for sample in read_by_webdataset(path, where)]
    except DataError as error:
        yield _finding("members", where, str(error).removeprefix(f"{where}: "), line, rows[:1])
        return
    indexed = "://" in line["key"]
    keys = [sample.key for sample in samples]
    if indexed:  # what was quarantined lies there too
        listed = {row["key"] for row in rows}
        keys, theirs = ([key for key in names if key in listed] for names in (keys, theirs))
    for found, reader in ((keys, "the tar"), (theirs, "webdataset's reader")):
        if place := _first_difference(found, rows):
            number, key, row = place
            counts = f"{len(found)} samples, {len(rows)} in the manifest"
            what = (
                f"sample {number} is {key!r} in {reader} and {row['key']!r} in the manifest ({counts})"
                if row
                else (f"{reader} has {counts}; the first one too many is {key!r}")
            )
            yield _finding("members", where, what, line, [row] if row else [])
            return
    yield from _place_findings(path, where, line, rows, {sample.key: sample for sample in samples}, labels=labels)


def _place_findings(
    path: Path,
    where: str,
    line: Row,
    rows: Sequence[Row],
    samples: Mapping[str, TarSample],
    *,
    labels: Literal["numbers", "other"],
) -> Iterator[Finding]:
    """Offset, length and label of each sample against the headers."""
    with path.open("rb") as file:
        for row in rows:
            members = samples[row["key"]].members
            places = {(member.offset, member.size) for member in members.values()}
            if (row["offset"], row["length"]) not in places:
                what = (
                    f"the manifest has {row['length']} bytes at {row['offset']}, where no member of that length begins"
                )
                yield _finding("members", where, what, line, [row])
            if labels == "numbers":
                told = _label(file, members.get("cls"))
                if told != (None if row["label"] == NO_LABEL else str(row["label"])):
                    what = f"its .cls says {told!r}, its label in the manifest is {row['label']}"
                    yield _finding("members", where, what, line, [row])


def _label(file: BinaryIO, member: Member | None) -> str | None:
    if member is None:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        return os.pread(file.fileno(), member.size, member.offset).decode()
    return "not text"


def _first_difference(keys: Sequence[str], rows: Sequence[Row]) -> tuple[int, str | None, Row | None] | None:
    """Number from 1, key in the tar and row of the manifest of the first place where they differ."""
    for number in range(max(len(keys), len(rows))):
        key = keys[number] if number < len(keys) else None
        row = rows[number] if number < len(rows) else None
        if row is None or key != row["key"]:
            return number + 1, key, row
    return None


def _sha256_of(path: Path, length: int) -> str:
    """Of the first `length` bytes."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while length and (data := file.read(min(_CHUNK, length))):
            content.update(data)
            length -= len(data)
    return content.hexdigest()


def _finding(damage: Damage, where: str, what: str, line: Row, rows: Sequence[Row]) -> Finding:
    key, source = (rows[0]["key"], rows[0]["source"]) if rows else ("", "")
    return Finding(damage, where, what, line["shard"], sample=key, source=source)
