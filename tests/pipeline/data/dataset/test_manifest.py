"""The manifest adds up or is refused; its digest depends on content alone."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.dataset import manifest as module
from pipeline.data.dataset.facts import Counts
from pipeline.data.dataset.manifest import MANIFEST_FILES, Manifest, write_manifest
from pipeline.data.dataset.schema import QUARANTINE, SAMPLES, SHARDS, SNAPSHOT, TABLE_SNAPSHOT
from pipeline.errors import DataError, StorageError
from pipeline.storage import open_store


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    if request.param == "file":
        return open_store(str(tmp_path / "store"))
    return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/step")


def shard_samples(shard, count, split="train", unserved=()):
    rows = [
        {
            "sample_id": shard * 100 + number,
            "shard": shard,
            "offset": 512 + 1024 * number,
            "length": 300 + number,
            "crc32": 2**32 - 1 - number,
            "sha256": f"{shard:032x}{number:032x}",
            "dhash64": 2**64 - 1 - number,
            "width": 20,
            "height": 10,
            "original_width": 40,
            "original_height": 20,
            "label": number % 2,
            "key": f"{number:012d}",
            "source": f"Käse/{number}.jpg",
            "split": split,
            "served": number not in unserved,
            "policy": "kept",
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def content():
    """Three shards of five, four and three samples, one duplicate, one refused: the arguments of write_manifest."""
    samples = [shard_samples(0, 5, unserved=(2,)), shard_samples(3, 4), shard_samples(7, 3, split="test")]
    shards = [
        {
            "shard": table.column("shard")[0].as_py(),
            "key": f"shards/ab/{number}.tar",
            "bytes": 10_240,
            "samples": table.num_rows,
            "served": sum(table.column("served").to_pylist()),
            "sha256": "ab",
            "split": table.column("split")[0].as_py(),
        }
        for number, table in enumerate(samples)
    ]
    bad = {"source": "x.jpg", "split": "test", "label": -1, "reason": "empty", "detail": "0 bytes", "bytes": 0}
    return {
        "samples": samples,
        "shards": pa.Table.from_pylist(shards, schema=SHARDS),
        "quarantine": pa.Table.from_pylist([bad], schema=QUARANTINE),
        "listed": {"train": 9, "test": 4},
        "classes": ["cat", "dog"],
        "policy": {"image_max_short_side": 512},
    }


def test_what_is_written_is_read(store):
    facts = write_manifest(store.at("g0001"), **content())
    assert sorted(item.key for item in store.at("g0001").list()) == sorted(MANIFEST_FILES)
    manifest = Manifest.open(store.at("g0001"), store)
    assert manifest.digest == facts.digest
    assert manifest.classes == ("cat", "dog")
    assert manifest.splits == ("test", "train")
    assert manifest.shards("train").column("shard").to_pylist() == [0, 3]
    assert manifest.shards("train").column("served").to_pylist() == [4, 4]
    assert manifest.samples(0).column("sample_id").to_pylist() == [0, 1, 3, 4]  # 2 is not served
    assert manifest.samples(7).drop_columns("split").equals(shard_samples(7, 3).drop_columns("split"))
    assert manifest.counts.splits["train"] == Counts(listed=9, stored=9, served=8, duplicates=1, quarantined=0)
    assert manifest.counts.total == Counts(listed=13, stored=12, served=11, duplicates=1, quarantined=1)
    written = json.loads(store.at("g0001").read("manifest.json"))["counts"]
    assert written == {"total": asdict(manifest.counts.total), "splits": facts.as_json()["counts"]["splits"]}
    assert facts.shards == 3


def test_the_columns_of_the_tables_stay():
    # SCHEMA_VERSION promises these columns to readers: if this fails, fix the change, or raise SCHEMA_VERSION.
    columns = {
        "samples": "sample_id int64, shard int32, offset int64, length int64, crc32 int64, sha256 string, dhash64 uint64, "
        "width int32, height int32, original_width int32, original_height int32, label int32, key string, source string, "
        "split string, served bool, policy string",
        "shards": "shard int32, key string, bytes int64, samples int32, served int32, sha256 string, split string",
        "quarantine": "source string, split string, label int32, reason string, detail string, bytes int64",
        "snapshot": "sample_id int64, path string, size int64, label int32, split string",
        "table snapshot": "sample_id int64, path string, size int64, label int32, split string, row_group int32",
    }
    schemas = (SAMPLES, SHARDS, QUARANTINE, SNAPSHOT, TABLE_SNAPSHOT)
    for schema, expected in zip(schemas, columns.values(), strict=True):
        assert ", ".join(f"{field.name} {field.type}" for field in schema) == expected
        assert not any(field.nullable for field in schema)


def test_offset_order_whatever_order_came_in(tmp_path):
    given = content()
    given["samples"][1] = given["samples"][1].sort_by([("offset", "descending")])
    given["shards"] = given["shards"].sort_by("shard")
    facts = write_manifest(open_store(str(tmp_path / "a")), **given)
    assert Manifest.open(*[open_store(str(tmp_path / "a"))] * 2).samples(3).column("offset").to_pylist() == [
        512,
        1536,
        2560,
        3584,
    ]
    assert facts.digest == write_manifest(open_store(str(tmp_path / "b")), **content()).digest


def test_the_digest_ignores_encoding_and_sees_every_column(tmp_path):
    store = open_store(str(tmp_path))
    base = write_manifest(store, **content()).digest
    chunked = content()
    chunked["samples"] = [pa.concat_tables([table.slice(0, 2), table.slice(2)]) for table in chunked["samples"]]
    chunked["shards"] = pa.concat_tables([chunked["shards"].slice(0, 1), chunked["shards"].slice(1)])
    chunked["listed"] = dict(reversed(chunked["listed"].items()))
    assert write_manifest(store, **chunked).digest == base

    seen = {base}
    for column in set(SAMPLES.names) - {"shard", "split", "served"}:  # these three are tied to shards.parquet
        changed = content()
        table = changed["samples"][1]
        values = table.column(column).to_pylist()
        values[1] = values[1] + ("x" if isinstance(values[1], str) else -1)
        index = table.column_names.index(column)
        changed["samples"][1] = table.set_column(
            index, SAMPLES.field(column), pa.array(values, SAMPLES.field(column).type)
        )
        seen.add(write_manifest(store, **changed).digest)
    for column in ("key", "bytes", "sha256"):
        changed = content()
        rows = changed["shards"].to_pylist()
        rows[2][column] = rows[2][column] * 2
        seen.add(write_manifest(store, **changed | {"shards": pa.Table.from_pylist(rows, schema=SHARDS)}).digest)
    for field, value in (("classes", ["cat", "cow"]), ("policy", {"image_max_short_side": 256})):
        seen.add(write_manifest(store, **content() | {field: value}).digest)
    assert len(seen) == 1 + 14 + 3 + 2


def test_text_cannot_slide_between_rows(tmp_path):
    digests = set()
    for sources in (["ab", "c"], ["a", "bc"]):
        rows = [
            {"source": text, "split": "test", "label": 0, "reason": "r", "detail": "", "bytes": 1} for text in sources
        ]
        given = content() | {
            "quarantine": pa.Table.from_pylist(rows, schema=QUARANTINE),
            "listed": {"train": 9, "test": 5},
        }
        digests.add(write_manifest(open_store(str(tmp_path)), **given).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: given["listed"].update(train=10),
        lambda given: given["listed"].pop("test"),
        lambda given: given.update(quarantine=given["quarantine"].slice(0, 0)),
        lambda given: given["samples"].__setitem__(0, shard_samples(0, 4, unserved=(2,))),
        lambda given: given["samples"].__setitem__(0, shard_samples(0, 5)),
        lambda given: given["samples"].__setitem__(1, shard_samples(4, 4)),
    ],
)
def test_what_does_not_add_up_is_not_written(tmp_path, spoil):
    given = content()
    spoil(given)
    store = open_store(str(tmp_path))
    with pytest.raises(DataError, match=r"add up|its own row says"):
        write_manifest(store, **given)
    assert not store.exists("manifest.json")


def test_an_incomplete_or_damaged_manifest_is_refused(store):
    write_manifest(store, **content())
    whole = {name: store.read(name) for name in MANIFEST_FILES}

    def read_all():
        manifest = Manifest.open(store, store)
        return [manifest.samples(shard) for shard in (0, 3, 7)]

    def refuses(words):
        with pytest.raises((DataError, StorageError), match=words):
            read_all()

    for name in set(MANIFEST_FILES) - {"quarantine.parquet"}:
        store.delete(name)
        refuses("not complete")
        store.write(name, whole[name][: len(whole[name]) // 2])
        refuses("damaged|ends early")
        store.write(name, whole[name])
    document = json.loads(whole["manifest.json"])
    for change, words in (
        ({"schema": 99}, "schema 99"),
        ({"counts": document["counts"] | {"total": {}}}, "damaged|sum|add up"),
    ):
        store.write("manifest.json", json.dumps(document | change).encode())
        refuses(words)


def test_a_flipped_bit_never_gives_other_samples(tmp_path):
    store = open_store(str(tmp_path))
    write_manifest(store, **content())
    whole = store.read("samples.parquet")
    expected = [Manifest.open(store, store).samples(shard) for shard in (0, 3, 7)]
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for position in range(4, footer, 11):
        spoilt = bytearray(whole)
        spoilt[position] ^= 16
        (tmp_path / "samples.parquet").write_bytes(spoilt)
        try:
            manifest = Manifest.open(store, store)
            found = [manifest.samples(shard) for shard in (0, 3, 7)]
        except DataError:
            refused += 1
        else:  # a bit that no reader uses
            assert found == expected, position
    assert refused > 100


def test_unknown_names_are_answered_with_the_known(tmp_path):
    store = open_store(str(tmp_path))
    write_manifest(store, **content())
    with pytest.raises(DataError, match=r"no split 'val'; the dataset has test, train"):
        Manifest.open(store, store).shards("val")
    with pytest.raises(DataError, match="no shard 5"):
        Manifest.open(store, store).samples(5)


def test_threads_share_a_manifest_that_holds_few_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TABLES_HELD", 1)
    store = open_store(str(tmp_path))
    write_manifest(store, **content())
    manifest = Manifest.open(store, store)
    expected = {shard: manifest.samples(shard).column("sample_id").to_pylist() for shard in (0, 3, 7)}

    def read(shard):
        return all(manifest.samples(shard).column("sample_id").to_pylist() == expected[shard] for _ in range(50))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(read, (0, 3, 7) * 2))


def test_other_readers_open_the_tables(tmp_path):
    write_manifest(open_store(str(tmp_path)), **content())
    assert pq.ParquetFile(tmp_path / "samples.parquet").metadata.num_row_groups == 3
    assert pq.read_table(tmp_path / "quarantine.parquet").to_pylist()[0]["reason"] == "empty"
