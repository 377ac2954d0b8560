"""Snapshot: the listing of a source, pinned. Nothing is read but names and sizes.

Output: snapshot.parquet (sample_id, path, size, label, split; a row an image, in path order, sample_id = row number; label
is an index into the fact `classes`, -1 = none). Rows stream through a scratch file: memory holds one batch.
Errors: those of the source (`pipeline/data/sources.py`)."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.manifest import NO_LABEL
from pipeline.data.sources import SourceItem, find_layout, folders_of, list_source, place
from pipeline.errors import ConfigError
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1
SNAPSHOT_FILE = "snapshot.parquet"
_BATCH_ROWS = 50_000
_LISTING = pa.schema([("path", pa.string()), ("size", pa.int64())])
_SNAPSHOT = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """What is listed, and how one pool is split."""

    source: str
    """Folder or s3:// prefix of images."""
    snapshot: str = "1"
    """Name of the listing; a new name lists a source that has changed anew."""
    test_share: float
    """Share of the images held out as `test` when the source has no split folders, in [0, 1)."""
    seed: int
    """Key of the hash that chooses them."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_share < 1.0:
            raise ConfigError(f"test_share={self.test_share} is not in [0, 1): write 0.1 for 10 %")


def snapshot(config: SnapshotConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Lists the source; facts {listed, ignored, classes, splits: {name: images}, source}."""
    with tempfile.TemporaryDirectory() as folder:
        listing, table = Path(folder) / "listing.parquet", Path(folder) / SNAPSHOT_FILE
        folders: set[tuple[str, ...]] = set()
        ignored = listed = 0
        with pq.ParquetWriter(listing, _LISTING) as writer:
            for batch in _batches(list_source(config.source)):
                images = [item for item in batch if item.role == "image"]
                ignored += len(batch) - len(images)
                listed += len(images)
                folders.update(folders_of(item.path) for item in images)
                columns = {"path": [item.path for item in images], "size": [item.size for item in images]}
                writer.write_table(pa.table(columns, schema=_LISTING))
                attempt.progress.update(listed, listed, unit="files listed")
        layout = find_layout(folders)
        label_of = {name: label for label, name in enumerate(layout.classes)}
        splits: dict[str, int] = {}
        first = 0
        with pq.ParquetWriter(table, _SNAPSHOT, compression="zstd") as writer, pq.ParquetFile(listing) as lines:
            for batch in lines.iter_batches(batch_size=_BATCH_ROWS):
                paths = batch.column("path").to_pylist()
                placed = [place(path, layout, test_share=config.test_share, seed=config.seed) for path in paths]
                for split, _ in placed:
                    splits[split] = splits.get(split, 0) + 1
                columns = {
                    "sample_id": range(first, first + len(paths)),
                    "path": paths,
                    "size": batch.column("size"),
                    "label": [NO_LABEL if name is None else label_of[name] for _, name in placed],
                    "split": [split for split, _ in placed],
                }
                writer.write_table(pa.table(columns, schema=_SNAPSHOT))
                first += len(paths)
        attempt.store.upload(SNAPSHOT_FILE, table)
    facts: dict[str, Any] = {"listed": listed, "ignored": ignored, "classes": list(layout.classes)}
    facts |= {"splits": dict(sorted(splits.items())), "source": config.source}
    return StageResult(facts=facts, files=(SNAPSHOT_FILE,))


def _batches(items: Iterator[SourceItem]) -> Iterator[list[SourceItem]]:
    while batch := list(islice(items, _BATCH_ROWS)):
        yield batch
