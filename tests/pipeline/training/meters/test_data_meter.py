"""Rows about the data are sums over workers, and hold only what was measured."""

import pytest
import torch

from pipeline.data.feed.cache import CacheCounts
from pipeline.data.feed.substitution import Substitution
from pipeline.storage import Traffic
from pipeline.training.meters.data_meter import DATA_METRICS, Counters, DataMeter, epoch_coverage, fetches_per_epoch
from pipeline.training.world import World


class Together(World):
    """One of four workers on two nodes, all of which measured the same."""

    def total(self, values):
        return [4 * value for value in values]


class Part:
    """Anything with attributes."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def distant(**store):
    loader = Part(
        restarts=0,
        cache=Part(counts=CacheCounts(), store=Part(traffic=Traffic(0, 0, 0), **store)),
        order=Part(samples_per_epoch=1000),
        selection=Part(shards=[None] * 10),
    )
    return Part(wait_seconds=0.0, loader=loader)


def test_a_row_is_what_grew_since_the_last_one_over_all_workers():
    world = Together(0, 4, torch.device("cpu"), None, local_size=2)
    feed = distant()
    loader, meter = feed.loader, DataMeter(feed)
    rows = []
    for images in (500, 2000):
        feed.wait_seconds += 0.5
        loader.restarts += 1
        counts = loader.cache.counts
        loader.cache.counts = counts._replace(
            hits=counts.hits + 90, misses=counts.misses + 10, downloads=counts.downloads + 5
        )
        was = loader.cache.store.traffic
        loader.cache.store.traffic = Traffic(was.requests + 7, was.bytes_received + 1000, was.retries + 1)
        rows.append(
            meter.row(
                world,
                elapsed=2.0,
                steps=5,
                images=images,
                new_images=images if images == 500 else 1500,
                substitutions=[],
            )
        )
    assert rows[0].keys() == DATA_METRICS.keys()
    for row in rows:
        assert (row["data_wait"], row["data_wait_seconds"]) == (0.25, 0.1)
        assert row["cache_hits"] == pytest.approx(0.9)
        assert (row["requests"], row["bytes_received"], row["retries"]) == (28, 4000, 4)
    assert [row["decode_restarts"] for row in rows] == [4, 8]  # since the start
    # 20 fetches of 10 shards by 2 nodes in half an epoch, which counts whole; then 40 in two
    assert [row["shard_fetches"] for row in rows] == [1.0, 1.0]
    assert [row["epoch_coverage"] for row in rows] == [0.5, 1.0]


def test_with_shards_on_the_local_disk_there_are_no_cache_columns():
    world = Together(0, 4, torch.device("cpu"), None, local_size=2)
    row = DataMeter(distant()).row(world, elapsed=1.0, steps=1, images=10, new_images=10, substitutions=[])
    assert row.keys() == DATA_METRICS.keys() - {"cache_hits", "shard_fetches"}
    assert row["data_wait"] == 0.0


def test_counters_only_grow():
    assert Counters(3, 9, 1, 2, 5, 6, 7, 4).since(Counters(1, 2, 1, 2, 5, 3, 7, 1)) == Counters(2, 7, 0, 0, 0, 3, 0, 3)


def test_coverage_is_that_of_the_current_epoch_without_substituted_samples():
    lost = [Substitution(3, 4, epoch, 0, "crc32", "x") for epoch in (0, 1, 1)]
    assert [epoch_coverage(images, 100, []) for images in (0, 1, 99, 100, 101, 250)] == [0, 0.01, 0.99, 1.0, 0.01, 0.5]
    assert [epoch_coverage(images, 100, lost) for images in (100, 200, 300)] == [0.99, 0.98, 1.0]


def test_fetches_are_per_shard_node_and_epoch():
    assert fetches_per_epoch(48, shards=24, nodes=1, epochs=2.0) == 1.0
    assert fetches_per_epoch(48, shards=24, nodes=2, epochs=1.0) == 1.0
    assert fetches_per_epoch(12, shards=24, nodes=1, epochs=0.1) == 0.5
