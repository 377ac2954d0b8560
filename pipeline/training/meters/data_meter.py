"""How the data came: waits, cache, network, substitutions, coverage, from counters that only grow.

Counters are of one worker; a row is of all, summed in one reduction, so it costs a collective at logged steps and none between.
Units: seconds, bytes; shares in [0, 1]."""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.data.feed.loader import Loader
from pipeline.data.feed.substitution import Substitution
from pipeline.training.world import World

DATA_METRICS = {
    "data_wait": "throughput/data_wait_share",  # of the time since the last row, mean over workers
    "data_wait_seconds": "data/wait_seconds",  # a step, mean over workers
    "cache_hits": "data/cache_hit_share",  # of reads since this attempt began: found their shard on the disk; for remote stores
    "shard_fetches": "data/shard_fetches_per_epoch",  # of a shard by a node, since this attempt began; 1.0 is each once
    "requests": "data/requests",  # HTTP, since the last row, all workers; checkpoints' own are among them
    "bytes_received": "data/bytes_received",  # likewise
    "retries": "data/retries",  # likewise
    "substitutions": "data/substitutions",  # since the first step
    "epoch_coverage": "data/epoch_coverage",  # share of the running epoch's samples that have reached a device
}
"""Names in the history and in MLflow."""


class Counters(NamedTuple):
    """What grew so far."""

    wait_seconds: float
    hits: float
    misses: float
    downloads: float
    requests: float
    bytes_received: float
    retries: float

    def since(self, before: "Counters") -> "Counters":
        """The growth."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))


def counters(loader: Loader) -> Counters:
    """This worker's."""
    cache, traffic = loader.cache.counts, loader.cache.store.traffic
    return Counters(loader.wait_seconds, cache.hits, cache.misses, cache.downloads, *traffic)


class DataMeter:
    """Rows of one attempt."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.first = self.last = counters(loader)
        self.images = 0  # of this attempt

    def row(
        self,
        world: World,
        *,
        elapsed: float,
        steps: int,
        images: int,
        images_here: int,
        substitutions: Sequence[Substitution],
        passed_over: Sequence[tuple[int, int]] = (),
    ) -> dict[str, float]:
        """The numbers since the last row (`elapsed` seconds, `steps`, `images_here`); `images`: since the first step,
        `passed_over`: those of them, from the first to one past the last, that never came.

        Collective: every worker calls it.
        """
        now = counters(self.loader)
        sums = world.total([*now.since(self.last), *now.since(self.first), 1 / world.local_size])
        self.last, self.images = now, self.images + images_here
        length = len(Counters._fields)
        grown, whole, nodes = Counters(*sums[:length]), Counters(*sums[length:-1]), sums[-1]
        samples, shards = self.loader.order.samples_per_epoch, len(self.loader.selection.shards)
        row = {
            "data_wait": grown.wait_seconds / world.size / elapsed,
            "data_wait_seconds": grown.wait_seconds / world.size / max(1, steps),
            "requests": grown.requests,
            "bytes_received": grown.bytes_received,
            "retries": grown.retries,
            "substitutions": float(len(substitutions)),
            "epoch_coverage": epoch_coverage(images, samples, substitutions, passed_over),
        }
        if reads := whole.hits + whole.misses:
            epochs = self.images / samples
            row["cache_hits"] = whole.hits / reads
            row["shard_fetches"] = fetches_per_epoch(whole.downloads, shards=shards, nodes=nodes, epochs=epochs)
        return row


def fetches_per_epoch(fetched: float, *, shards: int, nodes: float, epochs: float) -> float:
    """Mean fetches of a shard by a node in an epoch; the first epoch counts as whole: what is fetched ahead is for it."""
    return fetched / (shards * nodes * max(1.0, epochs))


def epoch_coverage(
    images: int, samples: int, substitutions: Sequence[Substitution], passed_over: Sequence[tuple[int, int]] = ()
) -> float:
    """Share of an epoch's samples that have reached a device, of the epoch that the newest image belongs to."""
    if not images:
        return 0.0
    epoch, place = divmod(images - 1, samples)
    lost = sum(one.epoch == epoch for one in substitutions)
    lost += sum(max(0, min(last, images) - max(first, epoch * samples)) for first, last in passed_over)
    return (place + 1 - lost) / samples
