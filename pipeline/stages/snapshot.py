"""Snapshot: the listing of a source, pinned. Of images and tars nothing is read but names and sizes, of Parquet tables their
footers and the columns of labels and splits.

Output: snapshot.parquet (sample_id, path, size, label, split; a row an image, in path order, sample_id = row number; label
is an index into the fact `classes`, -1 = none). Of tars, a row a tar: labels and samples are found when it is indexed. Of
tables, a row a row: path is `<file>#<row of the file>`, size the average of its row group, whose number is `row_group`;
files.parquet lists the tables themselves.
A snapshot with inputs is a later part of a dataset: it lists what no input lists, by path and size. A file that has
changed in size is listed as new, and the older sample stays; one that is gone stays too. Both are counted.
Memory: rows stream through scratch files; one batch is held, beside the labels file (`pipeline/data/sources/labels.py`) and, of tars
and tables, the list of files. 10 million images: see docs/data.md.
Errors: those of the source (`pipeline/data/sources/listing.py`), the labels and the tables (`pipeline/data/sources/tables.py`)."""

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.dataset.manifest import NO_LABEL
from pipeline.data.sources.labels import CLASSES_MAX, Labels
from pipeline.data.sources.listing import KINDS, Role, SourceItem, list_source
from pipeline.data.sources.splits import (
    FolderLayout,
    choose_tars,
    class_order,
    find_layout,
    folders_of,
    named_splits,
    place,
    pool_split,
)
from pipeline.data.sources.tables import TableColumns, listed_rows
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import ADDED_LATER, Attempt, StageInput, StageResult
from pipeline.storage.files import local_copy

VERSION = 1
SNAPSHOT_FILE = "snapshot.parquet"
FILES_FILE = "files.parquet"
_BATCH_ROWS = 50_000
_FILES = pa.schema([("path", pa.string()), ("size", pa.int64())])
_SAID = pa.schema([*_FILES, ("label", pa.large_string()), ("split", pa.large_string())])
_SNAPSHOT = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
_ROW_GROUP = pa.field("row_group", pa.int32(), nullable=False)


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """What is listed, and how one pool is split."""

    source: str
    """Folder or s3:// prefix of images, tars or Parquet tables."""
    snapshot: str = "1"
    """Name of the listing; a new name lists a source that has changed anew."""
    test_share: float
    """Share of the images held out as `test` when the source says no splits, in [0, 1)."""
    seed: int
    """Key of the hash that chooses them."""
    labels: str | None = field(default=None, metadata=ADDED_LATER)
    """File with labels and splits of a folder of images (`pipeline/data/sources/labels.py`); None: folders are the labels."""
    image_column: str = field(default="image", metadata=ADDED_LATER)
    """Of tables: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = field(default="label", metadata=ADDED_LATER)
    """Of tables: whole numbers or text; None: no labels."""
    split_column: str | None = field(default=None, metadata=ADDED_LATER)
    """Of tables: train, val or test."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_share < 1.0:
            raise ConfigError(f"test_share={self.test_share} is not in [0, 1): write 0.1 for 10 %")


