"""Listing and planning hold batches and row numbers rather than paths, as docs/data.md says for 10 million images."""

import tracemalloc

import pyarrow as pa
import pytest
from data_kit import listed

from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sharding.shard_plan import open_snapshot, plan_shards
from pipeline.data.snapshots import writer
from pipeline.data.sources.listing import SourceItem


@pytest.fixture
def listed_of(tmp_path, monkeypatch):
    """Return a function that lists `count` synthetic images, in batches of 2,000."""
    monkeypatch.setattr(writer, "BATCH_ROWS", 2_000)

    def made(count):
        def entries(uri, *, besides):
            for number in range(count):
                yield SourceItem(f"train/n{number // 1000:08d}/n{number:012d}.JPEG", 100_000 + number % 777, "image")

        monkeypatch.setattr(writer, "list_source", entries)
        return listed("/synthetic", tmp_path / str(count))

    return made


def peak(function):
    """Return the peak MiB that Python with numpy, and Arrow, held in addition to what they held before."""
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1] / 2**20, (pool.bytes_allocated() - before) / 2**20
    finally:
        tracemalloc.stop()


def test_a_listing_is_never_held_whole(listed_of):
    listed_of(1000)  # imports at first use
    few, many = (peak(lambda count=count: listed_of(count))[0] for count in (10_000, 80_000))
    assert many < 1.5 * few  # 80,000 paths alone are 6 MiB; a batch and its tables are 4


def test_a_plan_holds_numbers_and_not_paths(listed_of):
    count = 200_000
    listing = listed_of(count)
    held = []

    def planned():
        with open_snapshot(listing.store) as table:
            plans = plan_shards(table, seed=0, shard_max_bytes=2**27, min_shards=16, policy=IntakePolicy())
            held.append((len(plans), plans[0].samples.num_rows))

    python, arrow = peak(planned)
    ((shards, samples),) = held
    assert shards * samples == pytest.approx(count, rel=0.1)
    assert python * 2**20 / count < 90  # bytes per sample; as Python strings, the paths alone would take 90 more
    assert arrow < 8  # the table is mapped from disk
