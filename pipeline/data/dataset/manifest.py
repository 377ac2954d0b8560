"""The dataset's manifest: which image lies where, written last and read by row group.

Files, in a generation's directory: samples.parquet (a row a sample, a row group a shard, in shard and offset order),
shards.parquet (a row a shard that holds samples), quarantine.parquet (a row a refused image), manifest.json (written
last: its presence means complete). Shards lie under a root, at `key`; tars of others, indexed where they are, at an
address of their own (`locate`).
Units: bytes; offsets count from the start of the tar to the first byte of the image.
Digest: SHA-256 over the columns' values, so that neither Parquet's encoding nor the number of tasks or generations that
made the files can change it; `detail`, words for people, is left out, and so are the folders above shards and indexed tars.
Counts: listed = stored + quarantined and stored = served + duplicates, in every split, or nothing is written or opened.
Errors: DataError when files are missing, damaged, or do not add up."""

import hashlib
import io
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.files import RangeFile

SCHEMA_VERSION = 1
MANIFEST_FILES = ("samples.parquet", "shards.parquet", "quarantine.parquet", "manifest.json")
NO_LABEL = -1
_TABLES_HELD = 64


def _schema(**types: Any) -> Any:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


SAMPLES = _schema(
    sample_id=pa.int64(),  # row number in the snapshot; in an indexed tar, counted through the tars
    shard=pa.int32(),
    offset=pa.int64(),
    length=pa.int64(),
    crc32=pa.int64(),  # zlib's, of the stored bytes
    sha256=pa.string(),  # of the stored bytes, hex
    dhash64=pa.uint64(),  # perceptual: near duplicates differ in few bits
    width=pa.int32(),  # as stored
    height=pa.int32(),
    original_width=pa.int32(),
    original_height=pa.int32(),
    label=pa.int32(),  # index into classes, NO_LABEL = none
    key=pa.string(),  # webdataset's __key__
    source=pa.string(),  # path relative to the source
    split=pa.string(),
    served=pa.bool_(),  # False: an exact duplicate of a sample that is served
    policy=pa.string(),  # "kept", or "reencoded:" and why: "reencoded:exif,cmyk"
)
SHARDS = _schema(
    shard=pa.int32(),
    key=pa.string(),  # relative to the manifest's root, or the address of a tar indexed in place
    bytes=pa.int64(),
    samples=pa.int32(),
    served=pa.int32(),
    sha256=pa.string(),
    split=pa.string(),
)
QUARANTINE = _schema(
    source=pa.string(),
    split=pa.string(),
    label=pa.int32(),
    reason=pa.string(),  # a short class: unreadable, truncated, empty, too_many_pixels, ...
    detail=pa.string(),
    bytes=pa.int64(),
)


class ContentHash:
    """A hash of a table's values, fed in any number of pieces; the way Arrow holds them does not enter."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}

    def update(self, table: Any) -> None:
        """Adds the rows of a table after those seen."""
        for name, (values, lengths) in self._hashes.items():
            column = table.column(name)
            if pa.types.is_string(column.type):
                texts = [text.encode() for text in column.to_pylist()]
                values.update(b"".join(texts))
                lengths.update(np.fromiter(map(len, texts), "<i8", len(texts)).tobytes())
            else:
                numbers = column.to_numpy()
                values.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())

    def hexdigest(self) -> str:
        """64 hex digits."""
        parts = {name: [values.hexdigest(), lengths.hexdigest()] for name, (values, lengths) in self._hashes.items()}
        return json_digest(parts)


def locate(root: Store, key: str) -> tuple[Store, str]:
    """Where a shard lies: its store, and its key there. A key that is an address (`s3://...`) is not below the root."""
    if "://" not in key:
        return root, key
    folder, _, name = key.rpartition("/")
    return open_store(folder), name


def shard_address(root: Store, key: str) -> str:
    """A shard's place in words, for messages."""
    return key if "://" in key else f"{root.uri}/{key}"