def snapshot(config: SnapshotConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Lists the source; facts {kind, listed, ignored, classes, splits: {name: images}, source} and, where there are such,
    `unlabelled` (of a labels file or table) and {known, changed, gone} (of a later part)."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        earlier = Earlier([_entries(part, folder / name) for name, part in sorted(inputs.items())])
        listing = _list(config, earlier, folder / "listing.parquet", attempt)
        lists = {"images": _place_images, "tars": _place_tars, "Parquet tables": _place_tables}[listing.kind]
        facts = lists(config, listing, folder)
        files: tuple[str, ...] = (SNAPSHOT_FILE,)
        if listing.kind == "Parquet tables":
            attempt.store.upload(FILES_FILE, listing.path)
            files = (*files, FILES_FILE)
        attempt.store.upload(SNAPSHOT_FILE, folder / SNAPSHOT_FILE)
    facts |= {"kind": listing.kind, "ignored": listing.ignored, "source": config.source}
    if inputs:
        facts |= earlier.counts()
    return StageResult(facts=facts, files=files)


class Earlier:
    """What earlier parts list: asked about every file of a listing, in path order."""

    def __init__(self, parts: Sequence[Iterator[tuple[str, int]]]) -> None:
        """`parts`: (path, size), each in path order."""
        self._entries = heapq.merge(*parts)
        self._head = next(self._entries, None)
        self.known = self.changed = self.gone = 0

    def is_new(self, path: str, size: int) -> bool:
        """Whether no part lists the file with this size."""
        self._pass(path)
        sizes = set()
        while self._head is not None and self._head[0] == path:
            sizes.add(self._head[1])
            self._head = next(self._entries, None)
        self.known += size in sizes
        self.changed += bool(sizes) and size not in sizes
        return size not in sizes

    def counts(self) -> dict[str, int]:
        """After the last file: files listed before, listed before with another size, and listed before and gone."""
        self._pass(None)
        return {"known": self.known, "changed": self.changed, "gone": self.gone}

    def _pass(self, path: str | None) -> None:
        """Goes on to `path`; what is passed over is no longer there."""
        while self._head is not None and (path is None or self._head[0] < path):
            passed = self._head[0]
            self.gone += 1
            while self._head is not None and self._head[0] == passed:
                self._head = next(self._entries, None)


def holds_news(source: str, labels: str | None, parts: Sequence[StageInput]) -> bool:
    """Whether the source holds a file that no part lists; reads on to the first."""
    with tempfile.TemporaryDirectory() as scratch:
        earlier = Earlier([_entries(part, Path(scratch) / str(number)) for number, part in enumerate(parts)])
        items = (item for item in list_source(source, besides=labels) if item.role != "ignored")
        return any(earlier.is_new(item.path, item.size) for item in items)


@dataclass(frozen=True)
class _Listing:
    """The files of the source that are new, in a scratch file, and what was seen on the way."""

    path: Path
    kind: str
    ignored: int
    folders: frozenset[tuple[str, ...]]
    """Of all images, new or not: parts agree on the layout."""
    labels: Labels | None


def _list(config: SnapshotConfig, earlier: Earlier, path: Path, attempt: Attempt) -> _Listing:
    """One pass over the source."""
    labels = Labels(config.labels) if config.labels else None
    folders: set[tuple[str, ...]] = set()
    role: Role = "ignored"
    seen = ignored = 0
    with pq.ParquetWriter(path, _SAID if labels else _FILES) as writer:
        for batch in _batches(list_source(config.source, besides=config.labels), _BATCH_ROWS):
            items = [item for item in batch if item.role != "ignored"]
            ignored += len(batch) - len(items)
            seen += len(items)
            attempt.progress.update(seen, seen, unit="files listed")
            if not items:
                continue
            role = items[0].role
            if labels and role != "image":
                raise ConfigError(
                    f"data.labels={config.labels!r} is for folders of images; {config.source} holds {KINDS[role]}"
                )
            if role == "image":
                folders.update(folders_of(item.path) for item in items)
            said = labels.match([item.path for item in items]) if labels else None
            new = [index for index, item in enumerate(items) if earlier.is_new(item.path, item.size)]
            columns: dict[str, list[Any]] = {
                "path": [items[index].path for index in new],
                "size": [items[index].size for index in new],
            }
            if said:
                columns |= {"label": [said.labels[i] for i in new], "split": [said.splits[i] for i in new]}
            writer.write_table(pa.table(columns, schema=_SAID if labels else _FILES))
    if labels:
        labels.check_all_known(config.source)
    return _Listing(path, KINDS[role], ignored, frozenset(folders), labels)


def _place_images(config: SnapshotConfig, listing: _Listing, folder: Path) -> dict[str, Any]:
    """Splits and labels by folders, keyed hash and labels file."""
    layout = find_layout(listing.folders)
    if listing.labels:
        layout = FolderLayout(layout.splits, listing.labels.classes)
    label_of = {name: label for label, name in enumerate(layout.classes)}

    def placed(batch: Mapping[str, Any]) -> tuple[list[int], list[str]]:
        where = [place(path, layout, test_share=config.test_share, seed=config.seed) for path in batch["path"]]
        names = batch.get("label", [name for _, name in where])
        splits = [split for split, _ in where]
        if "split" in batch:
            splits = [said or split for said, split in zip(batch["split"], splits, strict=True)]
        return [NO_LABEL if name is None else label_of[name] for name in names], splits

    facts = _write(folder / SNAPSHOT_FILE, _read_batches(listing.path), placed, _SNAPSHOT)
    if not listing.labels:
        del facts["unlabelled"]
    return facts | {"classes": list(layout.classes)}


def _place_tars(config: SnapshotConfig, listing: _Listing, folder: Path) -> dict[str, Any]:
    """Whole tars go to a split."""
    paths = pq.read_table(listing.path).column("path").to_pylist()
    splits = named_splits(paths) or choose_tars(paths, test_share=config.test_share, seed=config.seed)
    split_of = dict(zip(paths, splits, strict=True))

    def placed(batch: Mapping[str, Any]) -> tuple[list[int], list[str]]:
        return [NO_LABEL] * len(batch["path"]), [split_of[path] for path in batch["path"]]

    facts = _write(folder / SNAPSHOT_FILE, _read_batches(listing.path), placed, _SNAPSHOT)
    del facts["unlabelled"]
    return facts | {"classes": []}


def _place_tables(config: SnapshotConfig, listing: _Listing, folder: Path) -> dict[str, Any]:
    """Every row of the new tables, with the label and split that its columns, its file or a keyed hash say."""
    files = pq.read_table(listing.path).to_pylist()
    splits = None if config.split_column else named_splits([file["path"] for file in files])
    columns = TableColumns(config.image_column, config.label_column, config.split_column)
    rows, names = folder / "rows.parquet", set[str]()
    schema = pa.schema([*_SAID, _ROW_GROUP])
    with pq.ParquetWriter(rows, schema) as writer:
        for number, file in enumerate(files):
            for listed in listed_rows(config.source, file["path"], file["size"], columns, batch_rows=_BATCH_ROWS):
                names.update(listed.column("label").drop_null().unique().to_pylist())
                if len(names) > CLASSES_MAX:
                    raise DataError(
                        f"{config.source}: column {config.label_column!r} has more than {CLASSES_MAX} distinct values, which "
                        "are no classes. Name another data.label_column, or null for none"
                    )
                batch = listed
                if splits:
                    said = pa.array([splits[number]] * listed.num_rows, pa.large_string())
                    batch = listed.set_column(listed.column_names.index("split"), "split", said)
                writer.write_table(batch.select(schema.names).cast(schema))
    classes = class_order(names)
    label_of = {name: label for label, name in enumerate(classes)}

    def placed(batch: Mapping[str, Any]) -> tuple[list[int], list[str]]:
        split = [
            said or pool_split(path, test_share=config.test_share, seed=config.seed)
            for said, path in zip(batch["split"], batch["path"], strict=True)
        ]
        return [NO_LABEL if name is None else label_of[name] for name in batch["label"]], split

    facts = _write(folder / SNAPSHOT_FILE, _read_batches(rows), placed, pa.schema([*_SNAPSHOT, _ROW_GROUP]))
    return facts | {"classes": list(classes)}


def _write(
    path: Path,
    batches: Iterable[Mapping[str, Any]],
    placed: Callable[[Mapping[str, Any]], tuple[list[int], list[str]]],
    schema: Any,
) -> dict[str, Any]:
    """The snapshot, batch by batch; facts {listed, splits, unlabelled}."""
    first = unlabelled = 0
    splits: dict[str, int] = {}
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            labels, names = placed(batch)
            for name in names:
                splits[name] = splits.get(name, 0) + 1
            unlabelled += labels.count(NO_LABEL)
            count = len(names)
            columns = {**batch, "sample_id": range(first, first + count), "label": labels, "split": names}
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema))
            first += count
    return {"listed": first, "splits": dict(sorted(splits.items())), "unlabelled": unlabelled}


def _read_batches(path: Path) -> Iterator[dict[str, list[Any]]]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            yield batch.to_pydict()


def _entries(part: StageInput, scratch: Path) -> Iterator[tuple[str, int]]:
    """(path, size) of the files that a part lists, in path order."""
    name = FILES_FILE if SnapshotFacts.read(part.facts).kind == "Parquet tables" else SNAPSHOT_FILE
    with pq.ParquetFile(local_copy(part.store, name, scratch)) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=["path", "size"]):
            yield from zip(batch.column("path").to_pylist(), batch.column("size").to_pylist(), strict=True)


def _batches(items: Iterator[SourceItem], size: int) -> Iterator[list[SourceItem]]:
    while batch := list(islice(items, size)):
        yield batch
