"""Real tars and a real manifest; every batch is a function of step, rank and world size alone."""

import logging
import multiprocessing
import re
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from feed_kit import (
    CLASSES,
    SIZE,
    DistantStore,
    assert_equal_batches,
    cut_short,
    damage,
    flip_bit,
    joined,
    loader,
    make_dataset,
    not_a_picture,
)

from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Batch, Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder, ids_digest, steps_total
from pipeline.data.feed.selection import Selection, balanced_sequence
from pipeline.data.images.pictures import AugmentConfig, decode
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.storage.s3 import S3Store


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def across(parts):
    """Return the ranks' parts of one step as one batch."""
    tensors = (torch.cat(of_ranks) for of_ranks in zip(*(part[:4] for part in parts), strict=True))
    return Batch(*tensors, tuple(one for part in parts for one in part.substitutions))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_world_size_reads_the_same_global_batches(manifest, world_size):
    whole = loader(manifest).from_step(0, 8)  # 96 samples at 40 per epoch: two batches straddle
    ranks = [loader(manifest, rank=r, world_size=world_size).from_step(0, 8) for r in range(world_size)]
    assert_equal_batches((across(parts) for parts in zip(*ranks, strict=True)), whole)


def test_ranks_may_come_and_go_inside_an_epoch(manifest):
    """An epoch has 3 1/3 steps; 1, 5, 2, 3 and 7 ranks, new at every step, make the batches of a single lasting one."""
    expected = list(loader(manifest).from_step(0, 5))
    found = []
    for step, world_size in enumerate((1, 5, 2, 3, 7)):
        ranks = [loader(manifest, rank=r, world_size=world_size).from_step(step, step + 1) for r in range(world_size)]
        found.append(across([next(batches) for batches in ranks]))
    assert_equal_batches(found, expected)


def test_threads_and_prefetch_change_nothing(manifest):
    expected = list(loader(manifest, decode_threads=1, prefetch_batches=0).from_step(0, 6))
    for threads, ahead in ((3, 0), (1, 3), (3, 4), (4, 100)):
        found = loader(manifest, decode_threads=threads, prefetch_batches=ahead).from_step(0, 6)
        assert_equal_batches(found, expected)


def test_a_restart_continues_where_it_stopped(manifest):
    whole = list(loader(manifest).from_step(0, 7))
    first = loader(manifest).from_step(0, 7)
    seen = [next(first) for _ in range(3)]
    first.close()
    assert_equal_batches([*seen, *loader(manifest).from_step(3, 7)], whole)


def test_every_sample_once_per_epoch_with_its_own_label_and_pixels(manifest):
    steps = steps_total(40, 12, 2)
    plain = AugmentConfig(kind="center", flip=False, crop_ratio=1.0)
    images, labels, ids, epochs = joined(loader(manifest, augment=plain, image_size=(36, 40)).from_step(0, steps))
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch]) == list(range(40))
    assert (labels == ids % CLASSES).all()
    source = FileStore(manifest.root.root.parent / "source")
    for image, id_ in zip(images, ids, strict=True):
        if id_ % 5 == 0:  # these are 40 wide and used whole
            np.testing.assert_array_equal(image, decode(source.read(f"{id_:03d}.jpg")))


def test_epochs_and_seeds_cut_differently(manifest):
    images, _, ids, epochs = joined(loader(manifest).from_step(0, 10))
    first, second = (images[(ids == 3) & (epochs == e)][0] for e in (0, 1))
    assert (first != second).any()
    other, _, other_ids, _ = joined(loader(manifest, seed=6).from_step(0, 4))
    assert (other[other_ids == 3][0] != first).any()


def test_ids_digest_of_what_was_read_equals_the_arithmetic(manifest):
    selection = Selection.all(manifest, "train")
    order = SampleOrder(selection.counts, OrderConfig(seed=5, lanes=4, window_shards=2))
    slots = order.locate(np.arange(12 * 5))
    expected = ids_digest(slots.epochs, selection.sample_ids(slots))
    read = 0
    for rank in range(3):
        _, _, ids, epochs = joined(loader(manifest, rank=rank, world_size=3).from_step(0, 5))
        read += ids_digest(epochs, ids)
    assert read % 2**64 == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_each_sample_once_without_padding(manifest, world_size):
    selection = Selection.all(manifest, "test")
    parts = [
        joined(loader(manifest, selection, rank=rank, world_size=world_size).evaluation_batches(2))
        for rank in range(world_size)
    ]
    ids = np.concatenate([part[2] for part in parts])
    plain = [i for shard in selection.shards for i in manifest.samples(shard.shard).column("sample_id").to_pylist()]
    assert ids.tolist() == plain
    assert sorted(plain) == list(range(40, 47))
    whole = joined(loader(manifest, selection, seed=99).evaluation_batches(7))[0]  # nothing in it is random
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole)