def json_digest(value: Any) -> str:
    """SHA-256 of plain JSON values in their one canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(
    store: Store,
    *,
    samples: Iterable[Any],
    shards: Any,
    quarantine: Any,
    listed: Mapping[str, int],
    classes: Sequence[str],
    policy: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the four files, manifest.json last; returns the facts {digest, counts, classes, shards, splits}.

    `samples` yields one table for each row of `shards`, in that order (SAMPLES; read once, one held at a time); `shards`
    and `quarantine` are tables; `listed` says how many images the snapshot lists in each split.
    """
    shards = shards.select(SHARDS.names).cast(SHARDS).sort_by("shard")
    order = [("split", "ascending"), ("source", "ascending")]
    quarantine = quarantine.select(QUARANTINE.names).cast(QUARANTINE).sort_by(order)
    counts = {split: _no_counts() | {"listed": count} for split, count in listed.items()}
    for split in quarantine.column("split").to_pylist():
        _of_split(counts, split)["quarantined"] += 1
    content = ContentHash(SAMPLES.names)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in MANIFEST_FILES[:3]}
        with pq.ParquetWriter(
            paths["samples.parquet"], SAMPLES, compression="zstd", write_page_checksum=True
        ) as writer:
            for shard, table in zip(shards.to_pylist(), samples, strict=True):
                rows = table.select(SAMPLES.names).cast(SAMPLES).sort_by("offset")
                _check_shard(shard, rows)
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))
                content.update(rows)
                count = _of_split(counts, shard["split"])
                count["stored"] += rows.num_rows
                count["served"] += shard["served"]
                count["duplicates"] += rows.num_rows - shard["served"]
        pq.write_table(shards, paths["shards.parquet"], compression="zstd", write_page_checksum=True)
        pq.write_table(quarantine, paths["quarantine.parquet"], compression="zstd", write_page_checksum=True)
        all_counts = {"total": _total(counts), "splits": counts}
        check_counts(all_counts, store.uri)
        hashes = {"samples": content.hexdigest(), "shards": _digest_of(_without_folders(shards), SHARDS.names)}
        hashes["quarantine"] = _digest_of(quarantine, [name for name in QUARANTINE.names if name != "detail"])
        identity = {"schema": SCHEMA_VERSION, "tables": hashes, "classes": list(classes), "policy": dict(policy)}
        document = {
            "schema": SCHEMA_VERSION,
            "digest": json_digest(identity | {"counts": all_counts}),
            "counts": all_counts,
            "classes": list(classes),
            "policy": dict(policy),
            "bytes": {name: path.stat().st_size for name, path in paths.items()},
        }
        for name, path in paths.items():
            store.upload(name, path)
    store.write("manifest.json", json.dumps(document, indent=1, sort_keys=True).encode())
    facts = {name: document[name] for name in ("digest", "counts", "classes")}
    return facts | {"shards": shards.num_rows, "splits": sorted(counts)}


def check_counts(counts: Mapping[str, Any], location: str) -> None:
    """DataError unless every split, and the total, adds up."""
    for name, count in [*counts["splits"].items(), ("total", counts["total"])]:
        if (
            count["listed"] != count["stored"] + count["quarantined"]
            or count["stored"] != count["served"] + count["duplicates"]
        ):
            raise DataError(
                f"{location}: the counts of {name} do not add up: {dict(count)}. listed must be stored + quarantined, and "
                "stored be served + duplicates; images were lost or doubled. Run the step again from a new snapshot"
            )
    if counts["total"] != _total(counts["splits"]):
        raise DataError(f"{location}: total {counts['total']} is not the sum of the splits. Run the step again")


