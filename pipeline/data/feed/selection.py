"""Which served samples of a split are used, shard by shard: all, those with a label, or a class-balanced subset.

Letters: S shards of the split, in the manifest's order; n samples of one shard, in offset order.
The order is computed from `counts`, the loader reads `rows`; both refer to shards by their index 0..S-1.
Errors: DataError if the manifest's tables disagree, ConfigError for a count that cannot be chosen."""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.address import shard_address
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.dataset.schema import NO_LABEL, SampleRow
from pipeline.data.feed.order import Slots
from pipeline.errors import ConfigError, DataError

Int64s = npt.NDArray[np.int64]
Samples = int | Literal["all", "labelled"]
"""Which samples of a split: all, those with a label, or this number of them, equally many per class."""
Part = Literal["whole", "kept", "held_out"]
"""A part of the chosen samples: all of them, or those outside or inside a tenth of the labelled samples of each class."""
_ROWS_HELD = 1024
"""Shards whose rows stay in memory: more than a rank reads at a time with 64 lanes of 8 shards; 50 MB at 1,200 rows each."""


class Shard(NamedTuple):
    """One tar of the split."""

    shard: int  # number in the manifest
    key: str
    bytes: int
    sha256: str


class Rows(NamedTuple):
    """The selected samples of a shard, by offset, as columns."""

    sample_ids: Int64s  # [n]
    labels: Int64s  # [n] index into the manifest's classes, or NO_LABEL
    offsets: Int64s  # [n] bytes
    lengths: Int64s  # [n] bytes
    crc32s: Int64s  # [n]


class Selection:
    """The selected samples of one split. Threads may share it."""

    def __init__(self, manifest: Manifest, split: str, chosen: tuple[Int64s, ...] | None = None) -> None:
        """`chosen`: for each shard, row numbers among its served samples; None selects all."""
        table = manifest.shards(split)
        self.manifest, self.split, self._chosen = manifest, split, chosen
        columns = (table.column(name).to_pylist() for name in Shard._fields)
        self.shards = tuple(Shard(*row) for row in zip(*columns, strict=True))
        served = table.column("served").to_numpy().astype(np.int64)
        self.counts: Int64s = served if chosen is None else np.array([len(rows) for rows in chosen], dtype=np.int64)
        """[S] number of selected samples of each shard."""
        # a cache per object, not on the method: a cache of the class would keep every selection alive
        self.rows = lru_cache(maxsize=_ROWS_HELD)(self._read_rows)
        """Shard index -> Rows."""

    @classmethod
    def all(cls, manifest: Manifest, split: str) -> "Selection":
        """Select every served sample."""
        return cls(manifest, split)

    @classmethod
    def balanced(cls, manifest: Manifest, split: str, *, count: int, seed: int) -> "Selection":
        """Select `count` labelled samples, as evenly over the classes as possible. A smaller selection is part of a larger one."""
        everything = cls(manifest, split)
        rows = [everything._read_rows(index) for index in range(len(everything.shards))]
        labels = np.concatenate([part.labels for part in rows]) if rows else np.empty(0, np.int64)
        ids = np.concatenate([part.sample_ids for part in rows]) if rows else labels
        labelled = int((labels != NO_LABEL).sum())
        if not 0 < count <= labelled:
            raise ConfigError(
                f"count={count} samples cannot be chosen from split {split!r} of {manifest.root.uri}: it has {labelled} with "
                f"a label. Write 1 to {labelled}"
            )
        selected = np.zeros(len(ids), dtype=bool)
        selected[balanced_sequence(ids, labels, seed)[:count]] = True
        # cut points between the shards: the end of the last one is none
        per_shard = np.split(selected, np.cumsum(everything.counts)[:-1])
        return cls(manifest, split, tuple(np.flatnonzero(part) for part in per_shard))

    @classmethod
    def drawn(
        cls, manifest: Manifest, split: str, *, count: int, seed: int, by: Literal["samples", "shards"] = "samples"
    ) -> "Selection":
        """Select `count` samples, labelled or not, or all if there are fewer. A smaller selection is part of a larger one.

        Samples are drawn one by one from all shards, or shard by shard: a remote shard is fetched whole, so that few are used."""
        everything = cls(manifest, split)
        if count >= everything.counts.sum():
            return everything
        if by == "shards":
            return cls(manifest, split, _first_of_shards(everything.counts, count, seed))
        ids = np.concatenate([everything._read_rows(index).sample_ids for index in range(len(everything.shards))])
        selected = np.zeros(len(ids), dtype=bool)
        selected[np.argsort(hash64(ids, key64("subset/drawn", seed)), kind="stable")[:count]] = True
        per_shard = np.split(selected, np.cumsum(everything.counts)[:-1])
        return cls(manifest, split, tuple(np.flatnonzero(part) for part in per_shard))

    def part(self, *, held_out: bool, seed: int) -> "Selection":
        """Select a tenth of the labelled samples of each class, rounded to the nearest whole number, or all others."""
        rows = [self.rows(index) for index in range(len(self.shards))]
        ids, labels = (np.concatenate([part[column] for part in rows]) for column in (0, 1))
        by_class, turns = _turns(ids, labels, seed)
        chosen = np.zeros(len(ids), dtype=bool)
        chosen[by_class[turns % 10 == 4]] = True  # the fifth of ten, so that a class of four loses none
        per_shard = np.split(chosen if held_out else ~chosen, np.cumsum(self.counts)[:-1])
        own = self._chosen or tuple(np.arange(count) for count in self.counts)
        return Selection(self.manifest, self.split, tuple(of[part] for of, part in zip(own, per_shard, strict=True)))

    def rows_at(self, slots: Slots) -> Rows:
        """Return [n] rows, those of the samples at these slots."""
        columns = np.empty((len(Rows._fields), len(slots.indices)), dtype=np.int64)
        for shard in np.unique(slots.shards):
            here = slots.shards == shard
            columns[:, here] = [column[slots.indices[here]] for column in self.rows(int(shard))]
        return Rows(*columns)

    def sample_ids(self, slots: Slots) -> Int64s:
        """Return [n] ids of the samples at these slots."""
        return self.rows_at(slots).sample_ids

    def source(self, shard: int, index: int) -> str:
        """Return the path that a sample came from, relative to the source."""
        return self._sample(shard, index)["source"]

    def describe(self, shard: int, index: int) -> str:
        """Describe a sample for messages."""
        sample = self._sample(shard, index)
        return (
            f"{shard_address(self.manifest.root, self.shards[shard].key)}: sample {sample['key']} (id {sample['sample_id']}, "
            f"from {sample['source']}, {sample['length']} bytes at {sample['offset']})"
        )

    def _sample(self, shard: int, index: int) -> SampleRow:
        row = int(self._chosen[shard][index]) if self._chosen is not None else index
        sample: SampleRow = self.manifest.samples(self.shards[shard].shard).slice(row, 1).to_pylist()[0]
        return sample

    def _read_rows(self, shard: int) -> Rows:
        table = self.manifest.samples(self.shards[shard].shard)
        names = ("sample_id", "label", "offset", "length", "crc32")
        rows = Rows(*(table.column(name).to_numpy().astype(np.int64) for name in names))
        if self._chosen is not None:
            rows = Rows(*(column[self._chosen[shard]] for column in rows))
        if len(rows.sample_ids) != self.counts[shard]:
            raise DataError(
                f"{shard_address(self.manifest.root, self.shards[shard].key)}: samples.parquet serves {len(rows.sample_ids)} "
                f"samples of it, shards.parquet {self.counts[shard]}, so the files are of different runs. Run the shard step again"
            )
        return rows


