"""How the data arrived: waits, cache hits, network traffic, substitutions and coverage, from counters that only grow.

Each worker has its own counters. A row covers all workers, summed in one reduction, so it costs one collective per logged step
and none in between. Units: seconds, bytes; shares in [0, 1]."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.data.feed.step_feed import Feed
from pipeline.data.feed.substitution import Substitution
from pipeline.training.world import World

DATA_METRICS = {
    "data_wait": "throughput/data_wait_share",  # share of the time since the last row, mean over workers
    "data_wait_seconds": "data/wait_seconds",  # per step, mean over workers
    "cache_hits": "data/cache_hit_share",  # reads that found their shard on disk, since this attempt began; remote stores only
    "shard_fetches": "data/shard_fetches_per_epoch",  # per shard and node, since this attempt began; 1.0 means once each
    "requests": "data/requests",  # HTTP requests since the last row, all workers; those for checkpoints are included
    "bytes_received": "data/bytes_received",  # since the last row, all workers
    "retries": "data/retries",  # since the last row, all workers
    "decode_restarts": "data/decode_restarts",  # since this attempt began, all workers: decode workers that were replaced
    "substitutions": "data/substitutions",  # since the first step
    "epoch_coverage": "data/epoch_coverage",  # share of the current epoch's samples that have reached a device
}
"""Names in the history and in MLflow."""


class Counters(NamedTuple):
    """Totals of one worker since it started."""

    wait_seconds: float
    hits: float
    misses: float
    downloads: float
    requests: float
    bytes_received: float
    retries: float
    restarts: float

    def since(self, before: "Counters") -> "Counters":
        """Return the growth since an earlier reading."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


def read_counters(feed: Feed[Any]) -> Counters:
    """Read this worker's counters."""
    loader = feed.loader
    cache, traffic = loader.cache.counts, loader.cache.store.traffic
    return Counters(feed.wait_seconds, cache.hits, cache.misses, cache.downloads, *traffic, loader.restarts)


class DataMeter:
    """Computes the data columns of an attempt's rows."""

    def __init__(self, feed: Feed[Any]) -> None:
        self.feed = feed
        self.first = self.last = read_counters(feed)
        self.images = 0  # since this attempt began

    def row(
        self,
        world: World,
        *,
        elapsed: float,
        steps: int,
        images: int,
        new_images: int,
        substitutions: Sequence[Substitution],
        skipped_images: Sequence[tuple[int, int]] = (),
    ) -> dict[str, float]:
        """Return the numbers since the last row, which was `elapsed` seconds, `steps` and `new_images` ago. Collective.

        `images` counts from the first step of the training; `skipped_images` are ranges of them, [first, one past the last),
        that were skipped and never reached a device.
        """
        now = read_counters(self.feed)
        sums = world.total([*now.since(self.last), *now.since(self.first), 1 / world.local_size])
        self.last, self.images = now, self.images + new_images
        # Each worker adds one over the number of workers on its node, so the last sum is the number of nodes.
        length = len(Counters._fields)
        grown, whole, nodes = Counters(*sums[:length]), Counters(*sums[length:-1]), sums[-1]
        loader = self.feed.loader
        samples, shards = loader.order.samples_per_epoch, len(loader.selection.shards)
        row = {
            "data_wait": grown.wait_seconds / world.size / elapsed,
            "data_wait_seconds": grown.wait_seconds / world.size / max(1, steps),
            "requests": grown.requests,
            "bytes_received": grown.bytes_received,
            "retries": grown.retries,
            "decode_restarts": whole.restarts,
            "substitutions": float(len(substitutions)),
            "epoch_coverage": epoch_coverage(images, samples, substitutions, skipped_images),
        }
        if reads := whole.hits + whole.misses:
            epochs = self.images / samples
            row["cache_hits"] = whole.hits / reads
            row["shard_fetches"] = fetches_per_epoch(whole.downloads, shards=shards, nodes=nodes, epochs=epochs)
        return row


def fetches_per_epoch(fetched: float, *, shards: int, nodes: float, epochs: float) -> float:
    """Return the mean number of fetches per shard, node and epoch.

    The first epoch counts as a whole one from its start, because fetching runs ahead of reading.
    """
    return fetched / (shards * nodes * max(1.0, epochs))


def epoch_coverage(
    images: int, samples: int, substitutions: Sequence[Substitution], skipped_images: Sequence[tuple[int, int]] = ()
) -> float:
    """Return the share of samples that have reached a device in the epoch that the newest image belongs to."""
    if not images:
        return 0.0
    epoch, index = divmod(images - 1, samples)
    lost = sum(one.epoch == epoch for one in substitutions)
    lost += sum(max(0, min(last, images) - max(first, epoch * samples)) for first, last in skipped_images)
    return (index + 1 - lost) / samples
