"""Near pairs across splits equal those of an exhaustive comparison, and the search ends even if everything looks alike."""

import time

import numpy as np
import pyarrow as pa
import pytest
from data_kit import listed, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.dataset.near_duplicates import NearDuplicateSearch, SampleRef, choose_bands, is_flat, near_pairs

DISTANCE = 4


def clustered(seed, count, *, clusters, flips):
    """Distinct hashes, each a few flipped bits from one of some centres."""
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**64, clusters, dtype=np.uint64)
    hashes = centres[draw.integers(0, clusters, count)]
    for _ in range(flips):
        hashes ^= np.uint64(1) << draw.integers(0, 64, count, dtype=np.uint64)
    return np.unique(hashes)


def by_comparing_all(first, second, distance):
    near = np.bitwise_count(first[:, None] ^ second[None, :]) <= distance
    return {(int(u), int(v)) for u, v in np.argwhere(near)}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    clusters=st.integers(1, 40),
    flips=st.integers(0, 4),
    distance=st.integers(0, 6),
    whole=st.integers(2, 4),
)
def test_near_pairs_are_those_of_an_exhaustive_comparison_each_once(seed, clusters, flips, distance, whole):
    first = clustered(seed, 150, clusters=clusters, flips=flips)
    second = clustered(seed, 400, clusters=clusters, flips=flips)  # the same centres
    pieces = list(near_pairs(first, second, distance=distance, whole=whole))
    pairs = [(int(u), int(v)) for left, right in pieces for u, v in zip(left, right, strict=True)]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == by_comparing_all(first, second, distance)


def test_every_way_to_differ_in_four_bits_is_found():
    draw = np.random.default_rng(0)
    one = np.array([0x0123456789ABCDEF], np.uint64)
    places = np.array([draw.choice(64, DISTANCE, replace=False) for _ in range(3000)])
    others = np.unique(one[0] ^ np.bitwise_or.reduce(np.uint64(1) << places.astype(np.uint64), axis=1))
    found = sum(len(u) for u, _ in near_pairs(one, others, distance=DISTANCE))
    assert found == len(others)
    assert not list(near_pairs(one, others, distance=DISTANCE - 1))


def table(hashes, *, first_id=0, served=None):
    count = len(hashes)
    return pa.table(
        {
            "sample_id": pa.array(range(first_id, first_id + count), pa.int64()),
            "dhash64": pa.array(np.asarray(hashes, np.uint64)),
            "served": pa.array([True] * count if served is None else served),
        }
    )


def find_near_duplicates(shards, **limits):
    search = NearDuplicateSearch(**limits)
    for shard in shards:
        assert search.add(*shard) is shard[2]
    return search.find()


A, B = 0x0123456789ABCDEF, 0xF0F0A5A5C3C39966


def test_samples_are_counted_and_named():
    shards = [
        (0, "train", table([A, A ^ 0b1, B])),
        (1, "val", table([A ^ 0b110, 0], first_id=10)),  # 0 is flat
        (2, "test", table([A, A ^ 0b11111, 2**64 - 1, ~B % 2**64], first_id=20, served=[True, True, True, False])),
        (3, "train", table([A, 0b1111], first_id=30)),  # 0b1111 is flat too
    ]
    found = find_near_duplicates(shards)
    # val's sample is near A twice and A^1; test's A near all three of them, A^11111 near A^1 only
    assert (found.pairs, found.held_out, found.compared, found.flat) == (7, 3, 3, 3)
    assert found.examples == (
        (SampleRef(1, 10), SampleRef(0, 0)),
        (SampleRef(1, 10), SampleRef(0, 1)),
        (SampleRef(2, 20), SampleRef(0, 0)),
    )


def test_nothing_held_out_and_nothing_at_all():
    assert find_near_duplicates([(0, "train", table([A, A ^ 1]))]).pairs == 0
    assert find_near_duplicates([]) == find_near_duplicates([(0, "test", table([]))])


