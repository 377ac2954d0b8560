"""Which sample is seen when: computed from shard sizes and a seed, at any world size and from any step on.

An epoch permutes the shards and concatenates their served samples into a line of N; the line is cut into L lanes whose
lengths differ by at most one; each lane is shuffled in windows of G consecutive shard pieces. Position p of the epoch is
sample p // L of lane p mod L. Epochs follow each other without loss: global position q is position q mod N of epoch q // N.
Step t consumes positions [tB, (t+1)B); sorted by lane, rank r of W takes the slice [rB//W, (r+1)B//W).
The trade-off: a full permutation of the samples would mix perfectly but touch every shard in every batch. Lanes and windows keep
a rank on few shards at a time, and mix across shards far better than a shuffle buffer of 1,000 samples
(`python -m benchmarks.order`).

Letters: N samples per epoch, S shards, L lanes, G shards per window, B global batch, W ranks; all arrays are int64 [n].
Cost:   memory O(S) per epoch in use, plus the permutations of the windows in use; about a microsecond per sample of a batch.
Errors: ConfigError for parameters that cannot work, DataError when nothing is served."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.randomness import hash64, permutation
from pipeline.errors import ConfigError, DataError

Int64s = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Raise it by hand when positions come to mean other samples. Cursors are bound to it."""


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """What the order depends on besides the shards."""

    seed: int
    """Seed of the shuffles."""
    lanes: int = 64
    """Positions at which an epoch is read in parallel: more lanes mix better, fewer keep a rank on fewer shards."""
    window_shards: int = 8
    """Shards of a lane whose samples are mixed with each other."""

    def __post_init__(self) -> None:
        for field in ("lanes", "window_shards"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} is not positive: write 1 or more")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} does not fit in 64 bits: write a smaller number")


class Slots(NamedTuple):
    """Samples to read, one per row."""

    positions: Int64s  # [n] global positions
    epochs: Int64s  # [n] the epoch each belongs to
    lanes: Int64s  # [n]
    shards: Int64s  # [n] index into served_counts
    indices: Int64s  # [n] index among the served samples of that shard


class _EpochLine(NamedTuple):
    """One epoch's shards, end to end, without the empty ones."""

    shards: Int64s  # [S] index into served_counts
    starts: Int64s  # [S] first position of the shard on the line
    ends: Int64s  # [S] one past its last
    lane_first: Int64s  # [L] index of the shard in which each lane begins


