"""The record of a finished shard: `rows/<plan digest>.json` ("row" in messages), with a row for each of its images.

A task that writes or indexes a shard puts its record last, and only if there is none: a record means that the shard is
done. The coordinating process holds only the small part of each (`ShardResult`); the samples stay in the store until the
manifest is written.
Units: bytes. Errors: StorageError when a store is down."""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.dataset.schema import SAMPLES, QuarantineRow, SampleRow, SampleTable, SnapshotRow
from pipeline.data.images.intake import Accepted, Refused
from pipeline.storage import Store

_KEY_WITHIN = 512
"""Bytes at the start of a record that hold its shard's key: JSON keys are sorted, so `key` comes before `samples`."""


OTHER_EXAMPLES = 3
"""Examples of each reason for which a file of a tar belongs to no sample."""


class OtherMembersRecord(TypedDict, total=False):
    """What a record of an indexed tar says of the files that belong to no sample."""

    other_members: int
    other_reasons: dict[str, int]  # older records lack this and the next
    other_examples: dict[str, list[str]]


class ShardRecord(OtherMembersRecord):
    """A record as JSON."""

    shard: int
    split: str
    key: str
    bytes: int
    sha256: str
    samples: dict[str, list[Any]]  # column -> values, in the order of the tar
    quarantine: list[QuarantineRow]
    classes: NotRequired[list[str]]


@dataclass(frozen=True)
class ShardResult:
    """What a shard task returns: its record without the samples."""

    record_key: str
    shard: int
    split: str
    key: str
    """Of the tar (see `locate_shard`); empty if every image was refused."""
    bytes: int
    sha256: str
    samples: int
    quarantine: tuple[QuarantineRow, ...]
    reused: bool
    """An earlier attempt had written the shard."""
    classes: tuple[str, ...] | None = None
    """Indexed tars only: what its labels index; its samples count from 0. None: labels and ids are the snapshot's."""
    other_members: int = 0
    """Indexed tars only: files that belong to no sample."""
    other_reasons: Mapping[str, int] = field(default_factory=dict)
    other_examples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Reason -> addresses within the source."""


def record_key(plan_digest: str, suffix: str = "") -> str:
    """Return the key of a plan's record."""
    return f"rows/{plan_digest}{suffix}.json"


def write_record(root: Store, key: str, record: ShardRecord) -> ShardResult:
    """Write a record unless there is one, and return what is stored: another task may have been first."""
    # sorted keys: equal records are equal bytes, and find_records relies on the order
    root.create(key, json.dumps(record, sort_keys=True).encode())
    return read_record(root, key, reused=False)


def read_record(root: Store, key: str, *, reused: bool) -> ShardResult:
    """Return a stored record without its samples."""
    record: ShardRecord = json.loads(root.read(key))
    classes = record.get("classes")
    return ShardResult(
        record_key=key,
        shard=record["shard"],
        split=record["split"],
        key=record["key"],
        bytes=record["bytes"],
        sha256=record["sha256"],
        samples=len(record["samples"]["sample_id"]),
        quarantine=tuple(record["quarantine"]),
        reused=reused,
        classes=None if classes is None else tuple(classes),
        other_members=record.get("other_members", 0),
        other_reasons=record.get("other_reasons", {}),
        other_examples=record.get("other_examples", {}),
    )


def read_samples(root: Store, result: ShardResult) -> SampleTable:
    """Return the samples of a written shard or indexed tar, all marked served."""
    return pa.table(json.loads(root.read(result.record_key))["samples"], schema=SAMPLES)


def find_records(root: Store, keys: Collection[str]) -> dict[str, str]:
    """Return the key of the record that names each of these tars (`shards/...`), for those that have one."""
    wanted, found = set(keys), dict[str, str]()
    for info in root.list("rows/"):
        if len(found) == len(wanted):
            break
        # no more than there is, as read_range insists on the full length; the cut may split a character
        start = root.read_range(info.key, 0, min(info.size, _KEY_WITHIN)).decode(errors="replace")
        found |= {key: info.key for key in wanted if f'"{key}"' in start}
    return found


def sample_row(listed: SnapshotRow, image: Accepted, *, shard: int, split: str, key: str, offset: int) -> SampleRow:
    """Return the row of a stored image. `listed`: its row of the snapshot; `key`: its webdataset key."""
    return {
        "sample_id": listed["sample_id"],
        "shard": shard,
        "offset": offset,
        "length": len(image.data),
        "crc32": zlib.crc32(image.data),
        "sha256": hashlib.sha256(image.data).hexdigest(),
        "dhash64": image.dhash64,
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "label": listed["label"],
        "key": key,
        "source": listed["path"],
        "split": split,
        "served": True,
        "policy": image.policy,
    }


def sample_columns(rows: Sequence[SampleRow]) -> dict[str, list[Any]]:
    """Return the rows by column, as a record holds them."""
    columns: dict[str, list[Any]] = pa.Table.from_pylist(rows, schema=SAMPLES).to_pydict()
    return columns


def quarantine_row(listed: SnapshotRow, refused: Refused) -> QuarantineRow:
    """Return the row of a refused image."""
    return {
        "source": listed["path"],
        "split": listed["split"],
        "label": listed["label"],
        "reason": refused.reason,
        "detail": refused.detail,
        "bytes": listed["size"],
    }


def others_together(parts: Iterable[ShardResult | DatasetFacts]) -> dict[str, Any]:
    """Return the facts of a dataset on files of tars that belong to no sample, added up over its parts."""
    total, reasons = 0, Counter[str]()
    examples: dict[str, tuple[str, ...]] = {}
    for part in parts:
        total += part.other_members or 0
        reasons.update(part.other_reasons or {})
        for reason, sources in (part.other_examples or {}).items():
            examples[reason] = (*examples.get(reason, ()), *sources)[:OTHER_EXAMPLES]
    return {"other_members": total, "other_reasons": dict(reasons.most_common()), "other_examples": examples}
