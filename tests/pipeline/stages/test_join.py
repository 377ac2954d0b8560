"""Parts of a dataset: each lists and stores what earlier parts lack; the join counts, numbers and serves them as one."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_kit import all_objects, attempt, labelled, listed, picture, sharded, stored, write_table, write_tars

from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.snapshots.parts import EarlierListing, has_new_files
from pipeline.graph.step import StageInput
from pipeline.stages.join import JoinConfig, join
from pipeline.storage import open_store


def fill(source, images):
    for path, number in images.items():
        open_store(str(source)).write(path, picture(number))
    return str(source)


def joined(store, *parts):
    handed = attempt(store / "join")
    names = tuple(str(number) for number in range(1, len(parts) + 1))
    inputs = {f"part{number:04d}": part for number, part in enumerate(parts, 1)}
    result = join(JoinConfig(source="x", snapshots=names), inputs, handed)
    return StageInput(handed.root_uri, 1, "f", result.facts)


def part(source, store, number, *earlier, **options):
    listing = listed(source, store / f"snapshot{number}", *earlier, test_share=options.pop("test_share", 0.0))
    return listing, sharded(source, listing, store / f"shard{number}", **options)


@pytest.fixture
def two(tmp_path):
    """Ten images; then four more in a new class, one of them a copy, one changed, one gone."""
    source = fill(tmp_path / "source", {f"{('cat', 'fox')[n % 2]}/{n}.jpg": n for n in range(10)})
    first = part(source, tmp_path / "store", 1, test_share=0.3)
    fill(source, {"dog/20.jpg": 20, "dog/21.jpg": 21, "dog/copy.jpg": 4})
    open_store(source).write("cat/0.jpg", picture(30, size=(40, 24)))
    open_store(source).delete("cat/2.jpg")
    before = all_objects(tmp_path / "store" / "shard1")
    second = part(source, tmp_path / "store", 2, first[0], test_share=0.3)
    assert all_objects(tmp_path / "store" / "shard1") == before
    return first, second, joined(tmp_path / "store", first[1], second[1])


def test_a_later_part_lists_what_is_new_and_counts_what_changed(two):
    (_, _), (listing, shards), _ = two
    facts = listing.facts
    assert (facts["listed"], facts["known"], facts["changed"], facts["gone"]) == (4, 8, 1, 1)
    assert set(stored(shards)) == {"cat/0.jpg", "dog/20.jpg", "dog/21.jpg", "dog/copy.jpg"}
    assert not has_new_files(facts["source"], None, [two[0][0], listing])
    fill(facts["source"], {"cat/99.jpg": 99})
    assert has_new_files(facts["source"], None, [two[0][0], listing])


def test_the_join_numbers_counts_and_serves_all_parts_as_one(two, tmp_path):
    (_, first), (_, second), whole = two
    total = whole.facts["counts"]["total"]
    assert (total["listed"], total["stored"], total["quarantined"]) == (14, 14, 0)
    assert whole.facts["classes"] == ["cat", "dog", "fox"]
    assert [part["listed"] for part in whole.facts["parts"].values()] == [10, 4]
    address = dataset_address(whole)
    assert address.root_uri == str(tmp_path / "store")
    manifest = address.open()
    assert list(manifest.shard_numbers) == list(range(first.facts["shards"] + second.facts["shards"]))
    rows = [
        row | {"class": manifest.classes[row["label"]]}
        for shard in manifest.shard_numbers
        for row in manifest.stored_samples(shard).to_pylist()
    ]
    assert sorted(row["sample_id"] for row in rows) == list(range(14))
    assert all(row["class"] == row["source"].split("/")[0] for row in rows)
    for row in manifest.all_shards().to_pylist():
        assert open_store(address.root_uri).exists(row["key"])
    later = {row["source"] for row in rows if row["sample_id"] >= 10}
    assert later == {"cat/0.jpg", "dog/20.jpg", "dog/21.jpg", "dog/copy.jpg"}


def test_copies_across_parts_are_served_by_the_older_one(tmp_path):
    source = fill(tmp_path / "source", {f"{n}.jpg": n for n in range(6)})
    first = part(source, tmp_path / "store", 1)
    fill(source, {"a.jpg": 3, "b.jpg": 3, "c.jpg": 50})
    second = part(source, tmp_path / "store", 2, first[0])
    assert second[1].facts["counts"]["total"]["duplicates"] == 1
    whole = joined(tmp_path / "store", first[1], second[1])
    assert whole.facts["counts"]["total"]["duplicates"] == 2
    assert whole.facts["duplicates_across_parts"] == 1
    manifest = dataset_address(whole).open()
    served = [row["source"] for n in manifest.shard_numbers for row in manifest.samples(n).to_pylist()]
    assert sorted(served) == [*(f"{n}.jpg" for n in range(6)), "c.jpg"]


def test_quarantined_images_keep_their_counts_and_labels(tmp_path):
    source = fill(tmp_path / "source", {f"fox/{n}.jpg": n for n in range(6)})
    first = part(source, tmp_path / "store", 1)
    open_store(source).write("ant/bad.jpg", b"no image")
    fill(source, {"fox/7.jpg": 7})
    second = part(source, tmp_path / "store", 2, first[0], bad_share_stop=1.0)
    whole = joined(tmp_path / "store", first[1], second[1])
    assert (whole.facts["quarantined"], whole.facts["bad_share"]) == (1, pytest.approx(1 / 8))
    (row,) = Manifest.open(whole.store, whole.root).quarantine().to_pylist()
    assert (row["source"], whole.facts["classes"][row["label"]]) == ("ant/bad.jpg", "ant")


def test_a_part_in_which_nothing_is_new_is_empty_and_changes_nothing(tmp_path):
    source = fill(tmp_path / "source", {f"{n}.jpg": n for n in range(6)})
    first = part(source, tmp_path / "store", 1)
    second = part(source, tmp_path / "store", 2, first[0])
    assert second[1].facts["counts"]["total"]["listed"] == 0
    whole = joined(tmp_path / "store", first[1], second[1])
    assert whole.facts["counts"]["total"] == first[1].facts["counts"]["total"]


def test_the_digest_is_the_same_wherever_the_store_lies(tmp_path):
    digests = set()
    for place in ("here", "there/deep"):
        source = fill(tmp_path / place / "source", {f"{n}.jpg": n for n in range(6)})
        first = part(source, tmp_path / place, 1)
        fill(source, {"7.jpg": 7})
        digests.add(joined(tmp_path / place, first[1], part(source, tmp_path / place, 2, first[0])[1]).facts["digest"])
    assert len(digests) == 1


def test_tars_and_tables_have_parts_too(tmp_path):
    source = write_tars(tmp_path / "tars", {"0.tar": [*labelled(range(4)), ("README", b"no sample")]})
    first = part(source, tmp_path / "a", 1)
    write_tars(tmp_path / "tars", {"1.tar": [*labelled(range(4, 9)), ("README", b"no sample")]})
    whole = joined(tmp_path / "a", first[1], part(source, tmp_path / "a", 2, first[0])[1])
    assert whole.facts["counts"]["total"]["served"] == 9
    assert (whole.facts["other_members"], whole.facts["other_reasons"]) == (2, {"no sample": 2})
    assert whole.facts["other_examples"] == {"no sample": ["0.tar/README", "1.tar/README"]}
    rows = stored(whole, open_store(dataset_address(whole).root_uri))
    assert {int(Path(name).stem): row["data"] for name, row in rows.items()} == {n: picture(n) for n in range(9)}
    assert all(row["class"] == str(int(Path(name).stem) % 3) for name, row in rows.items())

    source = write_table(tmp_path / "tables" / "0.parquet", {"image": [picture(n) for n in range(4)]})
    first = part(source, tmp_path / "b", 1)
    write_table(tmp_path / "tables" / "1.parquet", {"image": [picture(n) for n in range(4, 9)]})
    second = part(source, tmp_path / "b", 2, first[0])
    assert (second[0].facts["listed"], second[0].facts["known"]) == (5, 1)
    whole = joined(tmp_path / "b", first[1], second[1])
    assert whole.facts["counts"]["total"]["served"] == 9


def test_three_parts_know_each_other(tmp_path):
    tables = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    pq.write_table(pa.table({"path": ["a", "b", "d"], "size": [1, 1, 1]}), tables[0])
    pq.write_table(pa.table({"path": ["a", "c"], "size": [2, 1]}), tables[1])
    earlier = EarlierListing(tables)
    listing = [("a", 1), ("b", 3), ("e", 1)]
    assert [earlier.is_new(*entry) for entry in listing] == [False, True, True]
    assert earlier.counts() == {"known": 1, "changed": 1, "gone": 2}
