"""Labels from a file are matched by path and streamed with the listing; a mismatch is an error or counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_kit import listed, picture, sharded, stored

from pipeline.data.snapshots import writer
from pipeline.data.sources.labels import Labels
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.storage import open_store

PATHS = ["a/0.jpg", "a/1.jpg", "b/0.jpg", "b/ä.jpg", "c.jpg"]


@pytest.fixture
def source(tmp_path):
    for number, path in enumerate(PATHS):
        open_store(str(tmp_path / "source")).write(path, picture(number))
    return str(tmp_path / "source")


def write(path, rows, kind):
    file = path / f"labels.{kind}"
    if kind == "csv":
        names = list(rows[0])
        lines = [
            ",".join(names),
            *(",".join("" if row.get(name) is None else str(row[name]) for name in names) for row in rows),
        ]
        file.write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return str(file)


ROWS = [
    {"path": "c.jpg", "label": "NA", "split": "test"},
    {"path": "a/1.jpg", "label": "dog", "split": None},
    {"path": "b/ä.jpg", "label": "NA", "split": "validation"},
    {"path": "a/0.jpg", "label": None, "split": "train"},
]


@pytest.mark.parametrize("batch", [1, 2, 50_000])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_gives_labels_and_splits(source, tmp_path, monkeypatch, kind, batch):
    monkeypatch.setattr(writer, "BATCH_ROWS", batch)
    listing = listed(source, tmp_path / "snapshot", labels=write(tmp_path, ROWS, kind))
    assert listing.facts["classes"] == ["NA", "dog"]  # no word means "missing", and folders are no labels
    assert listing.facts["unlabelled"] == 2  # one without a row, one without a label
    rows = stored(sharded(source, listing, tmp_path / "root"))
    assert {path: (row["class"], row["split"]) for path, row in rows.items()} == {
        "a/0.jpg": (None, "train"),
        "a/1.jpg": ("dog", "train"),
        "b/0.jpg": (None, "train"),
        "b/ä.jpg": ("NA", "val"),
        "c.jpg": ("NA", "test"),
    }


def test_numbers_keep_their_value_and_negative_ones_mean_no_label(source, tmp_path):
    rows = [{"path": path, "label": label} for path, label in zip(PATHS, [10, 2, -1, 2, 0], strict=True)]
    for kind in ("csv", "jsonl", "parquet"):
        labels = Labels(write(tmp_path, rows, kind))
        assert labels.classes == ("0", "2", "10")


def test_a_labels_file_inside_the_source_is_not_listed(source):
    labels = write(open_store(source).local_path("x").parent, ROWS, "parquet")
    listing = listed(source, f"{source}/../snapshot", labels=labels)
    assert (listing.facts["kind"], listing.facts["ignored"], listing.facts["listed"]) == ("images", 1, 5)


def test_paths_that_are_not_in_the_source_are_an_error_that_names_three(source, tmp_path):
    strange = [{"path": f"{letter}.jpg", "label": "x"} for letter in ("z", "A", "bb", "b/0")]
    labels = write(tmp_path, [*ROWS, *strange], "jsonl")
    with pytest.raises(DataError, match=r"3 of its 8 paths are not images of .*: A\.jpg, bb\.jpg, z\.jpg\. Write them"):
        listed(source, tmp_path / "snapshot", labels=labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na,1\na,2\n", r"labels\.csv \(data\.labels\) names 'a' twice"),
        ("path,label,split\na,1,holdout\n", r"split 'holdout' is unknown\. Write train, val or test"),
        ("file,label\na,1\n", "has no column 'path', only file, label"),
        ("path,label\n,1\n", "1 rows have no path"),
        ("", "cannot be read as csv"),
        ("path,label\na,1\nb\n", "cannot be read as csv"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, text, words):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        Labels(str(tmp_path / "labels.csv"))


def test_other_files_and_missing_ones_are_refused(source, tmp_path):
    with pytest.raises(DataError, match=r"labels\.xlsx' is not a table\. Give a \.csv"):
        Labels(str(tmp_path / "labels.xlsx"))
    with pytest.raises(StorageError, match=r"labels\.csv"):
        Labels(str(tmp_path / "labels.csv"))
    pq.write_table(pa.table({"path": ["a"], "label": [0.5]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match=r"the labels are of type double\. Write whole numbers or text"):
        Labels(str(tmp_path / "labels.parquet"))


def test_labels_are_for_images(tmp_path):
    open_store(str(tmp_path / "source")).write("x.tar", b"")
    with pytest.raises(ConfigError, match=r"works only for folders of images; .*source holds tars"):
        listed(str(tmp_path / "source"), tmp_path / "snapshot", labels=write(tmp_path, ROWS, "csv"))


def test_from_a_bucket(source, tmp_path, s3_bucket):
    store = open_store(f"s3://{s3_bucket}/x")
    store.upload("labels.csv", open_store(str(tmp_path)).local_path(write(tmp_path, ROWS, "csv").rpartition("/")[2]))
    labels = Labels(f"s3://{s3_bucket}/x/labels.csv")
    assert labels.match(PATHS).labels == [None, "dog", None, "NA", "NA"]
    labels.check_all_known(source)
