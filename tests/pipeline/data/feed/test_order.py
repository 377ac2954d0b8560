"""Any world size and any start give the same samples, each once per epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.feed.order import OrderConfig, SampleOrder, ids_digest, plain_slice, plain_slots, steps_total
from pipeline.errors import ConfigError, DataError

counts_lists = st.lists(st.sampled_from([0, 0, 1, 1, 2, 7, 30, 400]), min_size=1, max_size=12).filter(any)
configs = st.builds(
    OrderConfig,
    seed=st.integers(-5, 5),
    lanes=st.sampled_from([1, 2, 3, 8, 64]),
    window_shards=st.sampled_from([1, 2, 8]),
)


def pairs(slots):
    return list(zip(slots.epochs.tolist(), slots.shards.tolist(), slots.indices.tolist(), strict=True))


@given(counts_lists, configs, st.integers(0, 3))
def test_an_epoch_has_each_sample_once(counts, config, epoch):
    order = SampleOrder(counts, config)
    total = order.samples_per_epoch
    slots = order.locate(np.arange(epoch * total, (epoch + 1) * total))
    assert sorted(pairs(slots)) == [(epoch, shard, k) for shard, count in enumerate(counts) for k in range(count)]


@given(counts_lists, configs, st.integers(1, 70), st.integers(0, 6), st.integers(1, 64))
def test_any_world_size_sees_the_same_batch(counts, config, batch, step, world_size):
    """Batches larger than an epoch are among these, and epochs smaller than the number of lanes."""
    order = SampleOrder(counts, config)
    whole = order.global_batch(step, batch)
    ranks = [SampleOrder(counts, config).rank_slice(step, batch, rank, world_size) for rank in range(world_size)]
    assert [pair for slots in ranks for pair in pairs(slots)] == pairs(whole)
    sizes = [len(slots.positions) for slots in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(whole.positions) == list(range(step * batch, (step + 1) * batch))
    assert (np.diff(whole.lanes) >= 0).all()


@settings(max_examples=30)
@given(counts_lists, configs, st.integers(1, 70), st.lists(st.integers(1, 64), min_size=8, max_size=8))
def test_workers_may_come_and_go_inside_an_epoch(counts, config, batch, world_sizes):
    """A new world size at every step, whose ranks know nothing of earlier ones, gives the same ids, each once."""
    whole = SampleOrder(counts, config)
    seen = []
    for step, world_size in enumerate(world_sizes):
        newcomer = SampleOrder(counts, config)
        for rank in range(world_size):
            seen += pairs(newcomer.rank_slice(step, batch, rank, world_size))
    assert seen == [pair for step in range(len(world_sizes)) for pair in pairs(whole.global_batch(step, batch))]
    assert len(seen) == len(set(seen)) == batch * len(world_sizes)


def test_every_world_size_from_1_to_64_on_shards_of_all_sizes():
    """Empty shards next to shards of one and of thousands; a batch that no number of ranks divides."""
    counts = [0, 1, 5000, 1, 0, 37, 1200, 1, 1, 2048, 0, 3]
    order = SampleOrder(counts, OrderConfig(seed=9))
    for step in (0, 3, 8):  # the last one straddles two epochs
        whole = pairs(order.global_batch(step, 1009))
        for world_size in range(1, 65):
            slices = [pairs(order.rank_slice(step, 1009, rank, world_size)) for rank in range(world_size)]
            assert [pair for part in slices for pair in part] == whole
            assert max(map(len, slices)) - min(map(len, slices)) <= 1


@given(counts_lists, configs, st.integers(1, 50))
def test_steps_without_gap_or_overlap_over_epochs(counts, config, batch):
    order = SampleOrder(counts, config)
    total = order.samples_per_epoch
    steps = steps_total(total, batch, 2)
    seen = [pair for step in range(steps) for pair in pairs(order.global_batch(step, batch))]
    assert len(seen) == len(set(seen))
    assert {pair for pair in seen if pair[0] < 2} == {
        (epoch, shard, k) for epoch in range(2) for shard, count in enumerate(counts) for k in range(count)
    }
    assert (steps - 1) * batch < 2 * total <= steps * batch


@given(counts_lists, configs)
def test_lane_lengths_differ_by_at_most_one(counts, config):
    order = SampleOrder(counts, config)
    lanes = order.locate(np.arange(order.samples_per_epoch)).lanes
    lengths = np.bincount(lanes, minlength=config.lanes)
    assert lengths.max() - lengths.min() <= 1


@given(counts_lists, configs)
def test_a_window_mixes_only_its_shards(counts, config):
    """In a lane, between a shard's first and last sample only the shards of its window appear."""
    order = SampleOrder(counts, config)
    slots = order.locate(np.arange(order.samples_per_epoch))
    for lane in range(config.lanes):
        shards = slots.shards[slots.lanes == lane]
        for shard in set(shards.tolist()):
            first, last = np.flatnonzero(shards == shard)[[0, -1]]
            assert len(set(shards[first : last + 1].tolist())) <= config.window_shards


