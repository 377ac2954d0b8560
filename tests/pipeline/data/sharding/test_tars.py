"""Tars made by others are indexed in place, byte for byte; one that readers would silently cut short is refused by name."""

import io
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_kit import (
    all_objects,
    attempt,
    dump,
    labelled,
    listed,
    manifest_of,
    picture,
    quarantined,
    sharded,
    stored,
    tar_bytes,
    write_tars,
)

from pipeline.data.dataset.address import locate_shard
from pipeline.data.sources.splits import choose_tars, named_splits
from pipeline.data.sources.tars import check_agreement, group_members, iter_entries
from pipeline.errors import DataError
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.storage import open_store


@pytest.fixture
def source(tmp_path):
    """Three tars of ten."""
    tars = {f"sub folder/{name}.tar": labelled(range(10 * name, 10 * name + 10)) for name in range(3)}
    return write_tars(tmp_path / "source", tars)


def test_a_tar_is_indexed_and_not_rewritten(source, tmp_path):
    before = all_objects(source)
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    counts = shards.facts["counts"]["total"]
    assert counts == {"listed": 30, "stored": 30, "served": 30, "duplicates": 0, "quarantined": 0}
    assert all_objects(source) == before
    assert not any(key.endswith(".tar") for key in all_objects(tmp_path / "root"))
    rows = stored(shards)
    assert len(rows) == 30
    assert sorted(row["sample_id"] for row in rows.values()) == list(range(30))
    for name, row in rows.items():
        number = int(Path(name).stem)
        assert name == f"sub folder/{number // 10}.tar/{number:05d}.jpg"
        assert row["data"] == picture(number)
        assert (row["class"], row["key"], row["policy"]) == (str(number % 3), f"{number:05d}", "indexed")
        assert (row["width"], row["height"], row["crc32"]) == (32, 24, zlib.crc32(row["data"]))
    manifest = manifest_of(shards)
    (line, *_) = manifest.shards("train").to_pylist()
    store, key = locate_shard(manifest.root, line["key"])
    assert len(store.read(key)) == line["bytes"]
    assert line["key"].startswith("file:///")


