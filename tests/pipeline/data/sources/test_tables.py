"""Parquet tables with image bytes: every row once, in our own tars, the same for any number of tasks."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_kit import all_objects, attempt, listed, picture, quarantined, sharded, stored, write_table

from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sharding.shard_plan import open_snapshot, plan_shards
from pipeline.data.sharding.shard_writer import write_shard
from pipeline.data.sources.tables import TableColumns, list_rows, read_images
from pipeline.errors import DataError
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.storage import open_store


@pytest.fixture
def source(tmp_path):
    """Two tables, 35 and 20 rows, in row groups of ten; labels are words."""
    for file, rows in (("a", range(35)), ("b", range(35, 55))):
        columns = {"image": [picture(row) for row in rows], "label": [("cat", "dog", None)[row % 3] for row in rows]}
        write_table(tmp_path / "source" / f"{file}.parquet", columns)
    return str(tmp_path / "source")


def number_of(name):
    file, row = name.split("#")
    return int(row) + (35 if file == "b.parquet" else 0)


def test_every_row_is_stored_with_its_bytes_and_label(source, tmp_path):
    shards = sharded(source, listed(source, tmp_path / "snapshot", test_share=0.3), tmp_path / "root")
    assert shards.facts["counts"]["total"]["stored"] == 55
    assert set(shards.facts["splits"]) == {"train", "test"}
    assert shards.facts["classes"] == ["cat", "dog"]
    rows = stored(shards)
    assert len(rows) == 55
    for name, row in rows.items():
        number = number_of(name)
        assert row["data"] == picture(number)
        assert (row["sample_id"], row["class"]) == (number, ("cat", "dog", None)[number % 3])


def test_the_snapshot_counts_what_it_lists(source, tmp_path):
    facts = listed(source, tmp_path / "snapshot").facts
    assert {name: facts[name] for name in ("kind", "listed", "ignored", "unlabelled", "splits")} == {
        "kind": "Parquet tables",
        "listed": 55,
        "ignored": 0,
        "unlabelled": 18,
        "splits": {"train": 55},
    }


def test_hugging_faces_structs_numbers_and_splits_by_name(tmp_path):
    for split, rows in (("train", range(20)), ("validation", range(20, 30))):
        images = [{"bytes": picture(row, "PNG"), "path": f"{row}.png"} for row in rows]
        images[3] = {"bytes": None, "path": "elsewhere.png"}
        columns = {"img": images, "label": pa.array([row % 12 for row in rows]), "caption": ["x"] * len(rows)}
        write_table(tmp_path / "source" / f"data/{split}-00000-of-00001.parquet", columns)
    source = str(tmp_path / "source")
    listing = listed(source, tmp_path / "snapshot", image_column="img", test_share=0.5)
    shards = sharded(source, listing, tmp_path / "root", image_column="img", bad_share_stop=0.1)
    assert listing.facts["splits"] == {"train": 20, "val": 10}
    assert shards.facts["classes"] == [str(label) for label in range(12)]
    assert quarantined(shards) == {
        "data/train-00000-of-00001.parquet#3": "missing",
        "data/validation-00000-of-00001.parquet#3": "missing",
    }
    assert all(str(row["label"]) == row["class"] for row in stored(shards).values())


def test_a_column_gives_the_split_and_the_hash_where_it_is_empty(tmp_path):
    splits = ["train", "test", "validation", None] * 10
    columns = {"image": [picture(row) for row in range(40)], "part": splits}
    source = write_table(tmp_path / "source" / "a.parquet", columns)
    listing = listed(source, tmp_path / "snapshot", split_column="part", test_share=0.5)
    rows = stored(sharded(source, listing, tmp_path / "root"))
    splits = [rows[f"a.parquet#{row}"]["split"] for row in range(40)]
    assert [set(splits[first::4]) for first in range(3)] == [{"train"}, {"test"}, {"val"}]
    assert set(splits[3::4]) == {"train", "test"}
    assert all(row["label"] == -1 for row in rows.values())


# The plan


def planned(source, folder, *, shard_max_bytes=20_000, min_shards=4):
    listing = listed(source, folder)
    with open_snapshot(listing.store) as table:
        plans = plan_shards(
            table,
            seed=0,
            shard_max_bytes=shard_max_bytes,
            min_shards=min_shards,
            policy=IntakePolicy(),
            image_column="image",
        )
        return list(plans)


def test_small_row_groups_are_not_cut_and_rows_are_shuffled_within_a_shard(tmp_path):
    columns = {"image": [picture(row, size=(4, 4)) for row in range(400)]}
    source = write_table(tmp_path / "source" / "a.parquet", columns, rows_per_group=5)
    plans = planned(source, tmp_path / "snapshot", shard_max_bytes=150_000, min_shards=4)
    assert len(plans) >= 4
    groups = [set(plan.samples.column("row_group").to_pylist()) for plan in plans]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 80
    ids = plans[0].samples.column("sample_id").to_numpy()
    assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.5
    assert max(groups[0]) - min(groups[0]) > len(groups[0])  # groups are drawn from everywhere


def test_a_row_group_larger_than_a_shard_is_cut_and_no_row_lost(tmp_path):
    columns = {"image": [picture(row) for row in range(60)]}
    source = write_table(tmp_path / "source" / "a.parquet", columns, rows_per_group=60)
    plans = planned(source, tmp_path / "snapshot", shard_max_bytes=20_000)
    ids = [row for plan in plans for row in plan.samples.column("sample_id").to_pylist()]
    assert sorted(ids) == list(range(60))
    assert len(plans) > 4


def test_each_row_group_of_a_task_is_read_once_and_others_not_at_all(source, monkeypatch):
    read = []
    original = pq.ParquetFile.iter_batches

    def watched(self, *args, **options):
        read.append((tuple(options["columns"]), tuple(options["row_groups"])))
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    rows = pa.table(
        {"path": ["a.parquet#33", "b.parquet#0", "a.parquet#12", "a.parquet#10"], "row_group": [3, 0, 1, 1]}
    )
    found = dict(read_images(source, rows, "image"))
    assert found == {name: picture(number_of(name)) for name in rows.column("path").to_pylist()}
    assert read == [(("image",), (1,)), (("image",), (3,)), (("image",), (0,))]


# Bytes, repetition, buckets


def test_bytes_do_not_depend_on_who_writes_when_or_in_which_order(source, tmp_path):
    plans = planned(source, tmp_path / "snapshot")

    def written(name, order, workers):
        root = open_store(str(tmp_path / name))
        write = partial(write_shard, source=source, root_uri=root.uri, policy=IntakePolicy(), image_column="image")
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(write, order))
        return all_objects(tmp_path / name)

    one = written("one", plans, 1)
    assert written("eight", random.Random(0).sample(plans, len(plans)), 8) == one


def test_again_nothing_is_written_and_after_a_kill_what_is_missing(source, tmp_path):
    listing = listed(source, tmp_path / "snapshot")
    whole = sharded(source, listing, tmp_path / "whole")

    class Killed(BaseException):
        pass

    class Killer:
        def update(self, done, total, *, unit, **fields):
            if done > total / 2:
                raise Killed

    config = ShardStageConfig(source=source, seed=0, shard_max_bytes=20_000, min_shards=4)
    with pytest.raises(Killed):
        shard(config, {"snapshot": listing}, replace(attempt(tmp_path / "root"), progress=Killer()))
    before = all_objects(tmp_path / "root")
    done = sum(key.startswith("rows/") for key in before)
    assert 0 < done < whole.facts["shards"]
    again = sharded(source, listing, tmp_path / "root", generation=2)
    assert again.made["notes"] == {"reused_shards": done}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*") if "/g000" not in str(path)}
    third = sharded(source, listing, tmp_path / "root", generation=3)
    assert third.made["notes"] == {"reused_shards": whole.facts["shards"]}
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*") if "/g000" not in str(path)}
    assert {path for path in times if path.is_file()} == {path for path in after if path.is_file()}
    assert all(after[path] == times[path] for path in times if path.is_file())
    assert whole.facts["digest"] == again.facts["digest"] == third.facts["digest"]


def test_a_bucket_gives_the_digest_of_the_folder(source, tmp_path, s3_bucket):
    here = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    there = f"s3://{s3_bucket}/tables"
    for item in open_store(source).list():
        open_store(there).upload(item.key, Path(source) / item.key)
    shards = sharded(there, listed(there, f"s3://{s3_bucket}/snapshot"), f"s3://{s3_bucket}/step")
    assert shards.facts["digest"] == here.facts["digest"]


# What is refused


def test_columns_that_are_missing_or_hold_something_else(tmp_path):
    columns = {"picture": [picture(0)], "label": [0.5], "text": ["a"], "part": ["holdout"]}
    source = write_table(tmp_path / "source" / "a.parquet", columns)

    def refusal(image="picture", label=None, split=None):
        with pytest.raises(DataError) as caught:
            list(list_rows(source, "a.parquet", 1, TableColumns(image, label, split), batch_rows=10))
        return str(caught.value)

    assert "a.parquet has no column 'image', only picture, label, text, part" in refusal(image="image")
    assert "column 'text' is string, neither bytes nor a struct with bytes" in refusal(image="text")
    assert "the labels are of type double. Write whole numbers or text" in refusal(label="label")
    assert "has no column 'klass' (data.label_column)" in refusal(label="klass")
    assert "split 'holdout' is unknown" in refusal(split="part")
    (Path(source) / "b.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as a Parquet table"):
        listed(source, tmp_path / "snapshot", image_column="picture", label_column=None)


def test_a_table_that_has_changed_since_it_was_listed_is_named(source, tmp_path):
    listing = listed(source, tmp_path / "snapshot")
    write_table(Path(source) / "a.parquet", {"image": [picture(0)] * 3})
    with pytest.raises(DataError, match=r"a\.parquet: row \d+ of row group \d no longer exists"):
        sharded(source, listing, tmp_path / "root")
    (Path(source) / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as a Parquet table"):
        sharded(source, listing, tmp_path / "root")


def test_captions_are_not_classes(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.snapshots.writer.CLASSES_MAX", 1)
    with pytest.raises(
        DataError, match=r"'label' has more than 1 distinct values.*data\.label_column to .*, or to null"
    ):
        listed(source, tmp_path / "snapshot")
