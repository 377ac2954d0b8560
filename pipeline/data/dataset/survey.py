"""What a dataset holds, for people: counts, sizes, labels, what was refused, near duplicates, and some of its images.

The images are those with the lowest keyed hash of their ids: a random choice, the same at every call, and a larger one holds
the smaller. Duplicates that are not served may be among them.
Shapes: columns [n], one entry a stored sample of the chosen splits. Units: pixels, bytes of the stored image.
Memory: 30 bytes a sample beside the search for near duplicates (`near_duplicates.py`). Errors: those of the manifest."""

import heapq
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.manifest import NO_LABEL, Manifest, locate
from pipeline.data.dataset.near_duplicates import NearDuplicateSearch, near_duplicate_facts
from pipeline.data.images.pictures import Image, decode
from pipeline.errors import DataError, StorageError

_EXAMPLES = 3
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class SplitCounts:
    """One split."""

    split: str
    listed: int
    stored: int
    served: int
    duplicates: int
    quarantined: int
    shards: int
    shard_bytes: int
    classes: int
    """That have a stored sample."""


@dataclass(frozen=True)
class Refusals:
    """The images of one reason that went to quarantine."""

    reason: str
    count: int
    examples: tuple[tuple[str, str], ...]
    """Source and detail."""


@dataclass(frozen=True)
class Shown:
    """An image of the sheet."""

    source: str
    split: str
    label: str
    """The class's name; empty: none."""
    width: int
    height: int
    bytes: int
    served: bool
    image: Image | None
    """[H, W, 3]; None: it cannot be read."""
    trouble: str = ""
    """Why."""


@dataclass(frozen=True)
class Survey:
    """All of it. Columns and labels are of the stored samples."""

    splits: tuple[SplitCounts, ...]
    classes: tuple[str, ...]
    widths: Int64s
    heights: Int64s
    lengths: Int64s
    label_counts: Mapping[str, int]
    """Class -> samples, most frequent first; those without a label under an empty name."""
    policies: Mapping[str, int]
    """`kept`, `reencoded:...` -> samples."""
    refusals: tuple[Refusals, ...]
    """Most frequent reason first."""
    near_duplicates: Mapping[str, Any]
    """As in the shard step's facts; of all splits, whichever are chosen."""
    shown: tuple[Shown, ...]


def survey(manifest: Manifest, *, splits: Sequence[str], images: int, seed: int = 0) -> Survey:
    """Reads the manifest whole, and `images` images of these splits."""
    lines = manifest.all_shards().to_pylist()
    near = NearDuplicateSearch()
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("width", "height", "length")}
    labels: Counter[int] = Counter()
    classes_of: dict[str, set[int]] = {split: set() for split in splits}
    policies: Counter[str] = Counter()
    lowest: list[tuple[int, int, dict[str, Any]]] = []
    for line in lines:
        samples = near.shown(line["shard"], line["split"], manifest.stored_samples(line["shard"]))
        if line["split"] not in splits:
            continue
        for name, pieces in columns.items():
            pieces.append(samples.column(name).to_numpy().astype(np.int64))
        here = Counter(samples.column("label").to_pylist())
        labels.update(here)
        classes_of[line["split"]].update(here.keys() - {NO_LABEL})
        policies.update(samples.column("policy").to_pylist())
        priority = hash64(samples.column("sample_id").to_numpy(), key64("inspect", seed))
        first = np.argsort(priority)[:images]
        chosen = ((int(priority[row]), line["shard"], samples.slice(int(row), 1).to_pylist()[0]) for row in first)
        lowest = heapq.nsmallest(images, [*lowest, *chosen], key=lambda entry: entry[:2])
    key_of = {line["shard"]: line["key"] for line in lines}
    named = {NO_LABEL: ""} | dict(enumerate(manifest.classes))
    return Survey(
        splits=tuple(_counts(manifest, split, lines, len(classes_of[split])) for split in splits),
        classes=manifest.classes,
        widths=_joined(columns["width"]),
        heights=_joined(columns["height"]),
        lengths=_joined(columns["length"]),
        label_counts={named[label]: count for label, count in labels.most_common()},
        policies=dict(policies.most_common()),
        refusals=_refusals(manifest, splits),
        near_duplicates=near_duplicate_facts(near.find(), manifest.stored_samples),
        shown=tuple(_shown(manifest, key_of[row["shard"]], row, named) for _, _, row in lowest),
    )


def _counts(manifest: Manifest, split: str, lines: Sequence[Mapping[str, Any]], classes: int) -> SplitCounts:
    here = [line for line in lines if line["split"] == split]
    size = sum(line["bytes"] for line in here)
    return SplitCounts(split, **manifest.counts["splits"][split], shards=len(here), shard_bytes=size, classes=classes)


def _refusals(manifest: Manifest, splits: Sequence[str]) -> tuple[Refusals, ...]:
    by_reason: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest.quarantine().to_pylist():
        if row["split"] in splits:
            by_reason.setdefault(row["reason"], []).append(row)
    found = (
        Refusals(reason, len(rows), tuple((row["source"], row["detail"]) for row in rows[:_EXAMPLES]))
        for reason, rows in by_reason.items()
    )
    return tuple(sorted(found, key=lambda refusals: (-refusals.count, refusals.reason)))


def _shown(manifest: Manifest, key: str, row: Mapping[str, Any], named: Mapping[int, str]) -> Shown:
    image, trouble = None, ""
    try:
        store, name = locate(manifest.root, key)
        data = store.read_range(name, row["offset"], row["length"])
        if zlib.crc32(data) != row["crc32"]:
            raise DataError("its bytes are not those that were written")
        image = decode(data)
    except (DataError, StorageError) as error:
        trouble = str(error)
    return Shown(
        source=row["source"],
        split=row["split"],
        label=named[row["label"]],
        width=row["width"],
        height=row["height"],
        bytes=row["length"],
        served=row["served"],
        image=image,
        trouble=trouble,
    )


def _joined(pieces: Sequence[NDArray[Any]]) -> Int64s:
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)
