"""A survey of a dataset for people: counts, sizes, labels, refused and contradicting images, near duplicates, and some images.

The images shown are those with the lowest keyed hash of their ids: a random choice that is the same at every call, and a
larger choice contains the smaller one. Duplicates that are not served may be among them.
Shapes: columns [n], one entry per stored sample of the chosen splits. Units: pixels; bytes of the stored image.
Near duplicates are those of the step's facts if the caller has them; otherwise pixels are compared again, which takes minutes
for a million images. Memory: 30 bytes per sample, plus the searches for duplicates (`duplicates.py`, `near_duplicates.py`).
Errors: those of the manifest."""

import heapq
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.address import locate_shard
from pipeline.data.dataset.dataset_writer import contradiction_facts, copy_facts
from pipeline.data.dataset.duplicates import find_duplicates
from pipeline.data.dataset.facts import ContradictionFacts, CopyFacts, Counts, NearDuplicateFacts, NearPair
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.dataset.near_duplicates import NearDuplicates, NearDuplicateSearch, named_pairs, near_duplicate_facts
from pipeline.data.dataset.schema import NO_LABEL, QuarantineRow, SampleRow, ShardRow
from pipeline.data.dataset.thumbnails import StoredImages
from pipeline.data.images.pictures import Image, decode
from pipeline.errors import DataError, StorageError

_EXAMPLES = 3
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers."""

    split: str
    counts: Counts
    shards: int
    shard_bytes: int
    classes: int
    """Classes that have a stored sample."""


@dataclass(frozen=True)
class Refusals:
    """The images that were quarantined for one reason."""

    reason: str
    count: int
    examples: tuple[tuple[str, str], ...]
    """Source and detail."""


@dataclass(frozen=True)
class ShownImage:
    """An image of the contact sheet."""

    source: str
    split: str
    label: str
    """The class's name, or an empty string if there is no label."""
    width: int
    height: int
    bytes: int
    served: bool
    image: Image | None
    """[H, W, 3], or None if it cannot be read."""
    trouble: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True)
class Survey:
    """The whole survey. Columns and labels are those of the stored samples."""

    splits: tuple[SplitSummary, ...]
    classes: tuple[str, ...]
    widths: Int64s
    heights: Int64s
    lengths: Int64s
    label_counts: Mapping[str, int]
    """Class -> samples, most frequent first; samples without a label are under an empty name."""
    policies: Mapping[str, int]
    """Policy of a sample (`kept`, `reencoded:...`) -> samples."""
    refusals: tuple[Refusals, ...]
    """Most frequent reason first."""
    near_duplicates: NearDuplicateFacts
    """As in the shard step's facts: across all splits, whichever are chosen."""
    copies: CopyFacts
    """Likewise across all splits."""
    contradictions: ContradictionFacts
    """Likewise across all splits."""
    shown: tuple[ShownImage, ...]