def test_more_ranks_than_samples(manifest):
    selection = Selection.all(manifest, "test")
    sizes = [
        sum(len(b.labels) for b in loader(manifest, selection, rank=r, world_size=9).evaluation_batches(4))
        for r in range(9)
    ]
    assert sum(sizes) == 7
    batches = list(loader(manifest, rank=0, world_size=20).from_step(0, 2))
    assert [len(batch.images) for batch in batches] == [0, 0]


# Damage


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [(flip_bit, "crc32", "CRC-32 is"), (cut_short, "truncated", r"ends after \d+ of its bytes")],
)
def test_damaged_bytes_are_substituted_and_reported(tmp_path, manifest, caplog, change, reason, words):
    """Over two epochs, only one image differs from an undisturbed run: another one of its shard, complete, replaces it."""
    damaged = make_dataset(tmp_path)
    row, key = damage(damaged, change)
    steps = steps_total(40, 12, 2)
    healthy = list(loader(manifest).from_step(0, steps))
    found = list(loader(damaged, decode_threads=3).from_step(0, steps))
    made = [one for batch in found for one in batch.substitutions]
    assert [(one.sample_id, one.epoch, one.reason, one.source) for one in made] == [
        (row["sample_id"], epoch, reason, row["source"]) for epoch in (0, 1)
    ]
    shard_mates = damaged.samples(row["shard"]).column("sample_id").to_pylist()
    stand_ins = {one.epoch: one.substitute_id for one in made}
    assert set(stand_ins.values()) <= set(shard_mates) - {row["sample_id"]}
    for step, (batch, expected) in enumerate(zip(found, healthy, strict=True)):
        gone = expected.sample_ids == row["sample_id"]
        assert [one.step for one in batch.substitutions] == [step] * int(gone.sum())
        for tensor, as_before in zip(batch[:4], expected[:4], strict=True):
            assert torch.equal(tensor[~gone], as_before[~gone])
        for image, label, id_, epoch in zip(*(tensor[gone] for tensor in batch[:4]), strict=True):
            assert id_ == stand_ins[int(epoch)]
            assert label == id_ % CLASSES
            # its own crop, the same as where the order itself asks for it
            twin = next(b.images[(b.sample_ids == id_) & (b.epochs == epoch)][0] for b in healthy if
                        ((b.sample_ids == id_) & (b.epochs == epoch)).any())  # fmt: skip
            assert torch.equal(image, twin)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1  # not once per epoch
    for part in (key, f"id {row['sample_id']}", row["key"], row["source"], "shard the source again"):
        assert part in warnings[0]
    assert re.search(words, warnings[0])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_substitutions_are_the_same_at_any_world_size_and_after_a_restart(tmp_path, world_size):
    damaged = make_dataset(tmp_path)
    damage(damaged, flip_bit)
    whole = list(loader(damaged).from_step(0, 8))
    assert sum(len(batch.substitutions) for batch in whole) >= 2
    ranks = [loader(damaged, rank=r, world_size=world_size).from_step(3, 8) for r in range(world_size)]
    assert_equal_batches((across(parts) for parts in zip(*ranks, strict=True)), whole[3:])


def forged(selection, row):
    """Return a selection in which a sample's CRC-32 is that of the damaged bytes, as if they had been damaged before recording."""
    path = selection.manifest.root.local_path(next(s.key for s in selection.shards if s.shard == row["shard"]))
    crc32 = zlib.crc32(path.read_bytes()[row["offset"] : row["offset"] + row["length"]])
    plain = selection.rows

    def rows(shard):
        read = plain(shard)
        return read._replace(crc32s=np.where(read.sample_ids == row["sample_id"], crc32, read.crc32s))

    selection.rows = rows
    return selection


