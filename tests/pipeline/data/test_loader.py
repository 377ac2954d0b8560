"""Real tars and a real manifest; every batch is a function of step, rank and world size alone."""

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.data.cache import ShardCache
from pipeline.data.images import AugmentConfig, decode
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest, write_manifest
from pipeline.data.order import OrderConfig, SampleOrder, ids_digest, steps_total
from pipeline.data.selection import Selection, balanced_sequence
from pipeline.data.shards import IntakePolicy, plan_shards, read_samples, write_shard
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore

SIZE = (24, 24)
CLASSES = 3


@dataclass(frozen=True)
class DistantStore(FileStore):
    """A folder that is used as if it were a bucket."""

    def local_path(self, key):
        return None


def make_dataset(folder: Path, *, label=lambda i: i % CLASSES) -> Manifest:
    """40 training pictures in 5 shards and 7 test pictures; picture i has colour i in its corner."""
    source, root = FileStore(folder / "source"), FileStore(folder / "root")
    rows: dict[str, list[Any]] = {name: [] for name in ("sample_id", "path", "size", "label", "split")}
    for i in range(47):
        pixels = np.random.default_rng(i).integers(0, 255, (5, 7, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((40 + i % 5, 36), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        source.write(f"{i:03d}.jpg", buffer.getvalue())
        split = "train" if i < 40 else "test"
        for name, value in zip(rows, (i, f"{i:03d}.jpg", len(buffer.getvalue()), label(i), split), strict=True):
            rows[name].append(value)
    types = {
        "sample_id": pa.int64(),
        "path": pa.string(),
        "size": pa.int64(),
        "label": pa.int32(),
        "split": pa.string(),
    }
    snapshot = pa.table(rows, schema=pa.schema(types.items()))
    policy = IntakePolicy()
    plans = plan_shards(snapshot, seed=0, shard_max_bytes=10**6, min_shards=5, policy=policy)
    written = [write_shard(plan, source=source.uri, root_uri=root.uri, policy=policy) for plan in plans]
    shards = [
        {
            "shard": w.shard,
            "key": w.key,
            "bytes": w.bytes,
            "samples": w.samples,
            "served": w.samples,
            "sha256": w.sha256,
            "split": w.split,
        }
        for w in written
    ]
    none = pa.table({"source": [], "split": [], "label": [], "reason": [], "detail": [], "bytes": []})
    write_manifest(
        root.at("g0001"),
        samples=(read_samples(root, row) for row in written),
        shards=pa.Table.from_pylist(shards),
        quarantine=none,
        listed={"train": 40, "test": 7},
        classes=["a", "b", "c"],
        policy={},
    )
    return Manifest.open(root.at("g0001"), root)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def loader(manifest, selection=None, *, store=None, directory=Path("/nonexistent"), seed=5, **options):
    selection = selection or Selection.all(manifest, "train")
    settings: dict[str, Any] = {
        "global_batch": 12,
        "rank": 0,
        "world_size": 1,
        "augment": AugmentConfig(),
        "image_size": SIZE,
    }
    return Loader(
        selection,
        SampleOrder(selection.counts, OrderConfig(seed=seed, lanes=4, window_shards=2)),
        seed=seed,
        cache=ShardCache(store or manifest.root, directory, max_bytes=10**9),
        **settings | options,
    )


def joined(batches):
    return tuple(torch.cat(tensors).numpy() for tensors in zip(*batches, strict=True))


def assert_equal_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_world_size_reads_the_same_global_batches(manifest, world_size):
    whole = loader(manifest).from_step(0, 8)  # 96 of 40 samples an epoch: straddles twice
    ranks = [loader(manifest, rank=r, world_size=world_size).from_step(0, 8) for r in range(world_size)]
    assert_equal_batches((tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)), whole)


def test_threads_and_prefetch_change_nothing(manifest):
    expected = list(loader(manifest, decode_threads=1, prefetch_batches=0).from_step(0, 6))
    for threads, ahead in ((3, 0), (1, 3), (3, 4), (4, 100)):
        found = loader(manifest, decode_threads=threads, prefetch_batches=ahead).from_step(0, 6)
        assert_equal_batches(found, expected)


def test_a_restart_goes_on_where_it_stopped(manifest):
    whole = list(loader(manifest).from_step(0, 7))
    first = loader(manifest).from_step(0, 7)
    seen = [next(first) for _ in range(3)]
    first.close()
    assert_equal_batches([*seen, *loader(manifest).from_step(3, 7)], whole)


def test_every_sample_once_an_epoch_with_its_own_label_and_pixels(manifest):
    steps = steps_total(40, 12, 2)
    plain = AugmentConfig(kind="center", flip=False, crop_ratio=1.0)
    images, labels, ids, epochs = joined(loader(manifest, augment=plain, image_size=(36, 40)).from_step(0, steps))
    for epoch in (0, 1):
        assert sorted(ids[epochs == epoch]) == list(range(40))
    assert (labels == ids % CLASSES).all()
    source = FileStore(manifest.root.root.parent / "source")
    for image, id_ in zip(images, ids, strict=True):
        if id_ % 5 == 0:  # those are 40 wide: taken whole
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
    whole = joined(loader(manifest, selection, seed=99).evaluation_batches(7))[0]  # no randomness in it
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


def damage(manifest, change):
    """Changes the bytes of a shard in its last sample; returns that sample's row and the shard's key."""
    selection = Selection.all(manifest, "train")
    shard = selection.shards[2]
    row = manifest.samples(shard.shard).to_pylist()[-1]
    path = manifest.root.local_path(shard.key)
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(change(data, row))
    return row, shard.key


def flip_bit(data, row):
    data[row["offset"] + row["length"] // 2] ^= 1
    return data


def cut_short(data, row):
    return data[: row["offset"] + row["length"] - 1]


@pytest.mark.parametrize(("change", "words"), [(flip_bit, "CRC-32 is"), (cut_short, r"ends after \d+ of its bytes")])
def test_damaged_bytes_stop_the_run_and_are_named(tmp_path, change, words):
    manifest = make_dataset(tmp_path)
    row, key = damage(manifest, change)
    with pytest.raises(DataError, match=words) as caught:
        list(loader(manifest, decode_threads=3).from_step(0, 4))
    for part in (key, f"id {row['sample_id']}", row["key"], row["source"], "shard the source again"):
        assert part in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "fetch"))]


