"""Layouts of sources as they are found in the wild: each is read as its author meant it, or refused with a way out.

One row per situation, built from names alone (tables: from a few empty images). Only the listing runs: all takes seconds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_kit import listed

from pipeline.errors import ConfigError, DataError


@dataclass(frozen=True)
class Listed:
    """What a layout is read as."""

    splits: Mapping[str, int]
    classes: Sequence[str] = ()
    origin: str = "folders"
    notes: Sequence[str] = ()
    """Words that the notes of the listing contain."""


@dataclass(frozen=True)
class Refused:
    """The words of the error, as a pattern."""

    words: str


@dataclass(frozen=True)
class Situation:
    """A source and what becomes of it."""

    name: str
    files: Sequence[str]
    expected: Listed | Refused
    options: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    labels: str = ""


def each(folders: Sequence[str], *, names: Sequence[str] = ("1.jpg", "2.jpg")) -> list[str]:
    return [f"{folder}/{name}" for folder in folders for name in names]


def classes_in(splits: Sequence[str], *, above: str = "", classes: Sequence[str] = ("cat", "dog")) -> list[str]:
    return each([f"{above}{split}/{name}" for split in splits for name in classes])


def table(
    rows: int, *, names: Sequence[str] = (), metadata: Mapping[str, Any] | None = None, **columns: Any
) -> pa.Table:
    made = pa.table({"image": pa.array([b""] * rows, pa.binary()), **columns})
    if names:
        info = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        return made.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    return made.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()}) if metadata else made


BOTH = ("cat", "dog")
THREE = {"train": 4, "val": 4, "test": 4}
TWO = {"train": 4, "test": 4}
INFO = {"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}

SITUATIONS = [
    # --- split folders at the top -------------------------------------------------------------------------------------------
    Situation("documented", classes_in(["train", "val", "test"]), Listed(THREE, BOTH)),
    Situation("validation", classes_in(["train", "validation", "test"]), Listed(THREE, BOTH)),
    Situation("roboflow says valid", classes_in(["train", "valid", "test"]), Listed(THREE, BOTH)),
    Situation("dev", classes_in(["train", "dev", "test"]), Listed(THREE, BOTH)),
    Situation("capitals", classes_in(["Train", "Test"]), Listed(TWO, BOTH)),
    Situation("upper case", classes_in(["TRAIN", "VAL", "TEST"]), Listed(THREE, BOTH)),
    Situation("kaggle says Training and Testing", classes_in(["Training", "Testing"]), Listed(TWO, BOTH)),
    Situation("training and testing", classes_in(["training", "testing"]), Listed(TWO, BOTH)),
    Situation("train and val only", classes_in(["train", "val"]), Listed({"train": 4, "val": 4}, BOTH)),
    Situation("train only", classes_in(["train"]), Listed({"train": 4}, BOTH)),
    Situation("flat splits", each(["train", "test"]), Listed({"train": 2, "test": 2})),
    Situation(
        "imagenet's flat test folder", [*classes_in(["train"]), *each(["test"])], Listed({"train": 4, "test": 2}, BOTH)
    ),
    Situation(
        "tiny imagenet",
        ["train/n01/images/1.JPEG", "val/images/1.JPEG", "test/images/1.JPEG"],
        Listed({"train": 1, "val": 1, "test": 1}, ("n01",)),
    ),
    Situation("yolo's folders", each(["train/images", "valid/images"]), Listed({"train": 2, "val": 2})),
    Situation("images in a folder of theirs", each(["images"]), Listed({"train": 2}, (), "hash")),
    Situation("a class called images", each(["images", "cat"]), Listed({"train": 4}, ("cat", "images"), "hash")),
    Situation("images below the classes", each(["cat/IMG", "dog/images"]), Listed({"train": 4}, BOTH, "hash")),
    Situation(
        "images below splits below classes",
        each(["cat/train/images", "dog/test/images"]),
        Listed({"train": 2, "test": 2}, BOTH),
    ),
    Situation("two folders of that name", each(["train/images/images"]), Listed({"train": 2})),
    Situation("spelled in two ways", [*classes_in(["train"]), *classes_in(["Training"])], Listed({"train": 8}, BOTH)),
    # --- split folders below others -----------------------------------------------------------------------------------------
    Situation(
        "below one folder", classes_in(["train", "val"], above="imagenet/"), Listed({"train": 4, "val": 4}, BOTH)
    ),
    Situation("below several", classes_in(["train", "test"], above="data/images/v1/"), Listed(TWO, BOTH)),
    Situation("yolo's images", each(["images/train", "images/val"]), Listed({"train": 2, "val": 2})),
    Situation("below the class", each(["cat/train", "cat/test", "dog/train", "dog/test"]), Listed(TWO, BOTH)),
    Situation("below folder and class", each(["v1/cat/train", "v1/dog/test"]), Listed({"train": 2, "test": 2}, BOTH)),
    Situation("unpacked twice", each(["train/train/cat", "test/test/dog"]), Listed({"train": 2, "test": 2}, BOTH)),
    Situation(
        "folders above and below vary",
        [*classes_in(["train"], above="site1/"), *classes_in(["test"], above="site2/")],
        Refused(r"above and below the split folders.*site1 or site2; cat or dog.*data\.labels"),
    ),
    Situation(
        "two levels disagree",
        each(["train/test/cat", "train/val/cat"]),
        Refused(r"train/test/cat/1\.jpg is in a folder for train and in one for test.*split_from: hash"),
    ),
    Situation(
        "a class of that name below a split",
        each(["train/train", "train/car", "test/car"]),
        Listed({"train": 4, "test": 2}, ("car", "train")),
    ),
    # --- words that some images have and others do not ------------------------------------------------------------------------
    Situation(
        "an image beside the splits",
        [*each(["train", "test"]), "stray.jpg"],
        Refused(r"train: train/1\.jpg, test: test/1\.jpg\) and not of others \(stray\.jpg\).*split_from: hash"),
    ),
    Situation("svhn's extra", each(["train", "test", "extra"]), Refused(r"not of others \(extra/1\.jpg\)")),
    Situation(
        "unlabeled beside splits", each(["train/cat", "unlabeled"]), Refused(r"not of others \(unlabeled/1\.jpg\)")
    ),
    Situation(
        "a vehicle called train", each(["car", "train", "bus"]), Refused(r"train: train/1\.jpg.*split_from: hash")
    ),
    Situation("trainval and test", each(["trainval", "test"]), Refused(r"not of others \(trainval/1\.jpg\)")),
    Situation(
        "on different levels", each(["train/cat", "a/b/test/dog"]), Refused("folders name the split of some images")
    ),
    Situation(
        "a vehicle called train, said to be a class",
        each(["car", "train"]),
        Listed({"train": 4}, ("car", "train"), "hash"),
        {"split_from": "hash"},
    ),
    # --- words within names of folders ----------------------------------------------------------------------------------------
    Situation(
        "coco",
        each(["train2017", "val2017"]),
        Refused(r"may be splits \(train: train2017/1\.jpg.*data\.split_from: path"),
    ),
    Situation("coco by path", each(["train2017", "val2017"]), Listed({"train": 2, "val": 2}), {"split_from": "path"}),
    Situation(
        "intel", each(["seg_train/seg_train/sea", "seg_test/seg_test/sea"]), Refused("may be splits.*split_from: path")
    ),
    Situation(
        "intel by path",
        each(["seg_train/seg_train/sea", "seg_test/seg_test/ice"]),
        Listed({"train": 2, "test": 2}, ("ice", "sea")),
        {"split_from": "path"},
    ),
    Situation("sets", each(["trainset", "testset"]), Refused("may be splits")),
    Situation("camel case", each(["TrainImages/a", "TestImages/a"]), Refused("may be splits")),
    Situation("cyclegan", each(["trainA", "testA"]), Refused("may be splits")),
    Situation(
        "train_images beside test", each(["train_images", "test"]), Refused("Set data.split_from: path to go by them")
    ),
    Situation(
        "one class with such a word",
        each(["bullet_train", "cat"]),
        Listed({"train": 4}, ("bullet_train", "cat"), "hash"),
    ),
    Situation(
        "many classes, two with such words",
        each(["bullet_train", "test_tube", *(f"c{number}" for number in range(9))]),
        Listed({"train": 22}, sorted(["bullet_train", "test_tube", *(f"c{number}" for number in range(9))]), "hash"),
    ),
    # --- names of images ------------------------------------------------------------------------------------------------------
    Situation(
        "names of images", ["train_1.jpg", "test_1.jpg"], Refused(r"names of the images.*data\.split_from: name")
    ),
    Situation(
        "by names of images",
        ["train_1.jpg", "test_1.jpg"],
        Listed({"train": 1, "test": 1}, (), "names"),
        {"split_from": "name"},
    ),
    Situation(
        "by name, with classes",
        each(["cat", "dog"], names=["train-1.jpg", "dev-1.jpg"]),
        Listed({"train": 2, "val": 2}, BOTH, "names"),
        {"split_from": "name"},
    ),
    Situation(
        "by name, one without",
        ["train_1.jpg", "2.jpg"],
        Refused(r"split_from=name: 2\.jpg names no split"),
        {"split_from": "name"},
    ),
    Situation(
        "by name, one with two", ["train_test.jpg"], Refused("names the splits test and train"), {"split_from": "name"}
    ),
    Situation(
        "a few such names",
        ["cat/test.jpg", "cat/train.jpg", *each(["dog"] * 1, names=[f"{n}.jpg" for n in range(9)])],
        Listed({"train": 11}, BOTH, "hash"),
    ),
    Situation("by path without folders", ["1.jpg"], Refused(r"split_from=path: no level"), {"split_from": "path"}),
    Situation("names within splits", ["train/test_1.jpg", "test/test_2.jpg"], Listed({"train": 1, "test": 1})),
    # --- pools ----------------------------------------------------------------------------------------------------------------
    Situation("class folders", each(BOTH), Listed({"train": 4}, BOTH, "hash")),
    Situation("flat", ["1.jpg", "2.png"], Listed({"train": 2}, (), "hash")),
    Situation(
        "words that only begin so",
        each(["trainers", "valley", "tester"]),
        Listed({"train": 6}, ("tester", "trainers", "valley"), "hash"),
    ),
    Situation(
        "a pool by hash although there are splits",
        classes_in(["train", "test"]),
        Listed({"train": 8}, ("test", "train"), "hash"),
        {"split_from": "hash"},
    ),
    Situation(
        "by column without one",
        ["1.jpg"],
        Refused(r"split_from=column: no labels file gives 1 images"),
        {"split_from": "column"},
    ),
    # --- Hive folders ---------------------------------------------------------------------------------------------------------
    Situation("hive", each(["split=train/label=cat", "split=test/label=dog"]), Listed({"train": 2, "test": 2}, BOTH)),
    Situation(
        "hive, label first",
        each(["label=cat/split=train", "label=dog/split=test"]),
        Listed({"train": 2, "test": 2}, BOTH),
    ),
    Situation("hive classes alone", each(["class=cat", "class=dog"]), Listed({"train": 4}, BOTH, "hash")),
    Situation("hive below a folder", each(["v1/label=cat", "v1/label=dog"]), Listed({"train": 4}, BOTH, "hash")),
    # --- what is passed over --------------------------------------------------------------------------------------------------
    Situation(
        "a class of raw photos",
        [*each(["cat"]), *each(["dog"], names=["1.CR2", "2.CR2"])],
        Listed({"train": 2}, ("cat",), "hash", ["no image is left of dog/ (2 .cr2)"]),
    ),
    Situation("annotations", [*each(["cat"]), "notes/1.txt"], Listed({"train": 2}, ("cat",), "hash")),
    Situation(
        "a class of wget's names below a split",
        [*classes_in(["train"], classes=["cat"]), "train/dog/x.jpg?w=300", "train/dog/x.jpg.1"],
        Listed({"train": 2}, ("cat",), "folders", ["dog/ (1 .jpg.1, 1 .jpg?...)"]),
    ),
    # --- classes that look alike ----------------------------------------------------------------------------------------------
    Situation("case", each(["Cat", "cat"]), Listed({"train": 4}, ("Cat", "cat"), "hash", ["'Cat' and 'cat'"])),
    Situation(
        "unicode forms",
        each(["caf\u00e9", "cafe\u0301"]),
        Listed({"train": 4}, ("cafe\u0301", "caf\u00e9"), "hash", ["differ only in case, blanks or Unicode form"]),
    ),
    # --- labels files ---------------------------------------------------------------------------------------------------------
    Situation(
        "blanks around labels",
        ["1.jpg", "2.jpg"],
        Listed({"train": 2}, ("cat",), "hash"),
        labels="path,label\n1.jpg,cat \n2.jpg,\tcat\n",
    ),
    Situation(
        "a labels file with every split settles doubtful folders",
        each(["train", "extra"], names=["1.jpg"]),
        Listed({"train": 1, "test": 1}, BOTH, "column"),
        labels="path,label,split\ntrain/1.jpg,cat,train\nextra/1.jpg,dog,Testing\n",
    ),
    Situation(
        "a labels file without splits does not",
        each(["train", "extra"], names=["1.jpg"]),
        Refused("not of others"),
        labels="path,label\ntrain/1.jpg,cat\nextra/1.jpg,dog\n",
    ),
    Situation(
        "by column, half filled",
        ["1.jpg", "2.jpg"],
        Refused(r"gives 1 images of .* no split"),
        {"split_from": "column"},
        labels="path,label,split\n1.jpg,cat,train\n2.jpg,dog,\n",
    ),
    # --- tars -----------------------------------------------------------------------------------------------------------------
    Situation(
        "tars by name",
        ["imagenet-train-0000.tar", "imagenet-val-0000.tar"],
        Listed({"train": 1, "val": 1}, (), "names"),
    ),
    Situation(
        "tars by folder", ["data/training/0.tar", "data/testing/0.tar"], Listed({"train": 1, "test": 1}, (), "names")
    ),
    Situation("tars, two words", ["train/test-0.tar"], Refused(r"train/test-0\.tar names the splits test and train")),
    Situation(
        "tars, two words, by name", ["train/test-0.tar"], Listed({"test": 1}, (), "names"), {"split_from": "name"}
    ),
    Situation(
        "tars, one without",
        ["train-0.tar", "0001.tar"],
        Refused(r"train-0\.tar names its split and 0001\.tar does not"),
    ),
    Situation("tars of a pool", ["0000.tar", "0001.tar"], Listed({"train": 2}, (), "hash")),
    Situation("tars by hash", ["train-0.tar", "test-0.tar"], Listed({"train": 2}, (), "hash"), {"split_from": "hash"}),
    Situation("tars have no columns", ["0.tar"], Refused("tars, which have no columns"), {"split_from": "column"}),
    # --- tables ---------------------------------------------------------------------------------------------------------------
    Situation(
        "hugging face's converted tables",
        [],
        Listed({"train": 2, "test": 1}, ("0", "1"), "names"),
        tables={"default/train/0000.parquet": table(2, label=[0, 1]), "default/test/0000.parquet": table(1, label=[0])},
    ),
    Situation(
        "converted in part",
        [],
        Listed({"train": 1, "val": 1}, (), "names"),
        tables={"default/partial-train/0000.parquet": table(1), "default/validation/0000.parquet": table(1)},
    ),
    Situation(
        "names of a ClassLabel",
        [],
        Listed({"train": 3}, ("cat", "dog"), "hash"),
        tables={"0.parquet": table(3, names=["dog", "cat"], label=[0, 1, -1])},
    ),
    Situation(
        "a label without a name",
        [],
        Refused("label 2 has no name; its features name 2 classes"),
        tables={"0.parquet": table(1, names=["dog", "cat"], label=[2])},
    ),
    Situation(
        "numbers that are no ClassLabel",
        [],
        Listed({"train": 2}, ("2", "10"), "hash"),
        tables={"0.parquet": table(2, metadata=INFO, label=[10, 2])},
    ),
    Situation(
        "a column of splits",
        [],
        Listed({"train": 1, "val": 1}, (), "column"),
        {"split_column": "part"},
        tables={"0.parquet": table(2, part=["Train", "dev"])},
    ),
    Situation(
        "a column of splits, half filled",
        [],
        Refused(r"split_from=column: 1 of the rows of 0\.parquet .* have no part"),
        {"split_column": "part", "split_from": "column"},
        tables={"0.parquet": table(2, part=["train", None])},
    ),
    Situation(
        "a column that is not named",
        [],
        Refused("needs data.split_column"),
        {"split_from": "column"},
        tables={"0.parquet": table(1)},
    ),
]


@pytest.mark.parametrize("one", SITUATIONS, ids=lambda one: one.name)
def test_a_layout_is_read_as_meant_or_refused(one: Situation, tmp_path: Path):
    source = tmp_path / "source"
    for name in one.files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    for name, content in one.tables.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, source / name)
    options = dict(one.options)
    if one.labels:
        (tmp_path / "labels.csv").write_text(one.labels)
        options["labels"] = str(tmp_path / "labels.csv")
    if isinstance(one.expected, Refused):
        with pytest.raises((DataError, ConfigError), match=one.expected.words) as caught:
            listed(str(source), tmp_path / "snapshot", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "snapshot").exists()
        return
    facts = listed(str(source), tmp_path / "snapshot", **options).facts
    assert facts["splits"] == one.expected.splits
    assert tuple(facts["classes"]) == tuple(one.expected.classes)
    assert facts["listed"] == sum(one.expected.splits.values())
    assert facts["understood"]["origin"] == one.expected.origin
    notes = " ".join(facts["understood"]["notes"])
    assert all(words in notes for words in one.expected.notes)
    assert bool(notes) == bool(one.expected.notes)