def _first_of_shards(counts: Int64s, count: int, seed: int) -> tuple[Int64s, ...]:
    """Return the chosen rows of each shard: all of the first ones in a hashed order, since neighbours may be of one folder."""
    chosen, left = [np.empty(0, np.int64)] * len(counts), count
    for shard in np.argsort(hash64(np.arange(len(counts)), key64("milestone/shard", seed))):
        chosen[shard] = np.arange(min(left, counts[shard]))
        left -= len(chosen[shard])
    return tuple(chosen)


def balanced_sequence(sample_ids: Int64s, labels: Int64s, seed: int) -> Int64s:
    """Return indices of the labelled samples in the order of a balanced selection: each round takes one sample per class.

    Within a class the order is a keyed hash of the sample's id, within a round a keyed hash of the label.
    """
    by_class, turns = _turns(sample_ids, labels, seed)
    of_class = hash64(labels[by_class], key64("subset/class", seed))
    sequence: Int64s = by_class[np.lexsort((of_class, turns))]
    return sequence


def _turns(sample_ids: Int64s, labels: Int64s, seed: int) -> tuple[Int64s, Int64s]:
    """Return indices of the labelled samples by class, in the hashed order of each, and their places in it, from 0."""
    labelled = np.flatnonzero(labels != NO_LABEL)
    priority = hash64(sample_ids[labelled], key64("subset/sample", seed))
    by_class = labelled[np.lexsort((priority, labels[labelled]))]
    sorted_labels = labels[by_class]
    return by_class, np.arange(len(by_class)) - np.searchsorted(sorted_labels, sorted_labels)


def select(manifest: Manifest, split: str, samples: Samples, *, seed: int, part: Part = "whole") -> Selection:
    """Select samples of a split, and a part of them. `seed`: key of a balanced selection and of the parts."""
    everything = Selection.all(manifest, split)
    if samples == "all":
        chosen = everything
    elif samples == "labelled":
        labels = [everything.rows(shard).labels for shard in range(len(everything.shards))]
        chosen = Selection(manifest, split, tuple(np.flatnonzero(of_shard != NO_LABEL) for of_shard in labels))
    else:
        chosen = Selection.balanced(manifest, split, count=samples, seed=seed)
    return chosen if part == "whole" else chosen.part(held_out=part == "held_out", seed=seed)