def test_a_missing_shard_stops_the_run(tmp_path):
    manifest = make_dataset(tmp_path)
    key = Selection.all(manifest, "train").shards[0].key
    manifest.root.delete(key)
    with pytest.raises(DataError, match=f"{key}.*cannot be read.*No such file"):
        list(loader(manifest).from_step(0, 4))


def test_the_batches_before_the_damage_are_still_delivered(tmp_path):
    """Prefetched failures wait for their turn: what a run sees before it stops does not depend on timing."""
    manifest = make_dataset(tmp_path)
    row, _ = damage(manifest, flip_bit)
    healthy = list(loader(make_dataset(tmp_path / "again")).from_step(0, 4))
    at = next(step for step, batch in enumerate(healthy) if row["sample_id"] in batch.sample_ids)
    batches, seen = loader(manifest, prefetch_batches=4).from_step(0, 4), []
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


# Distant stores


def test_a_distant_store_is_read_through_the_cache(manifest, tmp_path):
    store = DistantStore(manifest.root.root)
    expected = list(loader(manifest).from_step(0, 8))
    distant = loader(manifest, store=store, directory=tmp_path, decode_threads=2)
    assert_equal_batches(distant.from_step(0, 8), expected)
    assert distant.cache.downloads == len(Selection.all(manifest, "train").shards) == 5
    assert distant.wait_seconds > 0


def test_a_damaged_cached_copy_is_named_dropped_and_fetched_again(manifest, tmp_path):
    store = DistantStore(manifest.root.root)
    expected = list(loader(manifest, store=store, directory=tmp_path).from_step(0, 4))
    shard = Selection.all(manifest, "train").shards[1]
    copy = tmp_path / f"{shard.sha256}.tar"
    copy.write_bytes(bytes(len(copy.read_bytes())))
    with pytest.raises(DataError, match=rf"{shard.sha256}\.tar was damaged on this node and is now deleted"):
        list(loader(manifest, store=store, directory=tmp_path).from_step(0, 4))
    assert_equal_batches(loader(manifest, store=store, directory=tmp_path).from_step(0, 4), expected)


def test_a_cache_smaller_than_the_data_still_reads_all(manifest, tmp_path):
    shards = Selection.all(manifest, "train").shards
    small = loader(manifest, store=DistantStore(manifest.root.root), directory=tmp_path, decode_threads=2)
    small.cache.max_bytes = 2 * max(shard.bytes for shard in shards)
    assert_equal_batches(small.from_step(0, 5), loader(manifest).from_step(0, 5))
    assert small.cache.downloads > 5


# A few labels


def chosen_ids(selection):
    return [int(i) for shard in range(len(selection.shards)) for i in selection.rows(shard).sample_ids]


@pytest.mark.parametrize("count", [1, 3, 8, 30, 40])
def test_a_balanced_few_are_balanced_nested_and_readable(manifest, count):
    few = Selection.balanced(manifest, "train", count=count, seed=1)
    ids = chosen_ids(few)
    assert len(ids) == few.counts.sum() == count
    per_class = np.bincount(np.array(ids) % CLASSES, minlength=CLASSES)
    assert per_class.max() - per_class.min() <= 1
    assert set(ids) <= set(chosen_ids(Selection.balanced(manifest, "train", count=min(40, count + 5), seed=1)))
    _, labels, read, epochs = joined(loader(manifest, few).from_step(0, steps_total(count, 12, 1)))
    assert sorted(read[epochs == 0]) == sorted(ids)
    assert (labels == read % CLASSES).all()


def test_seeds_choose_other_few(manifest):
    choices = {tuple(chosen_ids(Selection.balanced(manifest, "train", count=9, seed=seed))) for seed in range(3)}
    assert len(choices) == 3


def test_unlabelled_and_rare_classes():
    labels = np.array([0] * 50 + [1] * 2 + [-1] * 20)
    sequence = balanced_sequence(np.arange(72), labels, seed=0)
    assert sorted(sequence) == list(range(52))
    assert np.bincount(labels[sequence[:10]]).tolist() == [8, 2]


def test_wrong_choices_are_answered(manifest, tmp_path):
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