def test_the_index_agrees_with_webdataset_on_every_sample(source, tmp_path):
    rows = stored(sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root"))
    tars = sorted(str(path) for path in Path(source).rglob("*.tar"))
    theirs = [(item["__key__"], item["jpg"], item["cls"]) for item in webdataset.WebDataset(tars, shardshuffle=False)]
    ours = sorted(rows.values(), key=lambda row: row["sample_id"])
    assert theirs == [(row["key"], row["data"], row["class"].encode()) for row in ours]


def test_labels_are_words_or_numbers_in_cls_or_json(tmp_path):
    tar = [
        ("a.png", picture(0, "PNG")),
        ("a.json", dump({"label": "cat", "caption": "x"})),
        ("b.jpg", picture(1)),
        ("b.json", dump({"caption": "no label"})),
        ("c.jpg", picture(2)),
        ("c.cls", b" dog\n"),
        ("d.seg.png", picture(3, "PNG")),  # a mask next to the image
        ("d.JPG", picture(4)),
        ("e.jpg", picture(5)),
        ("e.json", dump({"label": 7})),
    ]
    source = write_tars(tmp_path / "source", {"0.tar": tar, "1.tar": [("f.jpg", picture(6)), ("f.cls", b"ant")]})
    listing = listed(source, tmp_path / "snapshot")
    shards = sharded(source, listing, tmp_path / "root")
    rows = stored(shards)
    assert {Path(name).name: row["class"] for name, row in rows.items()} == {
        "a.png": "cat",
        "b.jpg": None,
        "c.jpg": "dog",
        "d.JPG": None,
        "e.jpg": "7",
        "f.jpg": "ant",
    }
    assert shards.facts["classes"] == ["7", "ant", "cat", "dog"]
    other = stored(sharded(source, listing, tmp_path / "other", label_column="caption"))
    assert {Path(name).name: row["class"] for name, row in other.items()}["a.png"] == "x"
    none = sharded(source, listing, tmp_path / "none", label_column=None)
    assert none.facts["classes"] == ["ant", "dog"]  # .cls alone


def test_numbered_classes_keep_their_numbers(tmp_path):
    source = write_tars(tmp_path / "source", {f"{n}.tar": labelled([n], classes=12) for n in range(12)})
    rows = stored(sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root"))
    assert all(str(row["label"]) == row["class"] for row in rows.values())


def test_what_cannot_be_used_unchanged_is_quarantined_with_reasons_and_counted(tmp_path):
    turned = picture(3, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    tar = [
        *labelled(range(100, 102)),
        ("gray.jpg", picture(1, mode="L")),
        ("alpha.png", picture(2, "PNG", mode="RGBA")),
        ("turned.jpg", turned),
        ("bitmap.bmp", picture(4, "BMP")),
        ("cut.jpg", picture(5)[:-200]),
        ("empty.jpg", b""),
        ("words.txt", b"no image at all"),
        ("img.v1.5.jpg", picture(6)),  # one sample `img` to webdataset
        ("img.v1.6.jpg", picture(7)),
        ("odd.jpg", picture(8)),
        ("odd.cls", b"\xff\xfe"),
        ("list.jpg", picture(9)),
        ("list.json", dump({"label": [1, 2]})),
        ("big.jpg", picture(10, size=(200, 200))),
        ("README", b"no sample"),
    ]
    source = write_tars(tmp_path / "source", {"x.tar": tar})
    listing = listed(source, tmp_path / "snapshot")
    shards = sharded(source, listing, tmp_path / "root", bad_share_stop=1.0, image_max_pixels=20_000)
    assert quarantined(shards) == {
        "x.tar/gray.jpg": "needs_reencoding",
        "x.tar/alpha.png": "needs_reencoding",
        "x.tar/turned.jpg": "needs_reencoding",
        "x.tar/bitmap.bmp": "needs_reencoding",
        "x.tar/cut.jpg": "truncated",
        "x.tar/empty.jpg": "empty",
        "x.tar/words": "no_image",
        "x.tar/img": "several_images",
        "x.tar/odd.jpg": "bad_label",
        "x.tar/list.jpg": "bad_label",
        "x.tar/big.jpg": "too_many_pixels",
    }
    total = shards.facts["counts"]["total"]
    assert (total["listed"], total["stored"], total["quarantined"]) == (13, 2, 11)
    assert shards.facts["other_members"] == 1
    assert sorted(row["sample_id"] for row in stored(shards).values()) == [0, 1]
    with pytest.raises(DataError, match=r"10 of 13 images are bad.*alpha\.png \(needs_reencoding: it is RGBA, not RGB"):
        sharded(source, listing, tmp_path / "stops")


def test_an_image_above_the_short_side_limit_is_accepted_unchanged(tmp_path):
    source = write_tars(tmp_path / "source", {"x.tar": [("a.jpg", picture(0, size=(90, 80)))]})
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root", image_max_short_side=16)
    (row,) = stored(shards).values()
    assert (row["width"], row["height"]) == (90, 80)


# Damage


def headers(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, member.offset, member.offset_data) for member in tar]


WHOLE = tar_bytes(labelled(range(20)))
_, HEADER, BODY = headers(WHOLE)[24]  # 00012.jpg


def flipped(at, bit=1):
    return WHOLE[:at] + bytes([WHOLE[at] ^ bit]) + WHOLE[at + 1 :]


DAMAGES = {
    "cut at a header": (WHOLE[:HEADER], r"x\.tar: it ends after 00011\.cls without an end marker"),
    "cut in a body": (
        WHOLE[: BODY + 100],
        r"x\.tar: it is not a complete tar after 00012\.jpg: unexpected end of data",
    ),
    "cut after the body": (WHOLE[: WHOLE.rindex(b"00019.cls") + 1024], r"without an end marker"),
    "a bit of a name": (flipped(HEADER + 2), r"x\.tar: the header after 00011\.cls is damaged"),
    "a bit of a size": (flipped(HEADER + 130), r"the header after 00011\.cls is damaged"),
    "a bit of the checksum": (flipped(HEADER + 150), r"the header after 00011\.cls is damaged"),
    "the first header": (
        flipped(100),
        r"x\.tar: it is not a complete tar: bad checksum|x\.tar: it is not a complete tar",
    ),
    "a hole": (WHOLE[:HEADER] + bytes(512) + WHOLE[HEADER + 512 :], r"the header after 00011\.cls is damaged"),
    "two tars in one file": (WHOLE + WHOLE, r"something follows the end of the archive"),
    "two members of a name": (tar_bytes([("a.jpg", picture(0)), ("a.JPG", picture(1))]), r"duplicate file name"),
    "no bytes": (b"", r"x\.tar: it is not a complete tar: empty file"),
    "no tar": (b"<html>not found</html>" * 100, r"x\.tar: it is not a complete tar"),
    "gzip": (
        tar_bytes(labelled(range(2)), format=tarfile.USTAR_FORMAT)[:0] + b"\x1f\x8b" + b"x" * 2000,
        "is not a complete tar",
    ),
    "a sparse name": (tar_bytes([("\udcff.jpg", picture(0))]), "is not UTF-8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_is_refused_by_name(tmp_path, damage):
    data, words = DAMAGES[damage]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.tar").write_bytes(data)
    source = str(tmp_path / "source")
    listing = listed(source, tmp_path / "snapshot")
    with pytest.raises(DataError, match=words):
        sharded(source, listing, tmp_path / "root")
    assert not [key for key in all_objects(tmp_path / "root") if key.startswith("rows/")]


def test_no_flipped_bit_of_a_header_loses_a_sample(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    whole = list(iter_entries(path, "x.tar"))
    refused = 0
    for at in range(512):
        path.write_bytes(flipped(HEADER + at, 1 << at % 8))
        try:
            assert list(iter_entries(path, "x.tar")) == whole, at  # a bit that no reader uses
        except DataError:
            refused += 1
    assert refused > 500


def test_what_webdataset_reads_differently_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(WHOLE)
    samples = group_members(list(iter_entries(path, "x.tar")), "x.tar")
    check_agreement(samples, path, "x.tar")
    with pytest.raises(DataError, match=r"x\.tar: webdataset reads 20 samples, the headers list 21"):
        check_agreement([*samples, samples[0]], path, "x.tar")
    for ours in (samples[1:], samples[:-1], [replace(samples[0], members={}), *samples[1:]]):
        with pytest.raises(DataError, match=r"x\.tar: sample \d+ is '000\d\d' to webdataset"):
            check_agreement(ours, path, "x.tar")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_with_long_and_strange_names(tmp_path, form):
    long = f"{'deep/' * 15}folder/{'x' * 90}" if form != tarfile.USTAR_FORMAT else "deep/x"
    members = [
        (f"{long}.jpg", picture(0)),
        (f"{long}.cls", b"1"),
        ("__index__", b"passed over by webdataset"),
        ("__meta__/a.jpg", b"likewise"),
        ("ä.jpg", picture(1)),
    ]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.tar").write_bytes(tar_bytes(members, format=form))
    source = str(tmp_path / "source")
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    assert {name: row["data"] for name, row in stored(shards).items()} == {
        f"x.tar/{long}.jpg": picture(0),
        "x.tar/ä.jpg": picture(1),
    }
    assert shards.facts["other_members"] == 2


# Splits, repetition, buckets


def test_splits_by_folder_and_by_name():
    assert named_splits(["test/0.tar", "train/0.tar", "validation/a/0.tar"]) == ["test", "train", "val"]
    assert named_splits(["train-000.tar", "val_1.tar", "test.tar"]) == ["train", "val", "test"]
    assert named_splits(["training-000.tar", "imagenet-dev-1.tar", "default/testing/0.tar"]) == ["train", "val", "test"]
    assert named_splits(["trainer-000.tar", "tests-1.tar", "valley.tar"]) is None
    with pytest.raises(DataError, match=r"train-0\.tar names its split and extra\.tar does not"):
        named_splits(["extra.tar", "train-0.tar"])


def test_a_pool_of_tars_gives_whole_ones_to_test():
    tars = [f"{number:03d}.tar" for number in range(50)]
    chosen = choose_tars(tars, test_share=0.1, seed=0)
    assert chosen.count("test") == 5
    assert chosen == choose_tars(tars, test_share=0.1, seed=0)
    assert chosen != choose_tars(tars, test_share=0.1, seed=1)
    assert choose_tars(tars[:3], test_share=0.1, seed=0).count("test") == 1
    assert choose_tars(tars[:1], test_share=0.1, seed=0) == ["train"]
    assert choose_tars(tars, test_share=0.0, seed=0).count("test") == 0


def test_counts_add_up_in_every_split(source, tmp_path):
    shards = sharded(source, listed(source, tmp_path / "snapshot", test_share=0.3), tmp_path / "root")
    counts = shards.facts["counts"]["splits"]
    assert {name: count["listed"] for name, count in counts.items()} == {"test": 10, "train": 20}


def test_again_nothing_is_written_and_after_a_kill_what_is_missing(source, tmp_path):
    listing = listed(source, tmp_path / "snapshot")
    whole = sharded(source, listing, tmp_path / "whole")

    class Killed(BaseException):
        pass

    class Killer:
        def update(self, done, total, *, unit, **fields):
            if done == 2:
                raise Killed

    handed = replace(attempt(tmp_path / "root"), progress=Killer())
    config = ShardStageConfig(source=source, seed=0, shard_max_bytes=20_000, min_shards=4)
    with pytest.raises(Killed):
        shard(config, {"snapshot": listing}, handed)
    before = all_objects(tmp_path / "root")
    assert sum(key.startswith("rows/") for key in before) == 2
    again = sharded(source, listing, tmp_path / "root", generation=2)
    assert again.made["notes"] == {"reused_shards": 2}
    rows = all_objects(tmp_path / "root", "rows/")
    assert {key: rows[key] for key in rows if key in before} == {k: v for k, v in before.items() if k in rows}
    third = sharded(source, listing, tmp_path / "root", generation=3)
    assert third.made["notes"] == {"reused_shards": 3}
    assert all_objects(tmp_path / "root", "rows/") == rows
    assert whole.facts["digest"] == again.facts["digest"] == third.facts["digest"]


def test_duplicates_across_tars_are_served_once(tmp_path):
    source = write_tars(tmp_path / "source", {"0.tar": labelled([1, 2]), "1.tar": labelled([2, 3])})
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    assert shards.facts["counts"]["total"]["duplicates"] == 1
    assert {name: row["served"] for name, row in stored(shards).items()}["1.tar/00002.jpg"] is False


def test_a_bucket_is_indexed_like_a_folder_with_one_digest(source, tmp_path, s3_bucket):
    here = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    there = f"s3://{s3_bucket}/tars"
    for item in open_store(source).list():
        open_store(there).upload(item.key, Path(source) / item.key)
    shards = sharded(there, listed(there, f"s3://{s3_bucket}/snapshot"), f"s3://{s3_bucket}/step")
    assert shards.facts["digest"] == here.facts["digest"]
    assert {name: row["data"] for name, row in stored(shards).items()} == {
        name: row["data"] for name, row in stored(here).items()
    }


def test_a_tar_that_disappeared_after_listing_is_named(source, tmp_path):
    listing = listed(source, tmp_path / "snapshot")
    (Path(source) / "sub folder" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"1\.tar no longer exists"):
        sharded(source, listing, tmp_path / "root")


def test_labels_do_not_depend_on_the_order_of_tars(tmp_path):
    order = np.random.default_rng(0).permutation(6)
    source = write_tars(tmp_path / "s", {f"{place}.tar": labelled([n], classes=6) for place, n in enumerate(order)})
    rows = stored(sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root"))
    assert {int(Path(name).stem): row["label"] for name, row in rows.items()} == {n: n for n in range(6)}
