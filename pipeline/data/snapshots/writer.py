"""The pass over a source that writes a snapshot: its files are listed, then labels and splits are read from them.

Memory: rows stream through scratch files, so one batch is held, plus the labels file (`sources/labels.py`) and, for tars and
tables, the list of files."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster.progress import Progress
from pipeline.data.dataset.facts import SnapshotFacts, Understood
from pipeline.data.dataset.schema import NO_LABEL, SNAPSHOT, TABLE_SNAPSHOT
from pipeline.data.dataset.understanding import PassedOver, SplitTally, notes_on_classes
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.data.snapshots.parts import BATCH_ROWS, SNAPSHOT_FILE, EarlierListing
from pipeline.data.sources.label_tables import LabelTables, TablePaths, TableUse
from pipeline.data.sources.labels import CLASSES_MAX, Labels
from pipeline.data.sources.listing import KINDS, Role, SourceItem, SourceKind, list_source
from pipeline.data.sources.splits import (
    FolderEvidence,
    SplitOrigin,
    choose_tars,
    class_order,
    find_layout,
    named_splits,
    pool_split,
    split_and_label,
)
from pipeline.data.sources.tables import TableColumns, list_rows
from pipeline.errors import ConfigError, DataError
from pipeline.storage import open_store

_FILES = pa.schema([("path", pa.string()), ("size", pa.int64())])
_LABELLED_FILES = pa.schema([*_FILES, ("label", pa.large_string()), ("split", pa.large_string())])
_TABLE_ROWS = pa.schema([*_LABELLED_FILES, TABLE_SNAPSHOT.field("row_group")])


class Batch(TypedDict):
    """Columns of a batch of a scratch file."""

    path: list[str]
    size: list[int]
    label: NotRequired[list[str | None]]
    split: NotRequired[list[str | None]]
    row_group: NotRequired[list[int]]


Resolver = Callable[[Batch], tuple[list[str | None], list[str]]]
"""Returns label names and splits of a batch."""


@dataclass(frozen=True)
class _Listing:
    """The new files of the source, in a scratch file, and what was found on the way."""

    path: Path
    kind: SourceKind
    passed_over: PassedOver
    folders: FolderEvidence
    """Of all images, new or not, so that all parts agree on the layout."""
    labels: Labels | None
    tables: TablePaths
    without_split: int
    """Images that the labels file gives no split, new or not."""
    rows_max: float
    """Rows of tables to read; finite for a preview only."""


class _Listed(NamedTuple):
    """A written snapshot."""

    rows: int
    tally: SplitTally
    classes: tuple[str, ...]
    unlabelled: int | None
    origin: SplitOrigin
    notes: tuple[str, ...] = ()
    label_tables: Mapping[str, TableUse] | None = None
    image_folders: bool | None = None


def take_snapshot(
    config: SnapshotConfig, earlier: EarlierListing, folder: Path, progress: Progress, *, files: int | None = None
) -> tuple[SnapshotFacts, Path]:
    """Write the snapshot into the folder. Returns its facts, and the list of the source's files.

    `files`: look at the first so many only."""
    listing = _list(config, earlier, folder / "listing.parquet", progress, files=files)
    resolve = {"images": _resolve_images, "tars": _resolve_tars, "Parquet tables": _resolve_tables}[listing.kind]
    listed = resolve(config, listing, folder)
    facts = SnapshotFacts(
        kind=listing.kind,
        listed=listed.rows,
        ignored=listing.passed_over.total,
        classes=listed.classes,
        splits=listed.tally.counts,
        source=config.source,
        unlabelled=listed.unlabelled,
        understood=Understood(
            origin=listed.origin,
            splits=listed.tally.splits(listed.classes),
            passed_over=listing.passed_over.by_ending,
            notes=(*listed.notes, *notes_on_classes(listed.classes)),
        ),
        label_tables=listed.label_tables,
        image_folders=listed.image_folders,
    )
    return facts, listing.path


def _list(
    config: SnapshotConfig, earlier: EarlierListing, path: Path, progress: Progress, *, files: int | None
) -> _Listing:
    """List the source in one pass, or its first `files` files."""
    labels = Labels(config.labels) if config.labels else None
    folders, passed_over, tables = FolderEvidence(), PassedOver(), TablePaths()
    role: Role = "ignored"
    seen = without_split = 0
    schema = _LABELLED_FILES if labels else _FILES
    with pq.ParquetWriter(path, schema) as writer:
        for batch in _batches(islice(list_source(config.source, besides=config.labels), files), BATCH_ROWS):
            items = [item for item in batch if item.role != "ignored"]
            others = [item.path for item in batch if item.role == "ignored"]
            passed_over.add_all(others)
            tables.add_all(others)
            seen += len(items)
            progress.update(seen, 0, unit="files listed")
            if not items:
                continue
            role = items[0].role
            if labels and role != "image":
                raise ConfigError(
                    f"data.labels={config.labels!r} works only for folders of images; {config.source} holds {KINDS[role]}"
                )
            if role == "image":
                folders.add_all(item.path for item in items)
            match = labels.match([item.path for item in items]) if labels else None
            without_split += match.splits.count(None) if match else len(items)
            # asked for every file, as EarlierListing moves along with the listing
            new = [index for index, item in enumerate(items) if earlier.is_new(item.path, item.size)]
            columns: Batch = {
                "path": [items[index].path for index in new],
                "size": [items[index].size for index in new],
            }
            if match:
                columns["label"] = [match.labels[index] for index in new]
                columns["split"] = [match.splits[index] for index in new]
            writer.write_table(pa.table(columns, schema=schema))
    # only in a preview: a whole source without a usable file has raised in list_source
    if role == "ignored":
        raise DataError(f"{config.source}: none of its first {files} files is an image, a tar or a table")
    if labels and files is None:  # a preview has not seen every path
        labels.check_all_known(config.source)
    return _Listing(path, KINDS[role], passed_over, folders, labels, tables, without_split, files or math.inf)


def _resolve_images(config: SnapshotConfig, listing: _Listing, folder: Path) -> _Listed:
    """Take labels and splits from the labels file, the folders, tables beside the images and the keyed hash, in this order."""
    labels = listing.labels
    if config.split_from == "column" and listing.without_split:
        raise ConfigError(
            f"data.split_from=column: {config.labels or 'no labels file'} gives {listing.without_split} images of "
            f"{config.source} no split. Fill the column split of the file that data.labels names"
        )
    given = labels is not None and config.split_from in {None, "column"}
    layout = find_layout(
        listing.folders,
        config.split_from,
        labels_given=labels is not None,
        splits_given=given and not listing.without_split,
    )
    classes = labels.classes if labels else layout.classes
    tables = LabelTables(open_store(config.source), listing.tables, () if labels else layout.classes)

    def resolve(batch: Batch) -> tuple[list[str | None], list[str]]:
        by_name = [
            split_and_label(path, layout, test_share=config.test_share, seed=config.seed) for path in batch["path"]
        ]
        pairs = zip(batch["path"], by_name, strict=True)
        names = batch.get("label") or [name or tables.label_of(path) for path, (_, name) in pairs]
        splits = [split for split, _ in by_name]
        if given:
            splits = [named or split for named, split in zip(batch["split"], splits, strict=True)]
        return names, splits

    listed = _write(folder / SNAPSHOT_FILE, read_batches(listing.path), resolve, classes, SNAPSHOT)
    notes = () if labels else listing.passed_over.emptied(listing.folders.names, layout.label_depth)
    return listed._replace(
        # the fact is about labels files and tables that leave images out, not about images outside class folders
        unlabelled=listed.unlabelled if labels else None,
        origin=layout.origin,
        notes=(*notes, *tables.notes),
        label_tables=tables.used or None,
        image_folders=True if layout.image_folders and not labels else None,
    )


def _resolve_tars(config: SnapshotConfig, listing: _Listing, folder: Path) -> _Listed:
    """Put whole tars into splits."""
    paths = pq.read_table(listing.path).column("path").to_pylist()
    if config.split_from == "column":
        raise ConfigError(
            f"data.split_from=column: {config.source} holds tars, which have no columns. Write path, name or hash"
        )
    named = named_splits(paths, config.split_from)
    splits = named or choose_tars(paths, test_share=config.test_share, seed=config.seed)
    split_of = dict(zip(paths, splits, strict=True))

    def resolve(batch: Batch) -> tuple[list[str | None], list[str]]:
        return [None] * len(batch["path"]), [split_of[path] for path in batch["path"]]

    listed = _write(folder / SNAPSHOT_FILE, read_batches(listing.path), resolve, (), SNAPSHOT)
    return listed._replace(unlabelled=None, origin="names" if named else "hash")


def _resolve_tables(config: SnapshotConfig, listing: _Listing, folder: Path) -> _Listed:
    """Take the labels of table rows from their column, and the splits from their column, the file name or the keyed hash."""
    files = pq.read_table(listing.path).to_pylist()
    by_column = config.split_column is not None and config.split_from in {None, "column"}
    if config.split_from == "column" and not by_column:
        raise ConfigError(
            "data.split_from=column needs data.split_column: write the name of the column with the splits"
        )
    splits = None if by_column else named_splits([file["path"] for file in files], config.split_from)
    columns = TableColumns(config.image_column, config.label_column, config.split_column if by_column else None)
    scratch, names = folder / "rows.parquet", set[str]()
    # two passes: labels are numbered by the sorted names of all classes, which are known only after the first one
    with pq.ParquetWriter(scratch, _TABLE_ROWS) as writer:
        read = 0
        for number, file in enumerate(files):
            if read >= listing.rows_max:
                break
            for rows in list_rows(config.source, file["path"], file["size"], columns, batch_rows=BATCH_ROWS):
                names.update(rows.column("label").drop_null().unique().to_pylist())
                if len(names) > CLASSES_MAX:
                    raise DataError(
                        f"{config.source}: column {config.label_column!r} has more than {CLASSES_MAX} distinct values, too many "
                        "to be classes. Set data.label_column to another column, or to null for no labels"
                    )
                batch = rows
                if splits:
                    named = pa.array([splits[number]] * rows.num_rows, pa.large_string())
                    batch = rows.set_column(rows.column_names.index("split"), "split", named)
                if config.split_from == "column" and (empty := batch.column("split").null_count):
                    raise DataError(
                        f"data.split_from=column: {empty} of the rows of {file['path']} from row {rows.column('path')[0]} "
                        f"on have no {config.split_column}. Fill the column with train, val or test"
                    )
                read += rows.num_rows
                writer.write_table(batch.select(_TABLE_ROWS.names).cast(_TABLE_ROWS))

    def resolve(batch: Batch) -> tuple[list[str | None], list[str]]:
        resolved = [
            given or pool_split(path, test_share=config.test_share, seed=config.seed)
            for given, path in zip(batch["split"], batch["path"], strict=True)
        ]
        return batch["label"], resolved

    listed = _write(folder / SNAPSHOT_FILE, read_batches(scratch), resolve, class_order(names), TABLE_SNAPSHOT)
    return listed._replace(origin="column" if by_column else "names" if splits else "hash")


def _write(
    path: Path, batches: Iterable[Batch], resolve: Resolver, classes: tuple[str, ...], schema: pa.Schema
) -> _Listed:
    """Write the snapshot, batch by batch."""
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    label_of[None] = NO_LABEL
    first = 0
    tally = SplitTally()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            names, splits = resolve(batch)
            labels = [label_of[name] for name in names]
            tally.add(splits, labels, batch["path"])
            ids = range(first, first + len(splits))
            columns: dict[str, Any] = {**batch, "sample_id": ids, "label": labels, "split": splits}
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema))
            first = ids.stop
    return _Listed(first, tally, classes, tally.unlabelled, "hash")


def read_batches(path: Path) -> Iterator[Batch]:
    """Yield the rows of a scratch file, or of a snapshot."""
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            yield batch.to_pydict()


def _batches(items: Iterator[SourceItem], size: int) -> Iterator[list[SourceItem]]:
    while batch := list(islice(items, size)):
        yield batch


def preview(config: SnapshotConfig, progress: Progress, *, files: int) -> SnapshotFacts:
    """Return the facts of a listing of the first files of the source. Nothing is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        return take_snapshot(config, EarlierListing([]), Path(scratch), progress, files=files)[0]