def test_flat_is_within_the_distance_of_all_equal():
    ones = np.uint64(2**64 - 1)
    hashes = np.array([0, 0b1111, 0b11111, ones, ones ^ np.uint64(0b1111), ones ^ np.uint64(0b11111), A], np.uint64)
    assert is_flat(hashes, 4).tolist() == [True, True, False, True, True, False, False]


def test_a_million_hashes_of_images_that_all_look_alike_are_searched_in_time():
    # all within 8 bits of one: 2e5 x 2e4 pairs of samples, of which every other one is near, and as many candidates
    draw = np.random.default_rng(0)
    hashes = np.full(220_000, A, np.uint64)
    for _ in range(8):
        hashes ^= np.uint64(1) << draw.integers(0, 64, len(hashes), dtype=np.uint64)
    shards = [(0, "train", table(hashes[:200_000])), (1, "test", table(hashes[200_000:], first_id=200_000))]
    _, candidates = choose_bands(np.unique(hashes[200_000:]), np.unique(hashes[:200_000]), distance=DISTANCE)
    assert candidates > 2e7
    started = time.process_time()
    found = find_near_duplicates(shards, candidates_max=2_000_000)
    assert time.process_time() - started < 10  # 0.6 s on a free core
    assert 0 < found.compared < 20_000 * 0.3
    assert found.held_out <= found.compared
    assert find_near_duplicates(shards, candidates_max=2_000_000) == found  # the same share every time


def test_half_of_the_held_out_hashes_are_compared_like_all():
    hashes = clustered(0, 20_000, clusters=500, flips=3)
    np.random.default_rng(1).shuffle(hashes)
    shards = [(0, "train", table(hashes[:15_000])), (1, "test", table(hashes[15_000:], first_id=15_000))]
    whole = find_near_duplicates(shards)
    part = find_near_duplicates(
        shards, candidates_max=choose_bands(hashes[15_000:], hashes[:15_000], distance=4)[1] // 2
    )
    assert whole.compared == len(hashes) - 15_000
    assert part.compared == pytest.approx(whole.compared / 2, rel=0.05)
    assert part.held_out / part.compared == pytest.approx(whole.held_out / whole.compared, abs=0.03)


def blobs(number, *, size=(96, 72)):
    """Return an image as smooth as a photograph, which depends on the number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def copies(tmp_path):
    """Write 30 training images, 10 other test images, and recompressed, resized, brighter and grey copies of the first four."""
    source = tmp_path / "source"
    for split, numbers in (("train", range(30)), ("test", range(100, 110))):
        (source / split).mkdir(parents=True)
        for number in numbers:
            blobs(number).save(source / split / f"{number}.jpg", quality=95)
    blobs(0).save(source / "test" / "recompressed.jpg", quality=40)
    blobs(1).resize((48, 36)).save(source / "test" / "resized.jpg")
    blobs(2).point(lambda value: min(255, value + 12)).save(source / "test" / "brighter.jpg")
    blobs(3).convert("L").save(source / "test" / "grey.png")
    Image.new("RGB", (40, 40), "red").save(source / "train" / "red.png")
    Image.new("RGB", (40, 40), "blue").save(source / "test" / "blue.png")
    return str(source)


def test_the_shard_stage_names_copies_across_splits(copies, tmp_path):
    shards = sharded(copies, listed(copies, tmp_path / "snapshot"), tmp_path / "root")
    facts = shards.facts["near_duplicates_across_splits"]
    assert (facts["pairs"], facts["held_out"], facts["flat"], facts["distance"]) == (4, 4, 2, DISTANCE)
    assert facts["examples"] == [
        {"held_out": "test/brighter.jpg", "train": "train/2.jpg"},
        {"held_out": "test/grey.png", "train": "train/3.jpg"},
        {"held_out": "test/recompressed.jpg", "train": "train/0.jpg"},
    ]
    again = sharded(copies, listed(copies, tmp_path / "snapshot2"), tmp_path / "root2", shard_max_bytes=5000)
    assert again.facts["near_duplicates_across_splits"] == facts  # however it is cut into shards
