"""A table beside the images labels those that no folder does, as in Tiny-ImageNet; whatever is not such a table labels nothing."""

import pytest
from data_kit import listed, picture, sharded, stored

from pipeline.data.snapshots import writer
from pipeline.storage import open_store

CLASSES = ("n01443537", "n01629819")
PER_CLASS = 3
ANNOTATED = [("val_0.JPEG", CLASSES[1]), ("val_1.JPEG", CLASSES[0]), ("val_2.JPEG", CLASSES[1])]


def lines(rows):
    return "".join(f"{name}\t{label}\t0\t32\t44\t62\n" for name, label in rows).encode()


@pytest.fixture
def tiny(tmp_path):
    """The layout of tiny-imagenet-200, with its tables of boxes."""
    store = open_store(str(tmp_path / "tiny-imagenet-200"))
    number = 0
    for label in CLASSES:
        names = [f"{label}_{index}.JPEG" for index in range(PER_CLASS)]
        for name in names:
            store.write(f"train/{label}/images/{name}", picture(number := number + 1))
        store.write(f"train/{label}/{label}_boxes.txt", "".join(f"{name}\t0\t10\t63\t58\n" for name in names).encode())
    for split in ("val", "test"):
        for index in range(len(ANNOTATED)):
            store.write(f"{split}/images/{split}_{index}.JPEG", picture(number := number + 1))
    store.write("val/val_annotations.txt", lines(ANNOTATED))
    store.write("wnids.txt", "\n".join(CLASSES).encode())
    return store


def labels_of(store, tmp_path):
    facts = listed(str(store.root), tmp_path / "snapshot").facts
    return facts, {split: one["labelled"] for split, one in facts["understood"]["splits"].items()}


@pytest.mark.parametrize("batch", [1, 50_000])
def test_tiny_imagenet_is_read_as_people_have_it(tiny, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(writer, "BATCH_ROWS", batch)
    source = str(tiny.root)
    listing = listed(source, tmp_path / "snapshot")
    assert listing.facts["classes"] == list(CLASSES)
    assert listing.facts["splits"] == {"test": 3, "train": 6, "val": 3}
    assert listing.facts["image_folders"] is True
    assert listing.facts["label_tables"]["val/val_annotations.txt"]["images"] == 3
    assert not listing.facts["understood"]["notes"]
    rows = stored(sharded(source, listing, tmp_path / "shards"))
    assert {path: row["class"] for path, row in rows.items()} == {
        **{f"train/{label}/images/{label}_{index}.JPEG": label for label in CLASSES for index in range(PER_CLASS)},
        **{f"val/images/{name}": label for name, label in ANNOTATED},
        **{f"test/images/test_{index}.JPEG": None for index in range(3)},
    }


def test_a_bucket_is_read_in_the_same_way(tiny, tmp_path, s3_bucket):
    there = open_store(f"s3://{s3_bucket}/tiny")
    for key, _ in list(tiny.list()):
        there.write(key, tiny.read(key))
    here, _ = labels_of(tiny, tmp_path)
    facts = listed(there.uri, tmp_path / "other").facts
    assert facts | {"source": ""} == here | {"source": ""}


def test_images_that_the_table_leaves_out_are_told(tiny, tmp_path):
    tiny.write("val/val_annotations.txt", lines([ANNOTATED[0], ("val_1.JPEG", "n99999999"), ("gone.JPEG", CLASSES[0])]))
    facts, labelled = labels_of(tiny, tmp_path)
    assert labelled == {"test": 0, "train": 6, "val": 1}
    (note,) = facts["understood"]["notes"]
    assert note.startswith("val/val_annotations.txt labels 1 of the 3 images beside it")


@pytest.mark.parametrize(
    "content",
    [
        b"val_0.JPEG\t0\t32\t44\t62\n",  # boxes
        b"val_0.JPEG n01443537\n",  # no tabs
        b"\xff\xfe\x00",
        lines([ANNOTATED[0], ("val_0.JPEG", CLASSES[0])]),  # two classes for one image
    ],
)
def test_a_file_that_is_no_such_table_labels_nothing_and_is_told(tiny, tmp_path, content):
    tiny.write("val/val_annotations.txt", content)
    facts, labelled = labels_of(tiny, tmp_path)
    assert labelled["val"] == 0
    assert "label_tables" not in facts
    assert "labels 0 of the 3 images" in facts["understood"]["notes"][0]


def test_two_tables_in_a_folder_are_none(tiny, tmp_path):
    tiny.write("val/old_annotations.txt", lines(ANNOTATED))
    assert labels_of(tiny, tmp_path)[1]["val"] == 0


def test_a_folder_decides_before_a_table(tiny, tmp_path):
    other = lines([(f"{CLASSES[0]}_{index}.JPEG", CLASSES[1]) for index in range(PER_CLASS)])
    tiny.write(f"train/{CLASSES[0]}/train_annotations.txt", other)
    facts, _ = labels_of(tiny, tmp_path)
    assert list(facts["label_tables"]) == ["val/val_annotations.txt"]


def test_a_labels_file_takes_the_place_of_folders_and_tables(tiny, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\nval/images/val_0.JPEG,a\n")
    facts = listed(str(tiny.root), tmp_path / "snapshot", labels=str(tmp_path / "labels.csv")).facts
    assert facts["classes"] == ["a"]
    assert not {"label_tables", "image_folders"} & facts.keys()