class Manifest:
    """A complete dataset, opened for reading. Threads may share it; a process opens its own."""

    def __init__(self, store: Store, root: Store, document: Mapping[str, Any], shards: Any, samples: Any) -> None:
        self._store = store
        self.root = root
        """Where the shards lie, at their `key` (see `locate`)."""
        self.digest: str = document["digest"]
        """The dataset's identity."""
        self.counts: Mapping[str, Any] = document["counts"]
        """`{"total": {listed, stored, served, duplicates, quarantined}, "splits": {"train": {...}, ...}}`."""
        self.classes: tuple[str, ...] = tuple(document["classes"])
        """Label names; a label is an index into them."""
        self.policy: Mapping[str, Any] = document["policy"]
        """How images were taken in."""
        self._shards = shards
        self._row_group = {shard: index for index, shard in enumerate(shards.column("shard").to_pylist())}
        self._samples = samples
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, store: Store, root: Store) -> "Manifest":
        """`store`: the generation's directory, with the tables; `root`: the step's, with the shards."""
        try:
            document = json.loads(store.read("manifest.json"))
            if document["schema"] != SCHEMA_VERSION:
                raise DataError(
                    f"{store.uri}/manifest.json: schema {document['schema']}, this version reads {SCHEMA_VERSION}. Shard it again"
                )
            check_counts(document["counts"], store.uri)
            shards = pq.read_table(io.BytesIO(store.read("shards.parquet")), page_checksum_verification=True)
            local = store.local_path("samples.parquet")
            source = local or RangeFile(store, "samples.parquet", document["bytes"]["samples.parquet"])
            samples = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        except (MissingObject, FileNotFoundError) as error:
            raise DataError(f"{store.uri}: the dataset is not complete ({error}). Run its shard step again") from error
        except (OSError, ValueError, KeyError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{store.uri}: the manifest is damaged ({error}). Run its shard step again") from error
        if samples.metadata.num_row_groups != shards.num_rows:
            raise DataError(
                f"{store.uri}: {samples.metadata.num_row_groups} row groups in samples.parquet for {shards.num_rows} shards. "
                "The files are of different runs; run the shard step again"
            )
        return cls(store, root, document, shards, samples)

    @property
    def shard_numbers(self) -> tuple[int, ...]:
        """All shards, ascending."""
        return tuple(self._row_group)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted(self.counts["splits"]))

    def shards(self, split: str) -> Any:
        """The split's rows of shards.parquet (SHARDS), by shard number."""
        if split not in self.splits:
            raise DataError(f"{self.root.uri}: no split {split!r}; the dataset has {', '.join(self.splits)}")
        return self._shards.filter(pc.equal(self._shards.column("split"), split))

    def all_shards(self) -> Any:
        """Every row of shards.parquet (SHARDS), by shard number."""
        return self._shards

    def quarantine(self) -> Any:
        """The rows of quarantine.parquet (QUARANTINE)."""
        data = self._store.read("quarantine.parquet")
        try:
            return pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._store.uri}: quarantine.parquet is damaged ({error}). Run the shard step again"
            ) from error

    def samples(self, shard: int) -> Any:
        """The served samples of a shard (SAMPLES), by offset; read when first asked for, and held for a while."""
        with self._lock:
            if shard not in self._held:
                rows = self._read(shard)
                self._held[shard] = rows.filter(rows.column("served")).combine_chunks()
                if len(self._held) > _TABLES_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(shard)
            return self._held[shard]

    def stored_samples(self, shard: int) -> Any:
        """Every sample of a shard (SAMPLES), duplicates that are not served included; read anew at each call."""
        with self._lock:
            return self._read(shard)

    def _read(self, shard: int) -> Any:
        if shard not in self._row_group:
            raise DataError(f"{self.root.uri}: no shard {shard}; the dataset has {len(self._row_group)} shards")
        try:
            return self._samples.read_row_group(self._row_group[shard])
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.root.uri}: samples.parquet is damaged at shard {shard} ({error}). Run the shard step again"
            ) from error


def _no_counts() -> dict[str, int]:
    return dict.fromkeys(("listed", "stored", "served", "duplicates", "quarantined"), 0)


def _of_split(counts: dict[str, dict[str, int]], split: str) -> dict[str, int]:
    return counts.setdefault(split, _no_counts())


def _total(counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts.values()) for name in _no_counts()}


def _digest_of(table: Any, columns: Sequence[str]) -> str:
    content = ContentHash(columns)
    content.update(table)
    return content.hexdigest()


def _without_folders(shards: Any) -> Any:
    """The keys without what differs from machine to machine: the digest is the same wherever tars and steps lie."""
    keys = [
        key.rpartition("/")[2] if "://" in key else key[key.find("/shards/") + 1 :]
        for key in shards.column("key").to_pylist()
    ]
    return shards.set_column(shards.column_names.index("key"), "key", pa.array(keys, pa.string()))


def _check_shard(shard: Mapping[str, Any], rows: Any) -> None:
    numbers = set(rows.column("shard").to_pylist())
    served = pc.sum(rows.column("served")).as_py()
    if numbers != {shard["shard"]} or rows.num_rows != shard["samples"] or served != shard["served"]:
        raise DataError(
            f"shard {shard['shard']} ({shard['key']}): {rows.num_rows} rows, {served} served, of shards {sorted(numbers)}, where "
            f"its row says {shard['samples']} and {shard['served']}. Delete its row under rows/ and run the step again"
        )
