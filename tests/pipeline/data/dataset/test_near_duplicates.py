"""Near duplicates across splits: the nearest hashes are found, pixels decide, and look-alikes raise no alarm."""

import io
import time

import numpy as np
import pyarrow as pa
import pytest
from data_kit import listed, manifest_of, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.digits import write_digits
from pipeline.data.dataset.near_duplicates import DISTANCE, NearDuplicateSearch, alarms, is_flat, nearest
from pipeline.data.dataset.survey import leaks
from pipeline.data.images.alignment import SIDE, thumbnail
from pipeline.data.images.intake import IntakePolicy, accept_image


def clustered(seed, count, *, clusters, flips):
    """Hashes, each a few flipped bits from one of some centres."""
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**64, clusters, dtype=np.uint64)
    hashes = centres[draw.integers(0, clusters, count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << draw.integers(0, 64, count, dtype=np.uint64)
    return hashes


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    clusters=st.integers(1, 40),
    flips=st.integers(0, 12),
    distance=st.integers(0, 20),
    most=st.integers(1, 80),
)
def test_the_nearest_hashes_are_those_of_an_exhaustive_comparison(seed, clusters, flips, distance, most):
    first = clustered(seed, 60, clusters=clusters, flips=flips)
    second = clustered(seed, 200, clusters=clusters, flips=flips)  # the same centres
    differ = np.bitwise_count(first[:, None] ^ second[None]).astype(int)
    expected = []
    for u, row in enumerate(differ):
        nearest_first = [int(v) for v in np.argsort(row, kind="stable") if row[v] <= distance]
        expected += [(u, v) for v in sorted(nearest_first[:most])]
    u, v = nearest(first, second, distance=distance, most=most)
    assert list(zip(u.tolist(), v.tolist(), strict=True)) == expected


def test_hashes_are_compared_piece_by_piece(monkeypatch):
    first, second = (clustered(seed, 50, clusters=5, flips=3) for seed in (0, 0))
    whole = nearest(first, second)
    monkeypatch.setattr("pipeline.data.dataset.near_duplicates._HASHES_AT_ONCE", 7)
    np.testing.assert_array_equal(nearest(first, second), whole)


def test_flat_is_within_four_bits_of_all_equal():
    ones = np.uint64(2**64 - 1)
    hashes = np.array([0, 0b1111, 0b11111, ones, ones ^ np.uint64(0b1111), ones ^ np.uint64(0b11111)], np.uint64)
    assert is_flat(hashes).tolist() == [True, True, False, True, True, False]


def judged(*images):
    """Return, per held-out image, which of its scores are alarms."""
    u = np.repeat(np.arange(len(images)), [len(one) for one in images])
    found = alarms(u, np.array([score for one in images for score in one], np.float32), count=len(images))
    return [found[u == number].tolist() for number in range(len(images))]


def test_among_photographs_the_score_decides():
    others = [[0.5, 0.3]] * 4
    assert judged([0.4, 0.92], [0.85], [], *others)[:3] == [[False, True], [False], []]
    assert judged() == []


def test_where_everything_looks_alike_only_what_stands_out_is_an_alarm():
    digit = np.linspace(0.95, 0.6, 16).tolist()  # the fifth differs by 0.14
    crowd = [digit] * 5
    nothing = [False] * 16
    assert judged(*crowd) == [nothing] * 5
    assert judged([0.99, *digit[1:]], *crowd)[0] == [True, *nothing[1:]]  # less than a tenth of what is usual
    assert judged([0.97, *[0.9] * 15], *crowd)[0] == [True, *nothing[1:]]  # the next differs three times as much
    assert judged([0.96, *[0.9] * 15], *crowd)[0] == nothing
    assert judged([0.97, 0.965, 0.97, *[0.88] * 13], *crowd)[0] == [True] * 3 + nothing[3:]  # a group of copies


def test_a_group_of_sixteen_is_a_crowd_since_nothing_is_known_behind_it():
    assert judged(*[[0.95] * 16] * 3) == [[False] * 16] * 3


class Images:
    """Pictures by sample id."""

    def __init__(self, data):
        self.data = data

    def thumbnails(self, shard, sample_ids):
        small = [self.data.get(int(number)) for number in sample_ids]
        pixels = [np.zeros((SIDE, SIDE), np.uint8) if one is None else thumbnail(one) for one in small]
        return np.array(pixels).reshape(-1, SIDE, SIDE), np.array([one is not None for one in small], bool)

    def bytes(self, shard, sample_ids):
        return (self.data.get(int(number)) for number in sample_ids)


def table(hashes, *, first_id=0, served=None, labels=None):
    count = len(hashes)
    return pa.table(
        {
            "sample_id": pa.array(range(first_id, first_id + count), pa.int64()),
            "dhash64": pa.array(np.asarray(hashes, np.uint64)),
            "label": pa.array([-1] * count if labels is None else labels, pa.int32()),
            "served": pa.array([True] * count if served is None else served),
        }
    )


def find(shards, data, **limits):
    search = NearDuplicateSearch(**limits)
    for shard in shards:
        assert search.add(*shard) is shard[2]
    return search.find(Images(data))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


A, B = 0x0123456789ABCDEF, 0xF0F0A5A5C3C39966


def test_samples_are_counted_and_named():
    picture, other = png(blobs(1)), png(blobs(2))
    shards = [
        (0, "train", table([A, A ^ 0b1, B], labels=[0, 1, 0])),
        (1, "val", table([A ^ 0b110, 0], first_id=10, labels=[1, 1])),  # 0 is flat
        (2, "test", table([A, ~A % 2**64, 2**64 - 1, A], first_id=20, served=[True, True, True, False])),
        (3, "train", table([A, 0b1111], first_id=30, labels=[0, 0])),  # 0b1111 is flat too
    ]
    data = {0: picture, 1: other, 2: picture, 10: picture, 20: other, 21: picture, 30: picture}
    found = find(shards, data)
    pairs = [(one.held_out.sample_id, one.train.sample_id) for one in found.pairs]
    # B and not A are too far in their hashes, whatever the pictures show
    assert pairs == [(10, 0), (10, 30), (20, 1)]
    assert [one.conflicting for one in found.pairs] == [True, True, False]  # 20 has no label
    assert all(one.same_pixels for one in found.pairs)
    assert (found.compared, found.flat, found.unread) == (3, 3, 0)


def test_images_that_cannot_be_read_are_counted_and_left_out():
    picture = png(blobs(1))
    shards = [(0, "train", table([A, A])), (1, "test", table([A, A], first_id=10))]
    found = find(shards, {0: picture, 10: picture})
    assert [(one.held_out.sample_id, one.train.sample_id) for one in found.pairs] == [(10, 0)]
    assert found.unread == 2


def test_nothing_held_out_and_nothing_at_all():
    assert find([(0, "train", table([A, A ^ 1]))], {}).pairs == ()
    assert find([], {}) == find([(0, "test", table([]))], {})


def test_a_hundred_thousand_hashes_that_are_all_alike_are_searched_in_time():
    hashes = np.full(102_000, A, np.uint64)
    started = time.process_time()
    u, v = nearest(hashes[:2_000], hashes[2_000:])
    assert time.process_time() - started < 20  # 0.8 s on a free core
    assert np.bincount(u).tolist() == [64] * 2_000
    assert v.max() == 63  # of equally near ones, those that come first


def test_beyond_the_limit_a_share_of_the_held_out_images_is_compared():
    hashes = clustered(0, 4_000, clusters=4_000, flips=0)
    shards = [(0, "train", table(hashes[:3_000])), (1, "test", table(hashes[3_000:], first_id=3_000))]
    part = find(shards, {}, pairs_max=3_000 * 500)
    assert part.compared == pytest.approx(500, rel=0.15)
    assert find(shards, {}, pairs_max=3_000 * 500) == part  # the same share every time


def test_digits_raise_no_alarm_but_copies_among_them_do(tmp_path):
    folder = write_digits(tmp_path / "digits")
    train, held_out = (
        [path.read_bytes() for path in sorted((folder / s).glob("*/[0-9]*.png"))] for s in ("train", "test")
    )
    darker = [png(Image.open(io.BytesIO(data)).point(lambda value: value * 0.8)) for data in train[::140]]
    data = [accept_image(one, IntakePolicy()) for one in (*train, *held_out, *darker)]
    first, copies = len(train), len(train) + len(held_out)
    shards = [
        (0, "train", table([one.dhash64 for one in data[:first]])),
        (1, "test", table([one.dhash64 for one in data[first:]], first_id=first)),
    ]
    found = find(shards, {number: one.data for number, one in enumerate(data)})
    alarmed = {one.held_out.sample_id for one in found.pairs}
    assert sum(number < copies for number in alarmed) < 0.01 * len(held_out)
    assert sum(number >= copies for number in alarmed) >= 0.8 * len(darker)


def blobs(number, *, size=(96, 72)):
    """Return an image as smooth as a photograph, which depends on the number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def copies(tmp_path):
    """Write 30 training images, 10 other test images, and recompressed, resized, brighter, grey and cut copies of the first."""
    source = tmp_path / "source"
    for split, numbers in (("train", range(30)), ("test", range(100, 110))):
        (source / split).mkdir(parents=True)
        for number in numbers:
            blobs(number).save(source / split / f"{number}.jpg", quality=95)
    blobs(0).save(source / "test" / "recompressed.jpg", quality=40)
    blobs(1).resize((48, 36)).save(source / "test" / "resized.jpg")
    blobs(2).point(lambda value: min(255, value + 12)).save(source / "test" / "brighter.jpg")
    blobs(3).convert("L").save(source / "test" / "grey.png")
    blobs(4).crop((3, 2, 96, 72)).save(source / "test" / "cut.jpg")
    Image.new("RGB", (40, 40), "red").save(source / "train" / "red.png")
    Image.new("RGB", (40, 40), "blue").save(source / "test" / "blue.png")
    return str(source)


def test_the_shard_stage_names_copies_across_splits(copies, tmp_path):
    shards = sharded(copies, listed(copies, tmp_path / "snapshot"), tmp_path / "root")
    facts = shards.facts["near_duplicates_across_splits"]
    counted = ("pairs", "held_out", "flat", "distance", "same_pixels", "unread")
    assert [facts[name] for name in counted] == [5, 5, 2, DISTANCE, 0, 0]
    every = {(pair.held_out, pair.train) for pair in leaks(manifest_of(shards))}
    assert every == {
        ("test/brighter.jpg", "train/2.jpg"),
        ("test/cut.jpg", "train/4.jpg"),
        ("test/grey.png", "train/3.jpg"),
        ("test/recompressed.jpg", "train/0.jpg"),
        ("test/resized.jpg", "train/1.jpg"),
    }
    assert {(one["held_out"], one["train"]) for one in facts["examples"]} < every
    assert min(one["similarity"] for one in facts["examples"]) > 0.95
    again = sharded(copies, listed(copies, tmp_path / "snapshot2"), tmp_path / "root2", shard_max_bytes=5000)
    assert again.facts["near_duplicates_across_splits"] == facts  # however it is cut into shards


def test_labels_that_differ_come_first_and_equal_pixels_are_counted(tmp_path):
    source = tmp_path / "source"
    for split, label, number, kind in (
        ("train", "cat", 0, "png"), ("test", "dog", 0, "png"), ("train", "cat", 1, "jpg"), ("test", "cat", 1, "bmp"),
        ("train", "dog", 2, "jpg"), ("test", "dog", 3, "jpg"),
    ):  # fmt: skip
        (source / split / label).mkdir(parents=True, exist_ok=True)
        blobs(number).save(source / split / label / f"{number}.{kind}")
    shards = sharded(str(source), listed(str(source), tmp_path / "snapshot"), tmp_path / "root")
    near = shards.facts["near_duplicates_across_splits"]
    assert (near["held_out"], near["same_pixels"], near["conflicting"]) == (2, 1, 1)
    first = near["examples"][0]
    assert (first["held_out"], first["held_out_label"]) == ("test/dog/0.png", "dog")
    assert (first["train"], first["train_label"]) == ("train/cat/0.png", "cat")
    copies = shards.facts["copies"]
    assert (copies["images"], copies["across"], copies["conflicting"]) == (1, 1, 1)
    assert {(one["source"], one["label"]) for one in copies["examples"][0]} == {
        ("test/dog/0.png", "dog"),
        ("train/cat/0.png", "cat"),
    }