def test_epochs_and_seeds_differ():
    def first_epoch(seed, epoch):
        order = SampleOrder([50, 50, 50, 50], OrderConfig(seed=seed, lanes=4, window_shards=2))
        return [pair[1:] for pair in pairs(order.locate(np.arange(epoch * 200, epoch * 200 + 200)))]

    assert first_epoch(0, 0) == first_epoch(0, 0)
    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)


def test_golden_order():
    """If this changes, ORDER_VERSION must change."""
    order = SampleOrder([3, 0, 2, 5, 1], OrderConfig(seed=7, lanes=2, window_shards=2))
    slots = order.locate(np.arange(22))
    assert slots.shards.tolist() == [2, 4, 2, 3, 3, 0, 3, 0, 3, 0, 3, 3, 0, 3, 0, 3, 0, 3, 2, 3, 2, 4]
    assert slots.indices.tolist() == [0, 0, 1, 4, 0, 0, 3, 2, 1, 1, 2, 0, 1, 2, 0, 3, 2, 4, 1, 1, 0, 0]
    assert pairs(order.global_batch(2, 4)) == [(0, 3, 1), (0, 3, 2), (1, 3, 0), (0, 0, 1)]
    assert ids_digest(slots.epochs, slots.shards) == 2550896620575228291
    assert order.parameters() == {"version": 1, "seed": 7, "lanes": 2, "window_shards": 2, "samples": 11}


@given(counts_lists, configs, st.integers(1, 60), st.sampled_from([1, 2, 3, 5, 7]), st.randoms())
def test_digest_is_the_same_however_the_ids_are_split(counts, config, batch, world_size, random):
    order = SampleOrder(counts, config)
    whole = order.global_batch(3, batch)
    ids = whole.shards * 1000 + whole.indices
    by_rank = 0
    for rank in range(world_size):
        slots = order.rank_slice(3, batch, rank, world_size)
        by_rank += ids_digest(slots.epochs, slots.shards * 1000 + slots.indices)
    shuffled = list(range(batch))
    random.shuffle(shuffled)
    assert by_rank % 2**64 == ids_digest(whole.epochs, ids) == ids_digest(whole.epochs[shuffled], ids[shuffled])


def test_digest_sees_epoch_repetition_and_exchange():
    def digest(*samples):
        epochs, ids = np.array(samples).T
        return ids_digest(epochs, ids)

    base = digest((0, 1), (1, 2))
    assert base != digest((1, 1), (0, 2))  # the epochs exchanged
    assert base != digest((0, 2), (1, 1))
    assert digest((0, 5), (0, 5)) != 0  # an xor would cancel
    assert digest((0, 0)) != 0


def test_a_rank_stays_on_few_shards():
    """1 of 8 ranks reads about an eighth of the shards and the lanes' edges, not all: 64 lanes over 64 shards."""
    order = SampleOrder([100] * 64, OrderConfig(seed=1))
    shards = {s for step in range(25) for s in order.rank_slice(step, 256, 3, 8).shards.tolist()}
    assert len(shards) <= 16


def test_far_seek_is_arithmetic():
    """1e8 samples in 1e5 shards, 1e12 positions in: nothing is enumerated, or this would not end."""
    order = SampleOrder(np.full(100_000, 1000), OrderConfig(seed=3))
    slots = order.global_batch(10**9, 1024)
    assert set(slots.epochs.tolist()) == {10240}
    assert len(set(pairs(slots))) == 1024
    assert (
        np.lexsort((slots.positions, slots.lanes)) == np.arange(1024)
    ).all()  # by position within a lane, on any numpy
    assert len(set(slots.shards.tolist())) > 64 * 4  # windows of 8 shards in each of 64 lanes


def test_plain_order_has_each_sample_once_in_order():
    counts = np.array([0, 3, 1, 0, 0, 4, 0])
    slots = plain_slots(counts, np.arange(8))
    assert pairs(slots) == [(0, 1, 0), (0, 1, 1), (0, 1, 2), (0, 2, 0), (0, 5, 0), (0, 5, 1), (0, 5, 2), (0, 5, 3)]
    for world_size in range(1, 12):
        parts = [plain_slice(8, rank, world_size) for rank in range(world_size)]
        assert [i for part in parts for i in part] == list(range(8))


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match="lanes=0"):
        OrderConfig(seed=0, lanes=0)
    with pytest.raises(ConfigError, match="seed=18"):
        OrderConfig(seed=9 * 10**18 * 2)
    with pytest.raises(DataError, match="3 shards serve no sample"):
        SampleOrder([0, 0, 0], OrderConfig(seed=0))
    with pytest.raises(ConfigError, match="rank=2"):
        SampleOrder([4], OrderConfig(seed=0)).rank_slice(0, 4, 2, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_neighbours_that_belong_together_are_never_parted(world_size):
    order = SampleOrder([9, 4, 17], OrderConfig(seed=1, lanes=4))
    ranks = [order.rank_slice(2, 14, rank, world_size, together=2) for rank in range(world_size)]
    assert all(len(slots.positions) % 2 == 0 for slots in ranks)
    whole = order.global_batch(2, 14)
    assert np.concatenate([slots.positions for slots in ranks]).tolist() == whole.positions.tolist()
