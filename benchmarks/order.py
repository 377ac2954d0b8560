"""The order of samples: its cost at 1e9 samples, and how well it mixes compared with a permutation and a shuffle buffer.

    python -m benchmarks.order
    python -m benchmarks.order --quick

Cost: by default, 1e9 samples in 1e6 shards and a global batch of 4,096. A cold seek is everything that a
restart pays, from the sizes of the shards to the first batch of a step in the middle; measured for all 4,096
positions in one process, and for one rank of 4,096.
Mixing: 1.28 million samples in 1,280 shards and batches of 4,096, compared with a uniform permutation and with
shuffled shards plus webdataset's buffer of 1,000 in 8 ranks of 8 workers. "Shards in a batch" counts the
different ones. "Class error" is how far a batch's shares of 100 classes are from 1 % each (total variation) if
the shards had been written class by class. The shard step avoids this: it assigns samples at random.

Units:  wall-clock milliseconds: the median of several seeks, and of the mean step after each; shares. step_ms,
        cold_seek_ms: all positions of the global batch. shards_per_batch_share_of_uniform: ours / the
        permutation's. Mixing is a mean over the batches of an epoch; for ours and the permutation, whose
        batches are alike, over a sample of them.
Errors: ConfigError for impossible counts."""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import _data
from benchmarks import _timing as timing
from benchmarks._peers import installed
from pipeline.data.feed.order import OrderConfig, SampleOrder

_BUFFER, _NODES, _WORKERS = 1000, 8, 8
_CLASSES = 100

Int64s = npt.NDArray[np.int64]
"""A batch as sample numbers; the shard of a sample is its number // samples per shard."""


class Cost(NamedTuple):
    """Milliseconds."""

    seek: float
    step: float


class Mixing(NamedTuple):
    """Means over batches."""

    shards: float
    class_error: float


def cost(counts: Int64s, *, batch: int, rank: int, ranks: int, seeks: int, steps: int) -> Cost:
    """Measure one rank's part of the global batch."""
    middle = int(counts.sum()) // batch // 2
    seek_seconds, step_seconds = [], []
    for number in range(seeks):
        began = time.perf_counter()
        order = SampleOrder(counts, OrderConfig(seed=number))
        order.rank_slice(middle, batch, rank, ranks)
        seek_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for step in range(middle + 1, middle + 1 + steps):
            order.rank_slice(step, batch, rank, ranks)
        step_seconds.append((time.perf_counter() - began) / steps)
    return Cost(1e3 * median(seek_seconds), 1e3 * median(step_seconds))