def test_what_does_not_decode_is_substituted_and_the_image_named(tmp_path, caplog):
    manifest = make_dataset(tmp_path)
    row, _ = damage(manifest, not_a_picture)
    selection = forged(Selection.all(manifest, "train"), row)
    made = [one for batch in loader(manifest, selection).from_step(0, 4) for one in batch.substitutions]
    assert [(one.sample_id, one.reason) for one in made] == [(row["sample_id"], "undecodable")]
    assert "Remove it from the source" in caplog.text
    with pytest.raises(DataError, match=f"id {row['sample_id']}, from {row['source']}.*does not decode"):
        list(loader(manifest, selection).evaluation_batches(8))


@pytest.mark.parametrize("change", [flip_bit, cut_short])
def test_in_evaluation_damaged_bytes_stop_and_are_named(tmp_path, change):
    manifest = make_dataset(tmp_path)
    row, key = damage(manifest, change)
    with pytest.raises(DataError) as caught:
        list(loader(manifest, decode_threads=3).evaluation_batches(8))
    for part in (key, f"id {row['sample_id']}", row["key"], row["source"], "shard the source again"):
        assert part in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "fetch"))]
    # pictures that are only looked at may be substituted
    shown = list(loader(manifest).evaluation_batches(8, unreadable="substitute"))
    assert [one.sample_id for batch in shown for one in batch.substitutions] == [row["sample_id"]]


def test_a_shard_of_which_nothing_is_left_stops_the_run(tmp_path):
    manifest = make_dataset(tmp_path)
    shard = Selection.all(manifest, "train").shards[0]
    path = manifest.root.local_path(shard.key)
    path.chmod(0o644)
    path.write_bytes(bytes(shard.bytes))
    with pytest.raises(DataError, match=rf"{shard.key}.*CRC-32.*No other sample of its shard.*7 were tried"):
        list(loader(manifest).from_step(0, 4))


def test_a_missing_shard_stops_the_run(tmp_path):
    manifest = make_dataset(tmp_path)
    key = Selection.all(manifest, "train").shards[0].key
    manifest.root.delete(key)
    with pytest.raises(DataError, match=f"{key}.*cannot be read.*No such file"):
        list(loader(manifest).from_step(0, 4))


def test_the_batches_before_a_failure_are_still_delivered(tmp_path):
    """Failures of prefetched batches wait for their turn, so the batches before the stop do not depend on timing."""
    manifest = make_dataset(tmp_path)
    row, _ = damage(manifest, flip_bit)
    healthy = list(loader(make_dataset(tmp_path / "again")).evaluation_batches(6))
    at = next(step for step, batch in enumerate(healthy) if row["sample_id"] in batch.sample_ids)
    batches, seen = loader(manifest, prefetch_batches=4).evaluation_batches(6), []
    with pytest.raises(DataError):
        seen.extend(batches)
    assert_equal_batches(seen, healthy[:at])


def test_closing_ends_the_threads(manifest):
    before = threading.active_count()
    batches = loader(manifest, decode_threads=3, prefetch_batches=5).from_step(0, 10**6)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


# Remote stores


def test_a_remote_store_is_read_through_the_cache(manifest, tmp_path):
    store = DistantStore(manifest.root.root)
    expected = list(loader(manifest).from_step(0, 8))
    distant = loader(manifest, store=store, directory=tmp_path, decode_threads=2)
    assert_equal_batches(distant.from_step(0, 8), expected)
    assert distant.cache.counts.downloads == len(Selection.all(manifest, "train").shards) == 5


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_damaged_cached_copy_is_fetched_again(manifest, tmp_path, caplog, kind):
    """A disk that garbled a copy costs no sample, and four threads that notice it fetch it once."""

    def read():
        made = loader(manifest, store=DistantStore(manifest.root.root), directory=tmp_path, decode_threads=4)
        return made, list(made.from_step(0, 4) if kind == "training" else made.evaluation_batches(12))

    _, expected = read()
    shard = Selection.all(manifest, "train").shards[1]
    copy = tmp_path / f"{shard.sha256}.tar"
    copy.write_bytes(bytes(len(copy.read_bytes())))
    again, found = read()
    assert_equal_batches(found, expected)
    assert (again.cache.counts.downloads, again.cache.counts.repairs) == (1, 1)
    assert f"{copy} of {manifest.root.uri}/{shard.key} was damaged on this disk" in caplog.text


