"""Exact copies: how many images are there more than once, in which splits, and with which labels."""

import hashlib

import pyarrow as pa

from pipeline.data.dataset.duplicates import find_duplicates

TRAIN, VAL, TEST = 0, 1, 2
SPLITS = ("train", "val", "test")


def found(*images):
    """Return the duplicates of images, each given as (split, label) of its copies; ids count up in this order."""
    rows = [
        (split, hashlib.sha256(b"%d" % number).hexdigest(), label)
        for number, one in enumerate(images)
        for split, label in one
    ]
    shards = []
    for split in (TRAIN, VAL, TEST):
        chosen = [number for number, row in enumerate(rows) if row[0] == split]
        columns = {
            "sample_id": pa.array(chosen, pa.int64()),
            "sha256": [rows[number][1] for number in chosen],
            "label": pa.array([rows[number][2] for number in chosen], pa.int32()),
        }
        shards.append((split, SPLITS[split], pa.table(columns)))
    return find_duplicates(shards)


def test_copies_as_in_tiny_imagenet():
    # its 39 groups, as counted by the hashes of its files: train has other labels everywhere, test has none
    inside = [[(TRAIN, 1), (TRAIN, 2)]] * 20
    with_val = [[(TRAIN, 3), (VAL, 4)]] * 7
    with_test = [[(TRAIN, 5), (TEST, -1)]] * 9
    others = [[(VAL, 6), (TEST, -1)], [(TEST, -1), (TEST, -1)], [(TEST, -1), (TEST, -1)], [(TRAIN, 0)]]
    duplicates = found(*inside, *with_test, *with_val, *others)
    copies = duplicates.copies
    assert (copies.images, copies.across, copies.conflicting) == (39, 17, 7)
    assert duplicates.contradictions.images == 27
    # with different labels first: images 29 to 35, whose ids begin at 58
    first = [(one.sample_id, other.sample_id) for one, other in copies.examples]
    assert {sample_id for pair in first[:7] for sample_id in pair} == set(range(58, 72))
    assert len(first) == 10


def test_an_image_of_three_splits_is_one_image():
    copies = found([(TRAIN, 1), (VAL, 1), (TEST, 2)], [(TRAIN, 1)]).copies
    assert (copies.images, copies.across, copies.conflicting, len(copies.examples)) == (1, 1, 1, 1)
    assert [sample.shard for sample in copies.examples[0]] == [VAL, TEST]  # the pair whose labels differ


def test_no_copies_and_no_images():
    assert found([(TRAIN, 1)], [(TEST, 1)]).copies == found().copies