def ours(shards: int, per_shard: int, batch: int, *, window_shards: int, lanes: int = 64) -> Iterator[Int64s]:
    """Yield batches of our order, spread over an epoch."""
    config = OrderConfig(seed=0, lanes=lanes, window_shards=window_shards)
    order = SampleOrder(np.full(shards, per_shard), config)
    steps = shards * per_shard // batch
    for step in range(0, steps, max(1, steps // 64)):
        slots = order.global_batch(step, batch)
        yield slots.shards * per_shard + slots.indices


def uniform(shards: int, per_shard: int, batch: int) -> Iterator[Int64s]:
    """Yield the first 64 batches of a uniform permutation."""
    rng = np.random.default_rng(0)
    samples = shards * per_shard
    yield from rng.permutation(samples)[: samples // batch * batch].reshape(-1, batch)[:64]


def shard_shuffle_and_buffer(shards: int, per_shard: int, batch: int) -> Iterator[Int64s]:
    """Yield global batches of 8 ranks of 8 workers, each with its own shards and webdataset's buffer.

    As in torch's DataLoader, a rank's batch comes from one worker, and the workers take turns.
    """
    from webdataset.filters import shuffle

    rng = np.random.default_rng(0)
    own = np.array_split(rng.permutation(shards), _NODES * _WORKERS)

    def stream(worker: int) -> Iterator[int]:
        samples = (int(shard) * per_shard + index for shard in own[worker] for index in range(per_shard))
        shuffled: Iterator[int] = shuffle(_BUFFER, rng=random.Random(worker))(samples)
        return shuffled

    streams = [[stream(rank * _WORKERS + worker) for worker in range(_WORKERS)] for rank in range(_NODES)]
    for turn in range(_WORKERS * (min(map(len, own)) * per_shard // (batch // _NODES))):
        taken = [list(islice(of_rank[turn % _WORKERS], batch // _NODES)) for of_rank in streams]
        yield np.array([sample for part in taken for sample in part])


def mixing(batches: Iterator[Int64s], *, shards: int, per_shard: int) -> Mixing:
    """Return the mean number of shards per batch and the mean class error."""
    distinct, errors = [], []
    for batch in batches:
        distinct.append(len(np.unique(batch // per_shard)))
        classes = batch * _CLASSES // (shards * per_shard)  # as if written class by class
        shares = np.bincount(classes, minlength=_CLASSES) / len(batch)
        errors.append(0.5 * np.abs(shares - 1 / _CLASSES).sum())
    return Mixing(float(np.mean(distinct)), float(np.mean(errors)))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the tables and return the JSON line."""
    batch, ranks = options.batch, options.batch
    counts = np.full(options.shards, options.samples // options.shards)
    seeks, steps = (3, 50) if options.quick else (7, 200)
    everything = cost(counts, batch=batch, rank=0, ranks=1, seeks=seeks, steps=steps)
    one_rank = cost(counts, batch=batch, rank=ranks // 2, ranks=ranks, seeks=seeks, steps=steps)
    print(f"{counts.sum():,} samples in {len(counts):,} shards, global batch {batch:,}, 64 lanes of 8 shards")
    print(
        timing.table(
            ("", "cold seek", "a step"),
            [
                (name, f"{found.seek:.1f} ms", f"{found.step:.3f} ms")
                for name, found in (("all positions of the batch", everything), (f"one rank of {ranks:,}", one_rank))
            ],
        )
    )

    shards, per_shard = options.mixing_shards, 1000
    sizes = (shards, per_shard, batch)
    ways: dict[str, Iterator[Int64s]] = {
        "uniform permutation": uniform(*sizes),
        "ours, 64 lanes of 8 shards (default)": ours(*sizes, window_shards=8),
        "ours, 64 lanes of 20 shards": ours(*sizes, window_shards=20),
    }
    if installed("webdataset"):
        ways["shuffled shards, buffer of 1,000"] = shard_shuffle_and_buffer(*sizes)
    mixed = {name: mixing(batches, shards=shards, per_shard=per_shard) for name, batches in ways.items()}
    best = mixed["uniform permutation"].shards
    print(f"\n{shards * per_shard:,} samples in {shards:,} shards, batches of {batch:,}")
    print(
        timing.table(
            ("", "shards in a batch", "of uniform", "class error, sorted shards"),
            [
                (name, f"{found.shards:.0f}", f"{100 * found.shards / best:.1f} %", f"{found.class_error:.2f}")
                for name, found in mixed.items()
            ],
        )
    )
    default = mixed["ours, 64 lanes of 8 shards (default)"]
    buffer = mixed.get("shuffled shards, buffer of 1,000")
    return {
        "benchmark": "order",
        "cold_seek_ms": round(everything.seek, 2),
        "step_ms": round(everything.step, 4),
        "shards_per_batch_share_of_uniform": round(default.shards / best, 4),
        "rank_cold_seek_ms": round(one_rank.seek, 2),
        "rank_step_ms": round(one_rank.step, 4),
        "buffer_shards_per_batch_share_of_uniform": None if buffer is None else round(buffer.shards / best, 4),
        "class_error": {name: round(found.class_error, 3) for name, found in mixed.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("order", "The order of samples: cost and mixing. No images are read.")
    parser.add_argument("--samples", type=int, default=10**9, help="samples per epoch, for the cost")
    parser.add_argument("--shards", type=int, default=10**6, help="shards that hold them")
    parser.add_argument("--batch", type=int, default=4096, help="global batch, and number of ranks")
    parser.add_argument("--mixing-shards", type=int, default=1280, help="shards of 1,000 samples, for the mixing")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
