"""The dataset's manifest: which image is where, written last and read by row group.

Files, in a generation's directory: samples.parquet (one row per sample, one row group per shard, in shard and offset
order), shards.parquet (one row per shard that holds samples), quarantine.parquet (one row per refused image) and
manifest.json (written last: its presence means the dataset is complete). `pipeline.data.dataset.schema` has the columns.
Shards are under a root, at `key`; tars indexed in place are at an address of their own (`locate_shard`).
Digest: SHA-256 over the columns' values, so neither Parquet's encoding nor the number of tasks or generations that made the
files can change it. It leaves out `detail` (words for people) and the folders above shards and indexed tars.
Counts: listed = stored + quarantined and stored = served + duplicates in every split, or nothing is written or opened.
Errors: DataError when files are missing, damaged, or do not add up."""

import io
import json
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from pipeline.data.dataset.digests import ContentHash, content_digest, json_digest
from pipeline.data.dataset.facts import Counts, DatasetCounts, DatasetFacts, SplitLabels
from pipeline.data.dataset.schema import (
    QUARANTINE,
    SAMPLES,
    SHARDS,
    QuarantineTable,
    SampleRow,
    SampleTable,
    ShardRow,
    ShardTable,
)
from pipeline.data.dataset.understanding import SplitTally
from pipeline.errors import DataError
from pipeline.storage import MissingObject, Store
from pipeline.storage.files import RangeFile

SCHEMA_VERSION = 1
MANIFEST_FILES = ("samples.parquet", "shards.parquet", "quarantine.parquet", "manifest.json")
_TABLES_HELD = 64
"""Shards whose samples stay in memory."""
_COUNTS = TypeAdapter(DatasetCounts)
# page checksums, because without them a flipped bit in a table would silently become another sample
_CHECKED: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


class ManifestIdentity(TypedDict):
    """What the dataset's digest covers besides its tables."""

    schema: int
    classes: list[str]
    policy: dict[str, int]  # the fields of an IntakePolicy
    counts: dict[str, Any]  # DatasetCounts


class ManifestDocument(ManifestIdentity):
    """manifest.json."""

    digest: str
    bytes: dict[str, int]  # table -> size


def write_manifest(
    store: Store,
    *,
    samples: Iterable[SampleTable],
    shards: ShardTable,
    quarantine: QuarantineTable,
    listed: Mapping[str, int],
    classes: Sequence[str],
    policy: Mapping[str, int],
) -> DatasetFacts:
    """Write the four files, manifest.json last, and return digest, counts, classes, shards and splits.

    `samples` yields one table per row of `shards`, in the same order; it is read once, one table at a time.
    `listed`: images that the snapshot lists in each split.
    """
    # select and cast: columns, their order and their types enter the digest, whatever the caller's table has besides
    shards = shards.select(SHARDS.names).cast(SHARDS).sort_by("shard")
    quarantine = (
        quarantine.select(QUARANTINE.names).cast(QUARANTINE).sort_by([("split", "ascending"), ("source", "ascending")])
    )
    written = _WrittenSamples()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in MANIFEST_FILES[:3]}
        written.write(paths["samples.parquet"], shards.to_pylist(), samples)
        pq.write_table(shards, paths["shards.parquet"], **_CHECKED)
        pq.write_table(quarantine, paths["quarantine.parquet"], **_CHECKED)
        counts = _counts(listed, written.stored, written.served, Counter(quarantine.column("split").to_pylist()))
        check_counts(counts, store.uri)
        hashes = {
            "samples": written.content.hexdigest(),
            "shards": content_digest(_without_folders(shards), SHARDS.names),
            # `detail` quotes messages of libraries, which change with their versions
            "quarantine": content_digest(quarantine, [name for name in QUARANTINE.names if name != "detail"]),
        }
        identity: ManifestIdentity = {
            "schema": SCHEMA_VERSION,
            "classes": list(classes),
            "policy": dict(policy),
            "counts": asdict(counts),
        }
        digest = json_digest({**identity, "tables": hashes})
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        for name, path in paths.items():
            store.upload(name, path)
    document: ManifestDocument = {**identity, "digest": digest, "bytes": sizes}
    store.write("manifest.json", json.dumps(document, indent=1, sort_keys=True).encode())
    return DatasetFacts(
        digest=digest,
        counts=counts,
        classes=tuple(classes),
        shards=shards.num_rows,
        splits=tuple(counts.splits),
        labels=written.tally.splits(classes, also=counts.splits),
    )