def survey(
    manifest: Manifest,
    *,
    splits: Sequence[str],
    images: int,
    seed: int = 0,
    near_duplicates: NearDuplicateFacts | None = None,
) -> Survey:
    """Read the whole manifest, and `images` images of these splits.

    `near_duplicates`: of the step's facts. Those of older versions went by hashes alone, so they are made again.
    """
    shards: list[ShardRow] = manifest.all_shards().to_pylist()
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("width", "height", "length")}
    labels: Counter[int] = Counter()
    classes_of: dict[str, set[int]] = {split: set() for split in splits}
    policies: Counter[str] = Counter()
    lowest: list[tuple[int, int, SampleRow]] = []  # hash of the id, shard, row
    for shard in shards:
        if shard["split"] not in splits:
            continue
        samples = manifest.stored_samples(shard["shard"])
        for name, pieces in columns.items():
            pieces.append(samples.column(name).to_numpy().astype(np.int64))
        here = Counter(samples.column("label").to_pylist())
        labels.update(here)
        classes_of[shard["split"]].update(here.keys() - {NO_LABEL})
        policies.update(samples.column("policy").to_pylist())
        priority = hash64(samples.column("sample_id").to_numpy(), key64("inspect", seed))
        # the lowest of all are among the lowest of each shard, so no more than `images` rows are kept at a time
        first = np.argsort(priority)[:images]
        chosen = ((int(priority[row]), shard["shard"], samples.slice(int(row), 1).to_pylist()[0]) for row in first)
        # not by the row: dicts cannot be compared
        lowest = heapq.nsmallest(images, [*lowest, *chosen], key=lambda entry: entry[:2])
    key_of = {shard["shard"]: shard["key"] for shard in shards}
    copies = find_duplicates((s["shard"], s["split"], manifest.stored_samples(s["shard"])) for s in shards)
    if near_duplicates is None or near_duplicates.aligned is None:
        found = search_near_duplicates(manifest)
        near_duplicates = near_duplicate_facts(found, manifest.stored_samples, classes=manifest.classes)
    named = {NO_LABEL: ""} | dict(enumerate(manifest.classes))
    return Survey(
        splits=tuple(_summary(manifest, split, shards, len(classes_of[split])) for split in splits),
        classes=manifest.classes,
        widths=_joined(columns["width"]),
        heights=_joined(columns["height"]),
        lengths=_joined(columns["length"]),
        label_counts={named[label]: count for label, count in labels.most_common()},
        policies=dict(policies.most_common()),
        refusals=_refusals(manifest, splits),
        near_duplicates=near_duplicates,
        copies=copy_facts(copies.copies, manifest.stored_samples, classes=manifest.classes),
        contradictions=contradiction_facts(copies.contradictions, manifest.stored_samples, classes=manifest.classes),
        shown=tuple(_shown(manifest, key_of[row["shard"]], row, named) for _, _, row in lowest),
    )


def search_near_duplicates(manifest: Manifest) -> NearDuplicates:
    """Search a finished dataset for near duplicates across splits, as the shard step does."""
    shards: list[ShardRow] = manifest.all_shards().to_pylist()
    search = NearDuplicateSearch()
    for shard in shards:
        search.add(shard["shard"], shard["split"], manifest.stored_samples(shard["shard"]))
    keys = {shard["shard"]: shard["key"] for shard in shards}
    return search.find(StoredImages(manifest.root, keys, manifest.stored_samples))


def leaks(manifest: Manifest) -> tuple[NearPair, ...]:
    """Return every near-duplicate pair across splits by its sources, exact copies among them."""
    found = search_near_duplicates(manifest)
    return named_pairs(found.pairs, manifest.stored_samples, classes=manifest.classes)


def _summary(manifest: Manifest, split: str, shards: Sequence[ShardRow], classes: int) -> SplitSummary:
    sizes = [shard["bytes"] for shard in shards if shard["split"] == split]
    return SplitSummary(split, manifest.counts.splits[split], len(sizes), sum(sizes), classes)


def _refusals(manifest: Manifest, splits: Sequence[str]) -> tuple[Refusals, ...]:
    by_reason: dict[str, list[QuarantineRow]] = {}
    rows: list[QuarantineRow] = manifest.quarantine().to_pylist()
    for row in rows:
        if row["split"] in splits:
            by_reason.setdefault(row["reason"], []).append(row)
    found = (
        Refusals(reason, len(refused), tuple((row["source"], row["detail"]) for row in refused[:_EXAMPLES]))
        for reason, refused in by_reason.items()
    )
    # by name among equals, so that the table is the same in every run
    return tuple(sorted(found, key=lambda refusals: (-refusals.count, refusals.reason)))


def _shown(manifest: Manifest, key: str, row: SampleRow, named: Mapping[int, str]) -> ShownImage:
    image, trouble = None, ""
    try:
        store, name = locate_shard(manifest.root, key)
        data = store.read_range(name, row["offset"], row["length"])
        if zlib.crc32(data) != row["crc32"]:
            raise DataError("its bytes are not those that were written")
        image = decode(data)
    except (DataError, StorageError) as error:
        trouble = str(error)
    return ShownImage(
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
