"""Plan, tars and the shard stage: no image is lost or doubled, and any task writes the same bytes any number of times."""

import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.cluster.resources import Resources
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sharding.shard_plan import cut_evenly, plan_shards
from pipeline.data.sharding.shard_record import read_samples
from pipeline.data.sharding.shard_writer import check_bad_share, write_shard
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.graph.step import Attempt, StageInput
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import snapshot
from pipeline.storage import open_store

POLICY = IntakePolicy(image_max_short_side=64)
FINE = {"bad_share_stop": 0.05, "bad_share_warn": 0.01}


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    """40 pictures of two classes, one of them PNG."""
    store = open_store(str(tmp_path / "source"))
    for number in range(39):
        store.write(f"{'cat' if number % 3 else 'dog'}/{number:02d}.jpg", picture(number))
    store.write("cat/last.png", picture(39, "PNG"))
    return str(tmp_path / "source")


class Bar:
    def __init__(self):
        self.seen = []

    def update(self, done, total, *, unit, **fields):
        self.seen.append((done, total, unit, fields))


def attempt(root, *, generation=1, **options):
    given = FINE | options
    return Attempt(str(root), generation, "", "shard", "f", Resources(), "in_process", Bar(), options=given)


def snapshot_of(source, root, *, test_share=0.0):
    handed = attempt(root)
    result = snapshot(SnapshotConfig(source=source, test_share=test_share, seed=0), {}, handed)
    return {"snapshot": StageInput(handed.root_uri, handed.generation, "f", result.facts)}


def config(source, **changes):
    return ShardStageConfig(source=source, seed=0, shard_max_bytes=20_000, min_shards=4, **changes)


def listing(paths, sizes=None, splits=None, label=0):
    count = len(paths)
    columns = {
        "sample_id": pa.array(range(count), pa.int64()),
        "path": pa.array(paths, pa.string()),
        "size": pa.array(sizes or [1000] * count, pa.int64()),
        "label": pa.array([label] * count, pa.int32()),
        "split": pa.array(splits or ["train"] * count, pa.string()),
    }
    return pa.table(columns)


def plan(table, *, seed=0, shard_max_bytes=20_000, min_shards=4):
    return plan_shards(table, seed=seed, shard_max_bytes=shard_max_bytes, min_shards=min_shards, policy=POLICY)


def objects(store, prefix=""):
    """Return key -> (hash of the bytes, inode), which changes even if an object is written again with equal bytes."""
    keys = [item.key for item in store.list(prefix)]
    return {key: (hashlib.sha256(store.read(key)).hexdigest(), store.local_path(key).stat().st_ino) for key in keys}