class _WrittenSamples:
    """samples.parquet as it is written, and what is counted on the way."""

    def __init__(self) -> None:
        self.stored, self.served = Counter[str](), Counter[str]()
        self.tally, self.content = SplitTally(), ContentHash(SAMPLES.names)

    def write(self, path: Path, shards: Sequence[ShardRow], samples: Iterable[SampleTable]) -> None:
        """Write the samples of each shard, one table at a time."""
        with pq.ParquetWriter(path, SAMPLES, **_CHECKED) as writer:
            for shard, table in zip(shards, samples, strict=True):
                # by offset: the digest depends on the order of rows, and links of indexed tars are not in it
                rows = table.select(SAMPLES.names).cast(SAMPLES).sort_by("offset")
                _check_shard(shard, rows)
                # one row group per shard, so that a reader of a shard fetches its rows and no others
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))
                self.content.update(rows)
                self.stored[shard["split"]] += rows.num_rows
                self.served[shard["split"]] += shard["served"]
                self.tally.add_served(shard["split"], rows)


def check_counts(counts: DatasetCounts, location: str) -> None:
    """Raise DataError unless every split, and the total, adds up."""
    for name, count in [*counts.splits.items(), ("total", counts.total)]:
        if count.listed != count.stored + count.quarantined or count.stored != count.served + count.duplicates:
            raise DataError(
                f"{location}: the counts of {name} do not add up: {asdict(count)}. listed must be stored + quarantined, and "
                "stored must be served + duplicates: images were lost or counted twice. Run the step again from a new snapshot"
            )
    if counts.total != _total(counts.splits):
        raise DataError(
            f"{location}: total {asdict(counts.total)} is not the sum of the splits. Run the step again from a new snapshot"
        )


class Manifest:
    """A complete dataset, opened for reading. Threads may share it; each process opens its own."""

    def __init__(
        self, store: Store, root: Store, document: ManifestDocument, shards: ShardTable, samples: pq.ParquetFile
    ) -> None:
        self._store = store
        self.root = root
        """Where the shards are, at their `key` (see `locate_shard`)."""
        self.digest: str = document["digest"]
        """The dataset's identity."""
        self.counts: DatasetCounts = _COUNTS.validate_python(document["counts"])
        self.classes: tuple[str, ...] = tuple(document["classes"])
        """Label names; a label is an index into them."""
        self.policy: Mapping[str, int] = document["policy"]
        """The fields of the IntakePolicy that admitted the images."""
        self._shards = shards
        self._row_group = {shard: index for index, shard in enumerate(shards.column("shard").to_pylist())}
        self._samples = samples
        self._held: OrderedDict[int, SampleTable] = OrderedDict()
        self._lock = threading.Lock()  # a ParquetFile does not serve several threads at a time

    @classmethod
    def open(cls, store: Store, root: Store) -> "Manifest":
        """Open the tables in `store`, the generation's directory. `root`: what the shards' keys are relative to."""
        try:
            document: ManifestDocument = json.loads(store.read("manifest.json"))
            if document["schema"] != SCHEMA_VERSION:
                raise DataError(
                    f"{store.uri}/manifest.json: schema {document['schema']}, but this version reads schema {SCHEMA_VERSION}. "
                    "Run its shard step again"
                )
            # one row per shard, small enough to be held whole
            shards = pq.read_table(io.BytesIO(store.read("shards.parquet")), page_checksum_verification=True)
            # samples.parquet grows with the dataset, so only its footer is read here
            local = store.local_path("samples.parquet")
            source = local or RangeFile(store, "samples.parquet", document["bytes"]["samples.parquet"])
            # pre_buffer: one coalesced read of a row group instead of one request per column
            samples = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
            manifest = cls(store, root, document, shards, samples)
        except (MissingObject, FileNotFoundError) as error:
            raise DataError(f"{store.uri}: the dataset is not complete ({error}). Run its shard step again") from error
        except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and ValidationError are ValueErrors
            raise DataError(f"{store.uri}: the manifest is damaged ({error}). Run its shard step again") from error
        check_counts(manifest.counts, store.uri)
        if samples.metadata.num_row_groups != shards.num_rows:
            raise DataError(
                f"{store.uri}: samples.parquet has {samples.metadata.num_row_groups} row groups for {shards.num_rows} shards, so "
                "the files are of different runs. Run its shard step again"
            )
        return manifest

    @property
    def shard_numbers(self) -> tuple[int, ...]:
        """All shards, ascending."""
        return tuple(self._row_group)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted(self.counts.splits))

    def labels(self) -> dict[str, SplitLabels]:
        """Count the labels of the served images, by split. Reads every row."""
        tally = SplitTally()
        for row in self._shards.to_pylist():
            tally.add_served(row["split"], self.stored_samples(row["shard"]))
        return tally.splits(self.classes, also=self.splits)

    def sample_with_label_from(self, lowest: int) -> SampleRow | None:
        """Return a stored sample whose label is `lowest` or above, or None. Reads rows of a shard only if it has one."""
        column = SAMPLES.names.index("label")
        for shard, group in self._row_group.items():
            # the footer's statistics, which cost no read
            if self._samples.metadata.row_group(group).column(column).statistics.max >= lowest:
                rows = self.stored_samples(shard)
                row: SampleRow = rows.filter(pc.greater_equal(rows.column("label"), lowest)).slice(0, 1).to_pylist()[0]
                return row
        return None

    def shards(self, split: str) -> ShardTable:
        """Return the split's rows of shards.parquet, by shard number."""
        if split not in self.splits:
            raise DataError(f"{self.root.uri}: no split {split!r}; the dataset has {', '.join(self.splits)}")
        return self._shards.filter(pc.equal(self._shards.column("split"), split))

    def all_shards(self) -> ShardTable:
        """Return every row of shards.parquet, by shard number."""
        return self._shards

    def quarantine(self) -> QuarantineTable:
        """Return the rows of quarantine.parquet."""
        data = self._store.read("quarantine.parquet")
        try:
            return pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._store.uri}: quarantine.parquet is damaged ({error}). Run the shard step again"
            ) from error

    def samples(self, shard: int) -> SampleTable:
        """Return the served samples of a shard, by offset. The most recently used tables stay in memory."""
        with self._lock:
            if shard not in self._held:
                rows = self._read(shard)
                # filtered once here rather than by every reader of the shard
                self._held[shard] = rows.filter(rows.column("served")).combine_chunks()
                if len(self._held) > _TABLES_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(shard)
            return self._held[shard]

    def stored_samples(self, shard: int) -> SampleTable:
        """Return every sample of a shard, by offset, including duplicates that are not served. Each call reads the file."""
        with self._lock:
            return self._read(shard)

    def _read(self, shard: int) -> SampleTable:
        if shard not in self._row_group:
            raise DataError(f"{self.root.uri}: no shard {shard}; the dataset has {len(self._row_group)} shards")
        try:
            return self._samples.read_row_group(self._row_group[shard])
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.root.uri}: samples.parquet is damaged at shard {shard} ({error}). Run the shard step again"
            ) from error