def test_a_shard_that_is_what_was_written_is_not_fetched_twice_for_a_wrong_row(tmp_path):
    """The row's CRC-32 is wrong while the shard has its SHA-256: fetching it again would not help."""
    manifest = make_dataset(tmp_path / "data")
    row = manifest.samples(Selection.all(manifest, "train").shards[2].shard).to_pylist()[0]
    selection = Selection.all(manifest, "train")
    plain = selection.rows

    def rows(shard):
        read = plain(shard)
        return read._replace(crc32s=read.crc32s ^ (read.sample_ids == row["sample_id"]))

    selection.rows = rows
    read = loader(manifest, selection, store=DistantStore(manifest.root.root), directory=tmp_path / "cache")
    made = [one for batch in read.from_step(0, 4) for one in batch.substitutions]
    assert [(one.sample_id, one.reason) for one in made] == [(row["sample_id"], "crc32")]
    assert (read.cache.counts.downloads, read.cache.counts.repairs) == (5, 0)


def test_a_cache_smaller_than_the_data_still_reads_all(manifest, tmp_path):
    shards = Selection.all(manifest, "train").shards
    small = loader(manifest, store=DistantStore(manifest.root.root), directory=tmp_path, decode_threads=2)
    small.cache.max_bytes = 2 * max(shard.bytes for shard in shards)
    assert_equal_batches(small.from_step(0, 5), loader(manifest).from_step(0, 5))
    assert small.cache.counts.downloads > 5


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Write 240 training images into 24 shards of 10, and a few test images."""
    return make_dataset(tmp_path_factory.mktemp("many"), train=240, shards=24)


def room_for(manifest, count):
    """Return a size that holds any `count` shards."""
    return count * max(shard.bytes for shard in Selection.all(manifest, "train").shards)


def test_fetching_ahead_does_not_evict_what_is_needed_earlier(many, tmp_path):
    """There is room for 14 of 24 shards; 4 lanes of 2 shards read 12 in turns, and 32 batches ahead are more than an epoch.

    Two epochs take 39 fetches. They would take 68 if everything ahead were fetched as soon as it is known, whatever it evicts.
    """
    order = OrderConfig(seed=5, lanes=4, window_shards=2)
    distant = loader(many, store=DistantStore(many.root.root), directory=tmp_path, decode_threads=2)
    distant.cache.max_bytes = distant.fetch_bytes = room_for(many, 14)
    assert order.lanes * (order.window_shards + 1) == 12
    assert distant.bytes_at_once(1) <= room_for(many, 12)
    found = []
    for batch in distant.from_step(0, 40):  # two epochs
        found.append(batch)
        time.sleep(0.01)  # a training step
    assert_equal_batches(found, loader(many).from_step(0, 40))
    counts = distant.cache.counts
    assert 24 < counts.downloads <= 1.1 * 24 * 2
    assert counts.evictions >= counts.downloads - 14
    assert counts.hits + counts.misses == 40 * 12
    assert counts.hits / (40 * 12) > 0.5  # where no batch waits for its shards


def test_a_node_reads_the_lanes_of_its_ranks_at_a_time(many, tmp_path):
    """4 lanes of 2 shards and one more each; of 8 ranks, the two on a node read one lane and the edge of another."""
    distant = DistantStore(many.root.root)
    mean = sum(shard.bytes for shard in Selection.all(many, "train").shards) // 24
    alone = loader(many, store=distant, directory=tmp_path)
    assert alone.bytes_at_once(1) == 12 * mean
    eighth = loader(many, store=distant, directory=tmp_path, rank=3, world_size=8)
    assert eighth.bytes_at_once(2) == 6 * mean
    assert loader(many).bytes_at_once(1) == 0  # they are on this disk


def test_shards_are_on_disk_before_they_are_needed(many, tmp_path):
    """While one batch is used, the shards of the next 32 are fetched, and no later read waits for the store."""
    distant = loader(many, store=DistantStore(many.root.root), directory=tmp_path)
    batches = distant.from_step(0, 30)
    next(batches)
    deadline = time.monotonic() + 60
    while distant.cache.counts.downloads < 24:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waited_for = distant.cache.counts.misses
    assert waited_for < 24
    assert len(list(batches)) == 29
    assert distant.cache.counts.misses == waited_for
    assert distant.cache.counts.downloads == 24


def read_epochs(folder, store, directory, rank, max_bytes, in_step):
    """One of three ranks on a node, in step with the others."""
    root = FileStore(folder)
    manifest = Manifest.open(root.at("g0001"), root)
    ours = loader(manifest, rank=rank, world_size=3, store=store, directory=directory, fetch_bytes=max_bytes // 3)
    ours.cache.max_bytes = max_bytes
    seen = 0
    for batch in ours.from_step(0, 40):
        seen += len(batch.images)
        in_step.wait(60)
    assert seen == 160


@pytest.mark.parametrize("room", [14, 100])
def test_three_ranks_on_a_node_get_each_shard_from_s3_once_per_epoch(many, s3_bucket, tmp_path, caplog, room):
    """GET requests that reached the server over two epochs: with room for all shards, one per shard, in the first epoch."""
    store = S3Store(s3_bucket, "root")
    shards = Selection.all(many, "train").shards
    for shard in shards:
        store.upload(shard.key, many.root.local_path(shard.key))
    caplog.set_level(logging.INFO, logger="werkzeug")
    context = multiprocessing.get_context("spawn")
    in_step = context.Barrier(3)
    arguments = (many.root.root, store, tmp_path / "cache")
    ranks = [
        context.Process(target=read_epochs, args=(*arguments, rank, room_for(many, room), in_step)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    of_shards = [found[1] for record in caplog.records if (found := re.search(r"GET (/\S+\.tar)", record.getMessage()))]
    assert len(set(of_shards)) == len(shards) == 24
    if room == 100:
        assert len(of_shards) == 24
    else:
        assert 24 < len(of_shards) <= 1.1 * 24 * 2


# A few labels


def chosen_ids(selection):
    return [int(i) for shard in range(len(selection.shards)) for i in selection.rows(shard).sample_ids]


@pytest.mark.parametrize("count", [1, 3, 8, 30, 40])
def test_balanced_subsets_are_balanced_nested_and_readable(manifest, count):
    few = Selection.balanced(manifest, "train", count=count, seed=1)
    ids = chosen_ids(few)
    assert len(ids) == few.counts.sum() == count
    per_class = np.bincount(np.array(ids) % CLASSES, minlength=CLASSES)
    assert per_class.max() - per_class.min() <= 1
    assert set(ids) <= set(chosen_ids(Selection.balanced(manifest, "train", count=min(40, count + 5), seed=1)))
    _, labels, read, epochs = joined(loader(manifest, few).from_step(0, steps_total(count, 12, 1)))
    assert sorted(read[epochs == 0]) == sorted(ids)
    assert (labels == read % CLASSES).all()


def test_seeds_choose_other_subsets(manifest):
    choices = {tuple(chosen_ids(Selection.balanced(manifest, "train", count=9, seed=seed))) for seed in range(3)}
    assert len(choices) == 3


def test_unlabelled_and_rare_classes():
    labels = np.array([0] * 50 + [1] * 2 + [-1] * 20)
    sequence = balanced_sequence(np.arange(72), labels, seed=0)
    assert sorted(sequence) == list(range(52))
    assert np.bincount(labels[sequence[:10]]).tolist() == [8, 2]


def test_wrong_choices_are_refused(manifest, tmp_path):
    with pytest.raises(ConfigError, match=r"count=41 .* it has 40 with a label"):
        Selection.balanced(manifest, "train", count=41, seed=0)
    unlabelled = make_dataset(tmp_path, label=lambda _: -1)
    with pytest.raises(ConfigError, match="it has 0 with a label"):
        Selection.balanced(unlabelled, "train", count=1, seed=0)
    assert (joined(loader(unlabelled).from_step(0, 1))[1] == -1).all()
    selection = Selection.all(manifest, "train")
    with pytest.raises(ConfigError, match=r"make the order from selection\.counts"):
        Loader(
            selection, SampleOrder([1, 2], OrderConfig(seed=0)), global_batch=1, rank=0, world_size=1, augment=AugmentConfig(),
            image_size=SIZE, seed=0, cache=ShardCache(manifest.root, tmp_path, max_bytes=1),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="decode_threads=0"):
        loader(manifest, decode_threads=0)
