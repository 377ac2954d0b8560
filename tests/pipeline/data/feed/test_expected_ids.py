"""Ids that reached the devices are compared with the expected ones: agreement is exact, and a culprit is named."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.feed.expected_ids import Ids, describe_difference, epochs_of, expected_ids, named, not_of_this_order
from pipeline.data.feed.order import OrderConfig, SampleOrder, ids_digest
from pipeline.data.feed.substitution import Substitution, candidates

counts_lists = st.lists(st.sampled_from([0, 1, 2, 7, 30]), min_size=1, max_size=8).filter(any)


@dataclass
class Ids1000:
    """A selection whose shard s holds the ids 1000 s, 1000 s + 1, ..."""

    counts: list[int]

    @property
    def shards(self):
        return self.counts

    def rows(self, shard):
        return SimpleNamespace(sample_ids=1000 * shard + np.arange(self.counts[shard]))

    def sample_ids(self, slots):
        return 1000 * slots.shards + slots.indices


def order_of(counts, seed=3):
    return SampleOrder(counts, OrderConfig(seed=seed, lanes=4, window_shards=2))


def seen(counts, global_batch, start, stop):
    """Yield (epochs, ids) step by step, as a correct loader puts them on devices."""
    selection, order = Ids1000(counts), order_of(counts)
    for step in range(start, stop):
        slots = order.global_batch(step, global_batch)
        yield slots.epochs.copy(), selection.sample_ids(slots)


def digest_of(batches):
    return sum(ids_digest(epochs, ids) for epochs, ids in batches) % 2**64


@given(counts_lists, st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_expected_ids_are_what_a_loader_reads(counts, global_batch, start, steps):
    """Batches smaller and larger than an epoch, from any step to any other."""
    found = expected_ids(Ids1000(counts), order_of(counts), global_batch=global_batch, start=start, stop=start + steps)
    assert found == Ids(global_batch * steps, digest_of(seen(counts, global_batch, start, start + steps)))


COUNTS, BATCH, STOP = [30, 7, 0, 30], 12, 14  # 67 samples per epoch: 168 are two and a half


def excess(batches, substitutions=()):
    """Return recorded less expected."""
    expected = expected_ids(
        Ids1000(COUNTS), order_of(COUNTS), global_batch=BATCH, start=0, stop=STOP, substitutions=substitutions
    )
    return Ids(sum(len(ids) for _, ids in batches), digest_of(batches)).minus(expected)


def words(batches, *, counted=True):
    ids = np.concatenate([Ids1000(COUNTS).rows(shard).sample_ids for shard in range(len(COUNTS))])
    epochs = epochs_of(0, STOP, global_batch=BATCH, samples=67)
    assert epochs == range(3)
    return describe_difference(excess(batches), ids, epochs, counted=counted)


@pytest.mark.parametrize("counted", [True, False])
def test_one_sample_in_the_place_of_another_is_named_with_it(counted):
    batches = list(seen(COUNTS, BATCH, 0, STOP))
    epochs, ids = batches[8]
    place = int(np.flatnonzero(epochs == 1)[0])
    other = int(np.flatnonzero(epochs == 1)[1])
    lost, doubled = int(ids[place]), int(ids[other])
    ids[place] = doubled
    text = words(batches, counted=counted)
    assert text.endswith(f"in epoch 1 sample {doubled} came once too often, and sample {lost} was left out")
    assert text.startswith("as many as expected, but not the same") == counted


def test_one_too_many_one_too_few_and_several():
    batches = list(seen(COUNTS, BATCH, 0, STOP))
    batches.append((np.array([2]), np.array([3005])))
    assert words(batches) == "1 too many: sample 3005 of epoch 2 came once too often"
    batches = list(seen(COUNTS, BATCH, 0, STOP))
    (first, *epochs), (lost, *ids) = batches[0]
    batches[0] = np.array(epochs), np.array(ids)
    assert words(batches) == f"1 too few: sample {lost} of epoch {first} came once too rarely"
    batches = list(seen(COUNTS, BATCH, 0, STOP))
    batches += batches[3:4]
    assert words(batches) == "12 too many: more than one sample is wrong, and the sum alone cannot tell which"


def substitution(step, place, *, stand_in=0):
    """Return what the loader would record for the sample at a position of a step's batch."""
    order = order_of(COUNTS)
    slots = order.global_batch(step, BATCH)
    shard, epoch = int(slots.shards[place]), int(slots.epochs[place])
    sample_id = 1000 * shard + int(slots.indices[place])
    rows = Ids1000(COUNTS).rows(shard).sample_ids
    stand_in = int(rows[candidates(rows, sample_id, seed=3, epoch=epoch)[stand_in]])
    return Substitution(sample_id, stand_in, epoch, step, "crc32", "x.jpg")


def test_recorded_substitutions_are_excused_and_others_are_not():
    batches = list(seen(COUNTS, BATCH, 0, STOP))
    made = [substitution(2, 5), substitution(11, 0, stand_in=1)]
    for one, place in zip(made, (5, 0), strict=True):
        batches[one.step][1][place] = one.substitute_id
    assert excess(batches, made).digest == 0
    assert excess(batches, made[:1]).digest != 0
    assert f"sample {made[0].substitute_id} came once too often, and sample {made[0].sample_id}" in words(
        [*batches[:11], *list(seen(COUNTS, BATCH, 11, STOP))]
    )


def test_records_that_the_order_did_not_ask_for_are_found():
    def wrong(*records):
        return not_of_this_order(Ids1000(COUNTS), order_of(COUNTS), global_batch=BATCH, substitutions=records)

    right = substitution(2, 5)
    assert wrong(right, substitution(11, 0, stand_in=3)) == []
    for forged in (
        right._replace(step=3),
        right._replace(epoch=right.epoch + 1),
        right._replace(sample_id=right.substitute_id),
        right._replace(substitute_id=right.sample_id),
        right._replace(substitute_id=(right.substitute_id + 1000) % 4000),  # of another shard
    ):
        assert wrong(forged) == [forged]
    assert wrong(right, right) == [right]  # one sample is substituted once per epoch
    assert (
        named([right] * 5) == ", ".join([f"{right.sample_id} by {right.substitute_id} at step 2"] * 3) + " and 2 more"
    )
