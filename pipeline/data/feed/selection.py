"""Which served samples of a split are used, shard by shard: all, or a class-balanced few.

Letters: S shards of the split, in the manifest's order; n samples of one shard, in offset order.
The order is computed from `counts`, the loader reads `rows`; both speak of shards by their index 0..S-1.
Errors: DataError when the split has no such samples, ConfigError for a count that cannot be chosen."""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.manifest import NO_LABEL, Manifest, shard_address
from pipeline.data.feed.order import Slots
from pipeline.errors import ConfigError, DataError

Int64s = npt.NDArray[np.int64]
_ROWS_HELD = 1024
"""Shards whose rows stay in memory: more than one rank reads at once with 64 lanes of 8 shards; 50 MB at 1,200 rows each."""


class Shard(NamedTuple):
    """One tar of the split."""

    shard: int  # number in the manifest
    key: str
    bytes: int
    sha256: str


class Rows(NamedTuple):
    """The selected samples of a shard, by offset."""

    sample_ids: Int64s  # [n]
    labels: Int64s  # [n] index into the manifest's classes; NO_LABEL = none
    offsets: Int64s  # [n] bytes
    lengths: Int64s  # [n] bytes
    crc32s: Int64s  # [n]


class Selection:
    """Samples of one split. Threads may share it."""

    def __init__(self, manifest: Manifest, split: str, chosen: tuple[Int64s, ...] | None = None) -> None:
        """`chosen`: for each shard, row numbers among its served samples; None takes all."""
        table = manifest.shards(split)
        self.manifest, self.split, self._chosen = manifest, split, chosen
        columns = (table.column(name).to_pylist() for name in Shard._fields)
        self.shards = tuple(Shard(*row) for row in zip(*columns, strict=True))
        served = table.column("served").to_numpy().astype(np.int64)
        self.counts: Int64s = served if chosen is None else np.array([len(rows) for rows in chosen], dtype=np.int64)
        """[S] selected samples of each shard."""
        self.rows = lru_cache(maxsize=_ROWS_HELD)(self._read_rows)
        """Shard index -> Rows."""

    @classmethod
    def all(cls, manifest: Manifest, split: str) -> "Selection":
        """Every served sample."""
        return cls(manifest, split)

    @classmethod
    def balanced(cls, manifest: Manifest, split: str, *, count: int, seed: int) -> "Selection":
        """`count` labelled samples, as evenly over the classes as they allow; a smaller count is part of a larger one."""
        everything = cls(manifest, split)
        rows = [everything._read_rows(index) for index in range(len(everything.shards))]
        labels = np.concatenate([part.labels for part in rows]) if rows else np.empty(0, np.int64)
        ids = np.concatenate([part.sample_ids for part in rows]) if rows else labels
        labelled = int((labels != NO_LABEL).sum())
        if not 0 < count <= labelled:
            raise ConfigError(
                f"count={count} samples cannot be chosen from split {split!r} of {manifest.root.uri}: it has {labelled} with "
                f"a label; write 1 to {labelled}"
            )
        taken = np.zeros(len(ids), dtype=bool)
        taken[balanced_sequence(ids, labels, seed)[:count]] = True
        per_shard = np.split(taken, np.cumsum(everything.counts)[:-1])
        return cls(manifest, split, tuple(np.flatnonzero(part) for part in per_shard))

    def sample_ids(self, slots: Slots) -> Int64s:
        """[n] ids of the samples at slots."""
        ids = np.empty_like(slots.indices)
        for shard in np.unique(slots.shards):
            here = slots.shards == shard
            ids[here] = self.rows(int(shard)).sample_ids[slots.indices[here]]
        return ids

    def source(self, shard: int, index: int) -> str:
        """Where a sample came from, relative to the source."""
        return str(self._sample(shard, index)["source"])

    def describe(self, shard: int, index: int) -> str:
        """One sample in words, for messages."""
        sample = self._sample(shard, index)
        return (
            f"{shard_address(self.manifest.root, self.shards[shard].key)}: sample {sample['key']} (id {sample['sample_id']}, "
            f"from {sample['source']}, {sample['length']} bytes at {sample['offset']})"
        )

    def _sample(self, shard: int, index: int) -> dict[str, Any]:
        """A sample's whole row."""
        row = int(self._chosen[shard][index]) if self._chosen is not None else index
        sample: dict[str, Any] = self.manifest.samples(self.shards[shard].shard).slice(row, 1).to_pylist()[0]
        return sample

    def _read_rows(self, shard: int) -> Rows:
        table = self.manifest.samples(self.shards[shard].shard)
        names = ("sample_id", "label", "offset", "length", "crc32")
        rows = Rows(*(table.column(name).to_numpy().astype(np.int64) for name in names))
        if self._chosen is not None:
            rows = Rows(*(column[self._chosen[shard]] for column in rows))
        if len(rows.sample_ids) != self.counts[shard]:
            raise DataError(
                f"{shard_address(self.manifest.root, self.shards[shard].key)}: samples.parquet serves {len(rows.sample_ids)} of "
                f"it, shards.parquet {self.counts[shard]}. The files are of different runs; run the shard step again"
            )
        return rows


def balanced_sequence(sample_ids: Int64s, labels: Int64s, seed: int) -> Int64s:
    """Indices of the labelled samples in the order in which a balanced choice takes them: a round takes one of each class.

    Within a class and within a round the order is a keyed hash, of the sample's id and of the label.
    """
    labelled = np.flatnonzero(labels != NO_LABEL)
    priority = hash64(sample_ids[labelled], key64("subset/sample", seed))
    by_class = labelled[np.lexsort((priority, labels[labelled]))]
    sorted_labels = labels[by_class]
    turn = np.arange(len(by_class)) - np.searchsorted(sorted_labels, sorted_labels)  # 0 for each class's first, ...
    sequence: Int64s = by_class[np.lexsort((hash64(sorted_labels, key64("subset/class", seed)), turn))]
    return sequence


Samples = int | Literal["all", "labelled"]
"""Which samples of a split: all, those with a label, or so many of these, equally many of each class."""


def select(manifest: Manifest, split: str, samples: Samples, *, seed: int) -> Selection:
    """Opens the choice."""
    everything = Selection.all(manifest, split)
    if samples == "all":
        return everything
    if samples == "labelled":
        labels = [everything.rows(shard).labels for shard in range(len(everything.shards))]
        return Selection(manifest, split, tuple(np.flatnonzero(of_shard != NO_LABEL) for of_shard in labels))
    return Selection.balanced(manifest, split, count=samples, seed=seed)
