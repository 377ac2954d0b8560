"""The picture of a dataset shows what is in it, and the tables state it."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from data_kit import listed, manifest_of, picture, sharded
from PIL import Image
from rich.console import Console

from pipeline.data.dataset.facts import Counts, DatasetFacts, NearPair
from pipeline.data.dataset.integrity import Finding, Verification
from pipeline.data.dataset.survey import survey
from pipeline.reporting.shard_pictures import (
    ORANGE,
    RED,
    bytes_text,
    contact_sheet,
    fitted,
    histograms_png,
    mark_of,
    others_table,
    survey_png,
    survey_table,
    terminal_sheet,
    verification_table,
)
from pipeline.storage import open_store

PITCH = (182, 222)
"""Width: tile and gap. Height: tile, text and gap."""


def said(renderable, width=200):
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(renderable, soft_wrap=True)
    return console.export_text()


@pytest.fixture
def manifest(tmp_path):
    """30 pictures of three classes to train on, 10 to test on; 5 are copies, one of them of the other split; 3 are refused."""
    store = open_store(str(tmp_path / "source"))
    for number in range(30):
        store.write(f"train/{'abc'[number % 3]}/{number:02d}.jpg", picture(number))
    for number in range(30, 40):
        store.write(f"test/{'ab'[number % 2]}/{number:02d}.jpg", picture(number, size=(40, 20)))
    for number in range(0, 12, 3):  # of class a too: with another label they would be no copies
        store.write(f"train/a/copy{number}.jpg", picture(number))
    store.write("test/a/copy.jpg", picture(3))
    store.write("train/a/empty.jpg", b"")
    store.write("train/b/empty.jpg", b"")
    store.write("train/a/text.jpg", b"words")
    source = str(tmp_path / "source")
    return manifest_of(sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root", bad_share_stop=0.5))


def test_a_survey_counts_everything(manifest):
    seen = survey(manifest, splits=manifest.splits, images=100)
    train = next(one for one in seen.splits if one.split == "train")
    assert train.counts == Counts(listed=37, stored=34, served=30, duplicates=4, quarantined=3)
    assert (train.classes, len(seen.widths), seen.widths.max()) == (3, 45, 40)
    assert dict(seen.label_counts) == {"a": 10 + 4 + 5 + 1, "b": 10 + 5, "c": 10}
    assert list(seen.label_counts) == ["a", "b", "c"]
    assert [(one.reason, one.count) for one in seen.refusals] == [("empty", 2), ("unreadable", 1)]
    assert seen.refusals[0].examples == (("train/a/empty.jpg", "0 bytes"), ("train/b/empty.jpg", "0 bytes"))
    assert seen.near_duplicates.pairs == 1
    pair = NearPair(
        held_out="test/a/copy.jpg", train="train/a/03.jpg", held_out_label="a", train_label="a", similarity=0.999
    )
    assert seen.near_duplicates.examples == (pair,)
    assert (seen.near_duplicates.same_pixels, seen.near_duplicates.conflicting) == (1, 0)
    assert (seen.copies.images, seen.copies.across, seen.copies.conflicting) == (
        4,
        1,
        0,
    )  # one has copies in both splits
    assert len(seen.shown) == 45
    assert sum(not one.served for one in seen.shown) == 4
    for one in seen.shown:
        assert one.image is not None
        assert one.image.shape == (one.height, one.width, 3)


def test_a_choice_is_the_same_again_and_holds_the_smaller(manifest):
    sources = [[one.source for one in survey(manifest, splits=["train"], images=n).shown] for n in (5, 12, 12, 1000)]
    assert sources[1] == sources[2]
    assert set(sources[0]) < set(sources[1])
    assert sources[1][:5] == sources[0]
    assert len(sources[3]) == 34
    other = [one.source for one in survey(manifest, splits=["train"], images=12, seed=1).shown]
    assert other != sources[1]
    assert all(one.split == "test" for one in survey(manifest, splits=["test"], images=50).shown)


def test_the_sheet_shows_each_image_and_marks_what_is_not_served(manifest):
    seen = survey(manifest, splits=manifest.splits, images=45)
    sheet = np.asarray(contact_sheet(seen.shown))
    assert sheet.shape == (6 * PITCH[1] - 14, 8 * PITCH[0] - 14, 4)
    orange = [int(ORANGE[at : at + 2], 16) for at in (1, 3, 5)]
    for number, one in enumerate(seen.shown):
        top, left = number // 8 * PITCH[1], number % 8 * PITCH[0]
        tile = sheet[top : top + 168, left : left + 168]
        factor = 168 // max(one.width, one.height)
        framed = (tile[0, :, :3] == orange).all()
        assert framed == (not one.served)
        high, wide = one.height * factor, one.width * factor
        inner = tile[(168 - high) // 2 :, (168 - wide) // 2 :][:high, :wide, :3]
        centre = np.s_[high // 3 : 2 * high // 3, wide // 3 : 2 * wide // 3]
        grown = one.image.repeat(factor, axis=0).repeat(factor, axis=1)
        np.testing.assert_array_equal(inner[centre], grown[centre])
    assert sheet[PITCH[1] * 5 + 10, 8 * PITCH[0] - 20, 3] == 0  # nothing where there is no image


def test_a_damaged_image_leaves_a_marked_gap(manifest):
    paths = [manifest.root.local_path(line["key"]) for line in manifest.shards("test").to_pylist()]
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    seen = survey(manifest, splits=["test"], images=8)
    assert len(seen.shown) == 8
    assert all(one.image is None for one in seen.shown)
    assert mark_of(seen.shown[0]) == ("unreadable", RED)
    assert "not those that were written" in seen.shown[0].trouble
    assert contact_sheet(seen.shown).size == (8 * PITCH[0] - 14, PITCH[1] - 14)
    for path in paths:
        path.unlink()
    assert all(one.image is None for one in survey(manifest, splits=["test"], images=8).shown)


def test_large_images_shrink_and_keep_their_shape():
    assert fitted(np.zeros((1000, 500, 3), np.uint8), 100).size == (50, 100)
    assert fitted(np.zeros((10, 30, 3), np.uint8), 100).size == (90, 30)


def test_the_whole_picture_is_as_wide_as_the_sheet(manifest):
    seen = survey(manifest, splits=manifest.splits, images=10)
    whole = Image.open(io.BytesIO(survey_png(seen)))
    sheet = contact_sheet(seen.shown)
    charts = Image.open(io.BytesIO(histograms_png(seen, width=sheet.width)))
    assert abs(charts.width - sheet.width) <= 2
    assert whole.height == sheet.height + 14 + charts.height
    assert whole.getpixel((5, whole.height - 3))[3] == 0  # transparent
    np.testing.assert_array_equal(np.asarray(whole)[: sheet.height, : sheet.width], np.asarray(sheet))


@pytest.mark.parametrize("count", [1, 40])
def test_histograms_of_one_image_and_of_many_classes(tmp_path, count):
    store = open_store(str(tmp_path / "source"))
    for number in range(count):
        store.write(f"class {number}/{'x' * 40}.jpg", picture(number))
    listing = listed(store.uri, tmp_path / "snapshot")
    manifest = manifest_of(sharded(store.uri, listing, tmp_path / "root"))
    seen = survey(manifest, splits=["train"], images=3)
    drawn = np.asarray(Image.open(io.BytesIO(histograms_png(seen, width=1400))))
    assert (drawn[..., 3] > 0).mean() > 0.02


def test_tables_state_counts_quarantine_and_near_duplicates(manifest):
    text = said(survey_table(survey(manifest, splits=manifest.splits, images=0)))
    assert re.search(r"train +37 +30 +4 +3 +3 +\d+ +[\d.]+ KB", text)
    assert "45 of 45 images kept their bytes; sides 32 to 40 x 20 to 24 pixels" in text
    assert "quarantine  empty  2\n  train/a/empty.jpg  0 bytes" in text
    assert "1 of 11 images of val and test seem to be copies of one of train (1 pixel for pixel)" in text
    assert "test/a/copy.jpg and train/a/03.jpg" in text


def test_repairs_contradictions_and_files_of_no_sample_are_told(tmp_path):
    store = open_store(str(tmp_path / "source"))
    for name in "abcd":
        store.write(f"train/{name}/0.jpg", picture(0 if name in "ab" else ord(name)))
    whole = picture(5)
    store.write("train/a/stray.jpg", whole[:-2] + bytes(40) + whole[-2:])
    shards = sharded(store.uri, listed(store.uri, tmp_path / "snapshot"), tmp_path / "root")
    assert shards.facts["repaired"] == 1
    text = said(survey_table(survey(manifest_of(shards), splits=["train"], images=0)))
    assert "1 of them had a harmless fault and were repaired" in text
    assert "contradicting labels  1 images have 2 copies with different labels; each label keeps one" in text
    assert "  train/a/0.jpg (a)  and train/b/0.jpg (b)" in text
    facts = DatasetFacts.read(shards.facts)
    assert others_table(facts) is None
    told = replace(
        facts,
        other_members=3,
        other_reasons={"hidden": 2, "FIFO": 1},
        other_examples={"hidden": ("x.tar/._1.jpg", "x.tar/._2.jpg"), "FIFO": ("x.tar/pipe.jpg",)},
    )
    assert "no sample  hidden  2\n  x.tar/._1.jpg\n  x.tar/._2.jpg\n" in said(others_table(told))


def test_the_terminal_shows_four_images_and_their_labels(manifest):
    seen = survey(manifest, splits=["train"], images=10)
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(terminal_sheet(seen.shown))
    lines = console.file.getvalue().splitlines()
    assert lines[0].count("▀") == 4 * 18
    assert all(one.label in lines[-1] for one in seen.shown[:4])


def test_findings_and_what_to_delete_are_listed_once():
    shard = {"where": "file:///s/shard-1/shards/ab/abcd.tar", "shard": 3, "repair": "delete", "delete": ("r", "t")}
    findings = (
        Finding("header", what="is damaged", sample="000", source="[cat]/1.jpg", **shard),
        Finding("bytes", what="differs", sample="001", source="cat/2.jpg", **shard),
    )
    text = said(verification_table(Verification("shard", "file:///s/shard-1", "d" * 64, 4, 100, 10**6, findings)))
    assert "4 shards, 100 images, 1 MB read: 2 damages in 1 shard" in text
    assert re.search(r"3 +header +000 +\[cat\]/1\.jpg +abcd\.tar", text)
    assert "shard 3 sample 001  differs" in text
    assert text.count("repair  delete") == 1
    clean = said(verification_table(Verification("shard", "u", "d", 4, 100, 10**6, ())))
    assert clean.strip() == "shard  4 shards, 100 images, 1 MB read: all as written"


def test_sizes_as_text():
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1 KB",
        34_140: "34.1 KB",
        128_000_000: "128 MB",
        5e15: "5000 TB",
        999_600: "1 MB",
    }
    assert {size: bytes_text(size) for size in sizes} == sizes