# The plan


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 50_000), min_size=1, max_size=120),
    test_every=st.integers(2, 9),
    min_shards=st.integers(1, 20),
    shard_max_bytes=st.integers(1, 200_000),
)
def test_a_plan_holds_each_sample_once_within_its_limits(sizes, test_every, min_shards, shard_max_bytes):
    splits = ["test" if number % test_every == 0 else "train" for number in range(len(sizes))]
    table = listing([f"{number}.jpg" for number in range(len(sizes))], sizes, splits)
    plans = plan(table, min_shards=min_shards, shard_max_bytes=shard_max_bytes)
    ids = [row for one in plans for row in one.samples.column("sample_id").to_pylist()]
    assert sorted(ids) == list(range(len(sizes)))
    assert [one.shard for one in plans] == list(range(len(plans)))
    for one in plans:
        assert set(one.samples.column("split").to_pylist()) == {one.split}
        planned = sum(512 + -(-size // 512) * 512 + 1024 for size in one.samples.column("size").to_pylist())
        assert planned <= shard_max_bytes or one.samples.num_rows == 1
    assert sum(one.split == "train" for one in plans) >= min(min_shards, splits.count("train"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(500, 1000), min_size=1, max_size=200), st.integers(1, 30))
def test_cuts_are_even(sizes, parts):
    edges = cut_evenly(np.asarray(sizes), max_bytes=10**9, min_parts=parts)
    runs = [sum(sizes[start:end]) for start, end in pairwise(edges)]
    assert len(runs) == min(parts, len(sizes))
    if len(sizes) >= 10 * parts:
        assert max(runs) - min(runs) <= 2 * max(sizes)  # each edge is off by at most one item


def test_a_plan_is_random_stable_and_bound_to_all_that_decides_bytes():
    table = listing([f"{number:04d}.jpg" for number in range(2000)])
    plans = plan(table, shard_max_bytes=10**9)
    assert [one.digest for one in plan(table, shard_max_bytes=10**9)] == [one.digest for one in plans]
    means = [np.mean(one.samples.column("sample_id").to_numpy()) for one in plans]
    # 500 of 0..1999 drawn at random have a mean of 1000 +- 26; in path order the mean of the first shard would be 250
    assert max(abs(mean - 1000) for mean in means) < 4 * 26
    variants = [
        plan(table, seed=1),
        plan(listing(table.column("path").to_pylist(), sizes=[1001] * 2000)),
        plan(listing(table.column("path").to_pylist(), label=1)),
        plan_shards(
            table, seed=0, shard_max_bytes=20_000, min_shards=4, policy=replace(POLICY, image_max_short_side=65)
        ),
        plan_shards(table, seed=0, shard_max_bytes=20_000, min_shards=4, policy=replace(POLICY, image_max_pixels=65)),
        plan(table),
    ]
    digests = [one.digest for plans in variants for one in plans]
    assert len(digests) == len(set(digests))


def test_the_plan_of_fixed_images_stays():
    # Shards are reused by their plan's digest: if this fails, fix the change rather than the number, or raise SHARD_VERSION
    # or INTAKE_VERSION (3 here).
    count = 3000
    table = listing(
        [f"class{number % 7}/pic é {number:05d}.jpg" for number in range(count)],
        np.random.default_rng(0).integers(100, 9000, count).tolist(),
        ["test" if number % 10 == 0 else "train" for number in range(count)],
    )
    labels = pa.array([number % 7 if number % 11 else -1 for number in range(count)], pa.int32())
    table = table.set_column(3, "label", labels)
    plans = plan_shards(table, seed=3, shard_max_bytes=1_000_000, min_shards=4, policy=IntakePolicy())
    digests = "".join(one.digest for one in plans)
    assert (len(plans), hashlib.sha256(digests.encode()).hexdigest()) == (
        20,
        "e739d706e11cb4560e74e496acbc3de141d4bef1532635f6c6c0a3be73df7e48",
    )


def test_a_plan_does_not_depend_on_the_batches_of_the_table():
    table = listing([f"{number}.jpg" for number in range(500)])
    pieces = pa.concat_tables([table.slice(start, 7) for start in range(0, 500, 7)])
    assert [one.digest for one in plan(pieces)] == [one.digest for one in plan(table)]
    assert [one.samples for one in plan(pieces)] == [one.samples for one in plan(table)]


def test_no_shard_holds_more_than_ten_thousand_samples():
    plans = plan(listing([f"{number}" for number in range(25_000)]), shard_max_bytes=10**12, min_shards=1)
    assert max(one.samples.num_rows for one in plans) <= 10_000


def test_the_manifest_of_fixed_images_stays(tmp_path):
    # The dataset's identity, to which checkpoints are bound: if this fails, fix the change rather than the number.
    store = open_store(str(tmp_path / "source"))
    for number in range(20):
        body = bytes((number * 7 + at * 3) % 256 for at in range(8 * 6 * 3))
        header = struct.pack("<IHHIIiiHHIIiiII", 54 + len(body), 0, 0, 54, 40, 8, 6, 1, 24, 0, len(body), 0, 0, 0, 0)
        store.write(f"{'cat' if number % 3 else 'dog'}/{number:02d}.bmp", b"BM" + header + body)
    inputs = snapshot_of(store.uri, tmp_path / "snapshot", test_share=0.3)
    result = shard(config(store.uri), inputs, attempt(tmp_path / "root"))
    assert result.facts["digest"] == "14049a5567bfa70775c7aaaa1659fcdf709df08b711214378b70f328ed3586dc"


# One shard


@pytest.fixture
def planned(source, tmp_path):
    inputs = snapshot_of(source, tmp_path / "snapshot")
    table = pa.parquet.read_table(io.BytesIO(inputs["snapshot"].store.read("snapshot.parquet")))
    return plan(table)


def test_bytes_do_not_depend_on_who_writes_when_or_in_which_order(planned, source, tmp_path):
    def written(name, order, workers):
        root = open_store(str(tmp_path / name))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(partial(write_shard, source=source, root_uri=root.uri, policy=POLICY), order))
        return {key: digest for key, (digest, _) in objects(root).items()}

    shuffled = random.Random(0).sample(planned, len(planned))
    one = written("one", planned, 1)
    assert len(planned) > 3
    assert len(one) == 2 * len(planned)
    assert written("several", shuffled, 4) == one


def test_a_shard_is_written_once(planned, source, tmp_path):
    root = open_store(str(tmp_path / "root"))
    first = write_shard(planned[0], source=source, root_uri=root.uri, policy=POLICY)
    before = objects(root)
    again = write_shard(planned[0], source=str(tmp_path / "gone"), root_uri=root.uri, policy=POLICY)  # reads no image
    assert objects(root) == before
    assert (first.reused, again.reused) == (False, True)
    assert replace(again, reused=False) == first


def test_killed_between_upload_and_row_writes_only_the_row(planned, source, tmp_path):
    root = open_store(str(tmp_path / "root"))
    row = write_shard(planned[0], source=source, root_uri=root.uri, policy=POLICY)
    whole = objects(root)
    root.delete(row.record_key)
    assert write_shard(planned[0], source=source, root_uri=root.uri, policy=POLICY) == row
    after = objects(root)
    assert after[row.key] == whole[row.key]  # the same file rather than an equal one
    assert after.keys() == whole.keys()


def test_rows_say_where_the_bytes_are(planned, source, tmp_path):
    root = open_store(str(tmp_path / "root"))
    row = write_shard(planned[0], source=source, root_uri=root.uri, policy=POLICY)
    assert row.key == f"shards/{row.sha256[:2]}/{row.sha256}.tar"
    assert hashlib.sha256(root.read(row.key)).hexdigest() == row.sha256
    assert len(root.read(row.key)) == row.bytes
    for sample in read_samples(root, row).to_pylist():
        data = root.read_range(row.key, sample["offset"], sample["length"])
        assert zlib.crc32(data) == sample["crc32"]
        assert hashlib.sha256(data).hexdigest() == sample["sha256"]
        assert Image.open(io.BytesIO(data)).size == (sample["width"], sample["height"]) == (32, 24)
        if sample["policy"] == "kept":
            assert data == open_store(source).read(sample["source"])
    with tarfile.open(root.local_path(row.key)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode) == (
                0,
                0,
                0,
                "root",
                "root",
                0o444,
            )


def test_unlabelled_images_have_no_cls(tmp_path):
    store = open_store(str(tmp_path / "source"))
    store.write("0.jpg", picture(0))
    (one,) = plan(listing(["0.jpg"], label=-1))
    row = write_shard(one, source=store.uri, root_uri=str(tmp_path / "root"), policy=POLICY)
    with tarfile.open(tmp_path / "root" / row.key) as tar:
        assert tar.getnames() == ["000000000000.jpg"]


def test_a_reading_error_is_quarantined_and_tried_again_next_time(source, tmp_path):
    store, root = open_store(source), open_store(str(tmp_path / "root"))
    dangling = tmp_path / "source" / "cat" / "zz.jpg"
    dangling.symlink_to(tmp_path / "mended.jpg")
    (one,) = plan(listing(["cat/01.jpg", "cat/zz.jpg"]), min_shards=1)
    write = partial(write_shard, one, source=store.uri, root_uri=root.uri, policy=POLICY)
    row = write()
    assert [(line["source"], line["reason"]) for line in row.quarantine] == [("cat/zz.jpg", "missing")]
    assert row.samples == read_samples(root, row).num_rows == 1
    (tmp_path / "mended.jpg").write_bytes(picture(99))
    mended = write()
    assert (mended.samples, mended.quarantine, mended.reused) == (2, (), False)
    assert write().reused


def test_a_store_that_is_down_fails_the_task_and_leaves_no_row(planned, tmp_path, s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root = open_store(str(tmp_path / "root"))
    with pytest.raises(StorageError, match="does not answer"):
        write_shard(planned[0], source="s3://bucket/images", root_uri=root.uri, policy=POLICY)
    assert list(root.list()) == []


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    policy = IntakePolicy(image_max_pixels=1)
    (one,) = plan_shards(listing(["absent.jpg"], [2**20 + 9]), seed=0, shard_max_bytes=1, min_shards=1, policy=policy)
    row = write_shard(one, source=str(tmp_path), root_uri=str(tmp_path / "root"), policy=policy)
    assert (row.samples, row.key, row.quarantine[0]["reason"]) == (0, "", "too_many_bytes")


# The stage


def test_counts_add_up_and_other_readers_see_every_sample(source, tmp_path):
    given = attempt(tmp_path / "root")
    result = shard(config(source), snapshot_of(source, tmp_path / "snapshot", test_share=0.3), given)
    counts = result.facts["counts"]
    assert counts["total"] == {"listed": 40, "stored": 40, "served": 40, "duplicates": 0, "quarantined": 0}
    assert sum(split["listed"] for split in counts["splits"].values()) == 40
    assert all(given.store.exists(name) for name in result.files)
    assert given.progress.seen[-1] == (40, 40, "images", {"quarantined": 0})

    manifest = Manifest.open(given.store, given.root)
    assert manifest.digest == result.facts["digest"]
    assert manifest.shards("train").num_rows >= 4
    ours, tars = {}, []
    for split in manifest.splits:
        for row in manifest.shards(split).to_pylist():
            tars.append(str(given.root.local_path(row["key"])))
            for sample in manifest.samples(row["shard"]).to_pylist():
                data = given.root.read_range(row["key"], sample["offset"], sample["length"])
                ours[sample["key"]] = (data, str(sample["label"]).encode())
    theirs = {item["__key__"]: (item["jpg"], item["cls"]) for item in webdataset.WebDataset(tars, shardshuffle=False)}
    assert theirs == ours
    assert len(ours) == 40
    assert manifest.classes == ("cat", "dog")


def test_another_generation_writes_nothing_twice_and_has_the_same_digest(source, tmp_path):
    inputs = snapshot_of(source, tmp_path / "snapshot")
    first = shard(config(source), inputs, attempt(tmp_path / "root"))
    root = open_store(str(tmp_path / "root"))
    shards = objects(root, "shards/") | objects(root, "rows/")
    second = shard(config(source), inputs, attempt(tmp_path / "root", generation=2))
    assert objects(root, "shards/") | objects(root, "rows/") == shards
    assert (first.notes["reused_shards"], second.notes["reused_shards"]) == (0, first.facts["shards"])
    elsewhere = shard(config(source), inputs, attempt(tmp_path / "elsewhere"))
    assert first.facts["digest"] == second.facts["digest"] == elsewhere.facts["digest"]


def test_after_a_kill_only_what_is_missing_is_written(source, tmp_path):
    inputs = snapshot_of(source, tmp_path / "snapshot")
    whole = shard(config(source), inputs, attempt(tmp_path / "whole"))
    given = attempt(tmp_path / "root")

    class Killed(BaseException):
        pass

    class Killer(Bar):
        def update(self, done, total, *, unit, **fields):
            if done > total / 2:
                raise Killed

    with pytest.raises(Killed):
        shard(config(source), inputs, replace(given, progress=Killer()))
    before = objects(given.root)
    assert not any("manifest" in key for key in before)
    done = sum(key.startswith("rows/") for key in before)
    assert 0 < done < whole.facts["shards"]
    result = shard(config(source), inputs, replace(given, generation=2))
    assert result.notes["reused_shards"] == done
    after = objects(given.root)
    assert {key: after[key] for key in before} == before
    assert result.facts["digest"] == whole.facts["digest"]


def test_duplicates_are_stored_and_served_once_in_a_split(source, tmp_path):
    store = open_store(source)
    for path, number in (
        ("train/a/1.jpg", 1),
        ("train/a/2.jpg", 1),
        ("train/a/3.jpg", 1),
        ("train/a/4.jpg", 4),
        ("test/a/9.jpg", 1),
    ):
        store.at("split").write(path, picture(number))
    given = attempt(tmp_path / "root")
    result = shard(config(f"{source}/split"), snapshot_of(f"{source}/split", tmp_path / "snapshot"), given)
    counts = result.facts["counts"]["splits"]
    assert counts["train"] == {"listed": 4, "stored": 4, "served": 2, "duplicates": 2, "quarantined": 0}
    assert counts["test"] == {"listed": 1, "stored": 1, "served": 1, "duplicates": 0, "quarantined": 0}
    assert result.facts["duplicates_across_splits"] == 1
    manifest = Manifest.open(given.store, given.root)
    shards = manifest.shards("train").to_pylist()
    served = [row["source"] for line in shards for row in manifest.samples(line["shard"]).to_pylist()]
    assert sorted(served) == ["train/a/1.jpg", "train/a/4.jpg"]  # the lowest sample id of the three
    assert sum(line["served"] for line in shards) == 2
    assert result.facts["contradicting_labels"] == {"images": 0, "copies": 0, "examples": []}


def test_copies_with_different_labels_are_served_under_each_and_named(source, tmp_path):
    store = open_store(source)
    places = {
        "train/a/1.jpg": 1,
        "train/b/2.jpg": 1,
        "train/b/3.jpg": 1,
        "train/b/4.jpg": 4,
        "train/free.jpg": 4,
        "test/a/9.jpg": 9,
        "test/b/8.jpg": 8,
        "train/b/9.jpg": 9,
    }
    for path, number in places.items():
        store.at("split").write(path, picture(number))
    given = attempt(tmp_path / "root")
    result = shard(config(f"{source}/split"), snapshot_of(f"{source}/split", tmp_path / "snapshot"), given)
    assert result.facts["counts"]["splits"]["train"]["duplicates"] == 2
    manifest = Manifest.open(given.store, given.root)
    served = [row["source"] for n in manifest.shard_numbers for row in manifest.samples(n).to_pylist()]
    # a and b keep one copy of image 1 each; the unlabelled copy of image 4 goes, though its id is higher only by its name
    assert sorted(set(places) - set(served)) == ["train/b/3.jpg", "train/free.jpg"]
    found = result.facts["contradicting_labels"]
    assert (found["images"], found["copies"]) == (2, 5)
    assert {frozenset((one["source"], one["label"]) for one in pair) for pair in found["examples"]} == {
        frozenset([("train/a/1.jpg", "a"), ("train/b/2.jpg", "b")]),
        frozenset([("test/a/9.jpg", "a"), ("train/b/9.jpg", "b")]),
    }


def spoil(source, *numbers):
    for number in numbers:
        open_store(source).write(f"dog/bad{number}.jpg", b"no image %d" % number)


def test_a_few_bad_images_are_quarantined_with_reasons(source, tmp_path):
    spoil(source, 1)
    (tmp_path / "source" / "cat" / "zz.jpg").symlink_to("nowhere")
    inputs = snapshot_of(source, tmp_path / "snapshot")
    result = shard(config(source), inputs, attempt(tmp_path / "root"))
    assert result.facts["counts"]["total"] == {
        "listed": 42,
        "stored": 40,
        "served": 40,
        "duplicates": 0,
        "quarantined": 2,
    }
    assert result.facts["quarantined"] == 2
    assert result.facts["bad_share"] == pytest.approx(2 / 42)
    assert result.facts["quarantine_examples"] == [
        {"source": "cat/zz.jpg", "reason": "missing"},
        {"source": "dog/bad1.jpg", "reason": "unreadable"},
    ]


def test_too_many_bad_images_stop_and_keep_what_was_written(source, tmp_path):
    spoil(source, *range(5))
    inputs = snapshot_of(source, tmp_path / "snapshot")
    given = attempt(tmp_path / "root")
    with pytest.raises(DataError, match=r"of 45 images are bad.*dog/bad\d\.jpg \(unreadable.*data\.bad_share_stop"):
        shard(config(source), inputs, given)
    assert not given.store.exists("manifest.json")
    kept = sum(1 for _ in given.root.list("rows/"))
    assert kept > 0
    result = shard(config(source), inputs, attempt(tmp_path / "root", generation=2, bad_share_stop=0.2))
    assert result.notes["reused_shards"] == kept
    assert result.facts["counts"]["total"]["quarantined"] == 5


def test_the_stop_names_counts_share_and_three_files():
    bad = [{"source": f"{number}.jpg", "reason": "empty", "detail": "0 bytes"} for number in range(6)]
    check_bad_share(100, bad[:5], bad_share_stop=0.05)  # exactly the share still passes
    with pytest.raises(DataError) as caught:
        check_bad_share(100, bad, bad_share_stop=0.05)
    message = str(caught.value)
    assert message.startswith("6 of 100 images are bad (6.0%), more than data.bad_share_stop=0.05 allows")
    assert "0.jpg (empty: 0 bytes); 1.jpg" in message
    assert "3.jpg" not in message


def test_a_source_in_which_nothing_is_an_image(tmp_path):
    spoil(str(tmp_path / "source"), 1, 2)
    inputs = snapshot_of(str(tmp_path / "source"), tmp_path / "snapshot")
    with pytest.raises(DataError, match=r"of 2 images are bad"):
        shard(config(str(tmp_path / "source")), inputs, attempt(tmp_path / "root"))
    result = shard(config(str(tmp_path / "source")), inputs, attempt(tmp_path / "root", bad_share_stop=1.0))
    assert result.facts["shards"] == 0
    assert result.facts["counts"]["total"] == {"listed": 2, "stored": 0, "served": 0, "duplicates": 0, "quarantined": 2}


def test_from_bucket_to_bucket_the_digest_is_that_of_the_folder(source, tmp_path, s3_bucket):
    here = shard(config(source), snapshot_of(source, tmp_path / "snapshot"), attempt(tmp_path / "root"))
    there = f"s3://{s3_bucket}/images"
    for item in open_store(source).list():
        open_store(there).upload(item.key, tmp_path / "source" / item.key)
    given = attempt(f"s3://{s3_bucket}/step")
    result = shard(config(there), snapshot_of(there, f"s3://{s3_bucket}/snapshot"), given)
    assert result.facts["digest"] == here.facts["digest"]
    manifest = Manifest.open(given.store, given.root)
    assert sum(manifest.samples(number).num_rows for number in range(result.facts["shards"])) == 40
    assert json.loads(given.store.read("manifest.json"))["digest"] == manifest.digest


@pytest.mark.parametrize("field", ["shard_max_bytes", "min_shards", "image_max_short_side", "image_max_pixels"])
def test_limits_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field}=0"):
        ShardStageConfig(**{"source": "x", "seed": 0, "shard_max_bytes": 1} | {field: 0})
