"""What is listed, in which split and class; the snapshot stage over real folders and a real bucket."""

import io

import pyarrow.parquet as pq
import pytest

from pipeline.cluster.resources import Resources
from pipeline.data.snapshots import writer
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.data.sources.listing import list_source
from pipeline.data.sources.splits import FolderEvidence, find_layout, split_and_label
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import Attempt
from pipeline.stages.snapshot import snapshot
from pipeline.storage import open_store


class Quiet:
    def update(self, done, total, *, unit, **fields):
        pass


def fill(source, *paths):
    store = open_store(str(source))
    for path in paths:
        store.write(path, path.encode())
    return str(source)


def take(source, tmp_path, **options):
    """Return the facts, and the rows as (path, split, class)."""
    attempt = Attempt(str(tmp_path / "step"), 1, "", "snapshot", "f", Resources(), "in_process", Quiet())
    config = SnapshotConfig(source=source, **{"test_share": 0.0, "seed": 0} | options)
    result = snapshot(config, {}, attempt)
    assert result.files == ("snapshot.parquet",)
    table = pq.read_table(io.BytesIO(attempt.store.read("snapshot.parquet")))
    names = [*result.facts["classes"], None]  # label -1 is the last
    return result.facts, [(row["path"], row["split"], names[row["label"]]) for row in table.to_pylist()], table


def test_class_folders_in_one_pool(tmp_path):
    source = fill(
        tmp_path / "s", "dog/b.JPG", "cat/deep/er/a.png", "cat/z.jpeg", "cat/notes.txt", ".hidden.jpg", ".d/x.jpg"
    )
    facts, rows, table = take(source, tmp_path)
    assert rows == [
        ("cat/deep/er/a.png", "train", "cat"),
        ("cat/z.jpeg", "train", "cat"),
        ("dog/b.JPG", "train", "dog"),
    ]
    assert table.column("sample_id").to_pylist() == [0, 1, 2]
    assert table.column("size").to_pylist() == [17, 10, 9]
    assert facts == {
        "kind": "images",
        "listed": 3,
        "ignored": 3,
        "classes": ["cat", "dog"],
        "splits": {"train": 3},
        "source": source,
        "understood": {
            "origin": "hash",
            "splits": {
                "train": {
                    "images": 3,
                    "labelled": 3,
                    "classes": 2,
                    "not_in_train": [],
                    "examples": [row[0] for row in rows],
                }
            },
            "passed_over": {"hidden": 2, ".txt": 1},
            "notes": [],
        },
    }


def test_split_folders_share_their_classes(tmp_path):
    source = fill(
        tmp_path / "s", "train/dog/1.jpg", "train/cat/1.jpg", "validation/ant/1.jpg", "test/dog/1.jpg", "README.md"
    )
    facts, rows, _ = take(source, tmp_path, test_share=0.9)
    assert rows == [
        ("test/dog/1.jpg", "test", "dog"),
        ("train/cat/1.jpg", "train", "cat"),
        ("train/dog/1.jpg", "train", "dog"),
        ("validation/ant/1.jpg", "val", "ant"),
    ]
    assert facts["classes"] == ["ant", "cat", "dog"]


def test_a_class_called_train_among_others_is_a_class_if_the_configuration_says_so(tmp_path):
    source = fill(tmp_path / "s", "car/1.jpg", "train/1.jpg")
    with pytest.raises(DataError, match=r"train: train/1\.jpg.*car/1\.jpg.*data\.split_from: hash"):
        take(source, tmp_path)
    facts, rows, _ = take(source, tmp_path, split_from="hash")
    assert facts["classes"] == ["car", "train"]
    assert {split for _, split, _ in rows} == {"train"}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_flat_images_have_no_label(tmp_path, prefix):
    facts, rows, table = take(fill(tmp_path / "s", f"{prefix}1.jpg", f"{prefix}2.jpg"), tmp_path)
    assert facts["classes"] == []
    assert [split for _, split, _ in rows] == ["train", "train"]
    assert table.column("label").to_pylist() == [-1, -1]


def test_images_next_to_split_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"some images \(train: train/1\.jpg\) and not of others \(stray\.jpg\)"):
        take(fill(tmp_path / "s", "train/1.jpg", "stray.jpg"), tmp_path)


def test_the_test_share_is_a_stable_random_choice():
    layout = find_layout(FolderEvidence().add_all(["a/0.jpg"]))
    paths = [f"a/{number}.jpg" for number in range(10_000)]

    def chosen(share, seed):
        return {path for path in paths if split_and_label(path, layout, test_share=share, seed=seed)[0] == "test"}

    assert abs(len(chosen(0.1, 0)) - 1000) < 120  # four standard deviations of a fair draw
    assert chosen(0.1, 0) == chosen(0.1, 0)
    assert chosen(0.1, 0) < chosen(0.2, 0)  # a larger share adds images and removes none
    assert abs(len(chosen(0.1, 0) & chosen(0.1, 1)) - 100) < 40


def test_the_batch_size_does_not_matter(tmp_path, monkeypatch):
    source = fill(tmp_path / "s", *(f"{name}/{number}.jpg" for name in "ab" for number in range(7)), "b/x.txt")
    whole = take(source, tmp_path)
    monkeypatch.setattr(writer, "BATCH_ROWS", 4)
    pieces = take(source, tmp_path)
    assert pieces[:2] == whole[:2]
    assert pieces[2].equals(whole[2])


def test_a_bucket_is_listed_like_a_folder(tmp_path, s3_bucket):
    paths = ("train/cat/1.jpg", "train/dog/2.png", "val/cat/3.jpg", "train/cat/Thumbs.db")
    here = take(fill(tmp_path / "s", *paths), tmp_path)
    there = take(fill(f"s3://{s3_bucket}/images", *paths), tmp_path)
    assert there[2].equals(here[2])
    assert there[0] | {"source": ""} == here[0] | {"source": ""}


def test_unusable_sources_name_the_path_and_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist.*class folders"):
        list(list_source(str(tmp_path / "nowhere")))
    (tmp_path / "file.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"file.tar is a file"):
        list(list_source(str(tmp_path / "file.tar")))
    fill(tmp_path / "s", "notes.txt")
    with pytest.raises(DataError, match=r"/s' holds no images \(1 other files\).*\.jpg"):
        list(list_source(str(tmp_path / "s")))
    with pytest.raises(ConfigError, match="file:///absolute/folder"):
        list(list_source("gs://bucket"))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (("a/1.jpg", "b/x.tar"), r"holds images \(a/1\.jpg\) and tars \(b/x\.tar\)\. Move one kind out"),
        (("1.tar", "2.parquet"), r"holds tars \(1\.tar\) and Parquet tables \(2\.parquet\)"),
        (
            ("1.tar.gz", "2.tgz"),
            r"holds no images \(2 other files\)\. Compressed tars cannot be read by offset: unpack them",
        ),
    ],
)
def test_a_source_holds_one_kind(tmp_path, paths, words):
    with pytest.raises(DataError, match=words):
        list(list_source(fill(tmp_path / "s", *paths)))


def test_names_that_are_not_text_are_refused(tmp_path):
    with open(bytes(tmp_path) + b"/\xff.jpg", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(DataError, match=r"not UTF-8.*convmv"):
        list(list_source(str(tmp_path)))


def test_a_share_outside_the_range_is_refused():
    with pytest.raises(ConfigError, match=r"test_share=10.*0\.1 for 10 %"):
        SnapshotConfig(source="x", test_share=10, seed=0)