class SampleOrder:
    """The order of all epochs of a set of shards."""

    def __init__(self, served_counts: npt.ArrayLike, config: OrderConfig) -> None:
        self.served_counts: Int64s = np.asarray(served_counts, dtype=np.int64)
        self.config = config
        self.samples_per_epoch = int(self.served_counts.sum())
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{self.served_counts.size} shards serve no sample: write the shards again or take another split"
            )
        bounds = np.arange(config.lanes + 1)
        shortest, longer = divmod(self.samples_per_epoch, config.lanes)
        # [L + 1] lane j is line[bounds[j]:bounds[j + 1]]
        self._lane_bounds = bounds * shortest + np.minimum(bounds, longer)
        # a batch may straddle two epochs, and each lane two windows while it passes from one to the next
        self._line = lru_cache(maxsize=4)(self._make_line)
        self._shuffle = lru_cache(maxsize=2 * config.lanes + 2)(self._make_shuffle)

    def parameters(self) -> dict[str, int]:
        """Return what a cursor is bound to, besides the manifest's digest."""
        return {
            "version": ORDER_VERSION,
            "seed": self.config.seed,
            "lanes": self.config.lanes,
            "window_shards": self.config.window_shards,
            "samples": self.samples_per_epoch,
        }

    def global_batch(self, step: int, global_batch: int) -> Slots:
        """Return the B samples of a step, lane by lane."""
        return self.rank_slice(step, global_batch, 0, 1)

    def rank_slice(self, step: int, global_batch: int, rank: int, world_size: int, *, together: int = 1) -> Slots:
        """Return one rank's part of the step's batch. Together the ranks have each sample once, at any world size.

        `together`: how many neighbours of the batch no boundary between ranks may part; it divides the batch.
        """
        positions = np.arange(step * global_batch, (step + 1) * global_batch)
        # sorted by lane, so that a rank's slice touches few lanes and therefore few shards
        by_lane = np.argsort(positions % self.samples_per_epoch % self.config.lanes, kind="stable")
        part = plain_slice(global_batch // together, rank, world_size)
        return self.locate(positions[by_lane[part.start * together : part.stop * together]])

    def locate(self, positions: Int64s) -> Slots:
        """Return the samples at global positions, in the given order."""
        epochs, within = np.divmod(positions, self.samples_per_epoch)
        offsets, lanes = np.divmod(within, self.config.lanes)
        on_line = self._lane_bounds[lanes] + offsets
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], indices[chosen] = self._locate_on_line(int(epoch), lanes[chosen], on_line[chosen])
        return Slots(positions, epochs, lanes, shards, indices)

    def _locate_on_line(self, epoch: int, lanes: Int64s, on_line: Int64s) -> tuple[Int64s, Int64s]:
        line = self._line(epoch)
        pieces = np.searchsorted(line.ends, on_line, side="right")
        windows = (pieces - line.lane_first[lanes]) // self.config.window_shards
        # positions of one window are handled together, so that each permutation is needed once
        group = lanes * (len(line.shards) + 1) + windows
        by_group = np.argsort(group, kind="stable")
        shuffled = np.empty_like(on_line)
        for chosen in np.split(by_group, np.flatnonzero(np.diff(group[by_group])) + 1):
            lane, window = int(lanes[chosen[0]]), int(windows[chosen[0]])
            first = line.lane_first[lane] + window * self.config.window_shards
            last = min(first + self.config.window_shards, len(line.shards)) - 1
            # a lane may begin and end inside a shard: the shuffle must stay within the lane
            begin = max(self._lane_bounds[lane], line.starts[first])
            end = min(self._lane_bounds[lane + 1], line.ends[last])
            shuffled[chosen] = begin + self._shuffle(epoch, lane, window, int(end - begin))[on_line[chosen] - begin]
        pieces = np.searchsorted(line.ends, shuffled, side="right")
        return line.shards[pieces], shuffled - line.starts[pieces]

    def _make_line(self, epoch: int) -> _EpochLine:
        served = np.flatnonzero(self.served_counts)
        shards = served[permutation(len(served), "order/shards", self.config.seed, epoch)]
        counts = self.served_counts[shards]
        ends = np.cumsum(counts)
        # right: a lane that begins exactly where a shard ends begins in the next one
        return _EpochLine(shards, ends - counts, ends, np.searchsorted(ends, self._lane_bounds[:-1], side="right"))

    def _make_shuffle(self, epoch: int, lane: int, window: int, size: int) -> npt.NDArray[np.uint32]:
        # half the memory of int64; a window holds far fewer than 2**32 samples
        return permutation(size, "order/window", self.config.seed, epoch, lane, window).astype(np.uint32)


def steps_total(samples_per_epoch: int, global_batch: int, epochs: int) -> int:
    """Return the steps that consume at least `epochs` epochs. The last batch is full and may reach into the next epoch."""
    return -(-samples_per_epoch * epochs // global_batch)


def plain_slice(total: int, rank: int, world_size: int) -> range:
    """Return a rank's contiguous part of 0..total-1: each number once over all ranks, without padding, sizes within one."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} of world_size={world_size}: ranks go from 0 to world_size - 1")
    return range(rank * total // world_size, (rank + 1) * total // world_size)


def plain_slots(served_counts: Int64s, positions: Int64s) -> Slots:
    """Return the samples at positions of the unshuffled line, shard after shard: the order of evaluation."""
    ends = np.cumsum(served_counts)
    shards = np.searchsorted(ends, positions, side="right")
    zeros = np.zeros_like(positions)
    return Slots(positions, zeros, zeros, shards, positions - (ends - served_counts)[shards])


def ids_digest(epochs: Int64s, sample_ids: Int64s) -> int:
    """Return the sum modulo 2**64 of a hash of each (epoch, id): independent of the order, and additive over ranks and steps.

    A sum rather than an xor, so that a sample seen twice does not cancel itself.
    """
    return int(hash64(sample_ids, hash64(epochs, 0)).sum(dtype=np.uint64))