def _counts(
    listed: Mapping[str, int], stored: Counter[str], served: Counter[str], quarantined: Counter[str]
) -> DatasetCounts:
    splits = {
        split: Counts(
            listed=listed.get(split, 0),
            stored=stored[split],
            served=served[split],
            duplicates=stored[split] - served[split],
            quarantined=quarantined[split],
        )
        for split in sorted({*listed, *stored, *quarantined})
    }
    return DatasetCounts(total=_total(splits), splits=splits)


def _total(splits: Mapping[str, Counts]) -> Counts:
    names = [field.name for field in fields(Counts)]
    return Counts(**{name: sum(getattr(count, name) for count in splits.values()) for name in names})


def _without_folders(shards: ShardTable) -> ShardTable:
    """Drop from the keys what differs between machines, so the digest does not depend on where tars and steps are."""
    keys = [
        # find() is -1 for a key that begins with `shards/`, which keeps all of it
        key.rpartition("/")[2] if "://" in key else key[key.find("/shards/") + 1 :]
        for key in shards.column("key").to_pylist()
    ]
    return shards.set_column(shards.column_names.index("key"), "key", pa.array(keys, pa.string()))


def _check_shard(shard: ShardRow, rows: SampleTable) -> None:
    numbers = set(rows.column("shard").to_pylist())
    served = pc.sum(rows.column("served")).as_py()
    if numbers != {shard["shard"]} or rows.num_rows != shard["samples"] or served != shard["served"]:
        raise DataError(
            f"shard {shard['shard']} ({shard['key']}): its samples are {rows.num_rows} rows, {served} of them served, of shards "
            f"{sorted(numbers)}; its own row says {shard['samples']} samples, {shard['served']} of them served. Delete its row "
            "under rows/ and run the step again"
        )
