"""Snapshot: a pinned listing of a source. For images and tars only names and sizes are read, for Parquet tables only the
footers and the columns of labels and splits.

Output: snapshot.parquet, one row per image in path order (SnapshotRow; sample_id = row number, label = index into the fact
`classes`). For tars, one row per tar: labels and samples are found when it is indexed. For tables, one row per table row
(TableSnapshotRow); files.parquet lists the tables themselves.
A snapshot with inputs is a later part of a dataset: it lists what no input lists, by path and size. A file whose size has
changed is listed as new while its older sample stays; the sample of a file that no longer exists stays too. Both are counted.
Memory: rows stream through scratch files, so one batch is held, plus the labels file (`sources/labels.py`) and, for tars and
tables, the list of files. For 10 million images see docs/data.md.
Errors: those of the source (`sources/listing.py`, `sources/splits.py`), the labels and the tables (`sources/tables.py`)."""

import heapq
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster.progress import Progress
from pipeline.data.dataset.facts import SnapshotFacts, Understood
from pipeline.data.dataset.schema import NO_LABEL, SNAPSHOT, TABLE_SNAPSHOT
from pipeline.data.dataset.understanding import PassedOver, SplitTally, notes_on_classes
from pipeline.data.sources.labels import CLASSES_MAX, Labels, file_sha256
from pipeline.data.sources.listing import KINDS, MOVED, Role, SourceItem, SourceKind, list_source
from pipeline.data.sources.splits import (
    FolderEvidence,
    SplitFrom,
    SplitOrigin,
    choose_tars,
    class_order,
    find_layout,
    named_splits,
    pool_split,
    split_and_label,
)
from pipeline.data.sources.tables import TableColumns, list_rows, split_row_name
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import ADDED_LATER, Attempt, StageInput, StageResult
from pipeline.storage.files import local_copy

VERSION = 1
SNAPSHOT_FILE = "snapshot.parquet"
FILES_FILE = "files.parquet"
_BATCH_ROWS = 50_000
_FILES = pa.schema([("path", pa.string()), ("size", pa.int64())])
_LABELLED_FILES = pa.schema([*_FILES, ("label", pa.large_string()), ("split", pa.large_string())])
_TABLE_ROWS = pa.schema([*_LABELLED_FILES, TABLE_SNAPSHOT.field("row_group")])


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """What is listed, and how a pool is split."""

    source: str
    """Folder or s3:// prefix of images, tars or Parquet tables."""
    snapshot: str = "1"
    """Name of the listing. A new name lists a changed source again."""
    test_share: float
    """Share of the images held out as `test` if the source has no splits, in [0, 1)."""
    seed: int
    """Key of the hash that selects them."""
    labels: str | None = field(default=None, metadata=ADDED_LATER)
    """File with labels and splits of a folder of images (`sources/labels.py`); None: folders are the labels."""
    image_column: str = field(default="image", metadata=ADDED_LATER)
    """Tables only: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = field(default="label", metadata=ADDED_LATER)
    """Tables only: whole numbers or text; None: no labels."""
    split_column: str | None = field(default=None, metadata=ADDED_LATER)
    """Tables only: train, val or test."""
    split_from: SplitFrom | None = field(default=None, metadata=ADDED_LATER)
    """What decides the split; None: a column if there is one, else the names of folders and files, else the keyed hash."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_share < 1.0:
            raise ConfigError(f"test_share={self.test_share} is not in [0, 1): write 0.1 for 10 %")


def snapshot(config: SnapshotConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """List the source. `inputs`: earlier parts of the dataset, if any."""
    recorded = config.source
    config = where_it_is(config, attempt.options)
    # before the labels are read: if the file changes in between, the next run says so
    labels_sha256 = file_sha256(config.labels) if config.labels else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        earlier = EarlierListing([listed_files(part, folder / name) for name, part in sorted(inputs.items())])
        facts, listing = _take(config, earlier, folder, attempt.progress)
        files: tuple[str, ...] = (SNAPSHOT_FILE,)
        if facts.kind == "Parquet tables":
            attempt.store.upload(FILES_FILE, listing)
            files = (*files, FILES_FILE)
        attempt.store.upload(SNAPSHOT_FILE, folder / SNAPSHOT_FILE)
    facts = replace(facts, source=recorded, labels_sha256=labels_sha256)
    if inputs:
        counts = earlier.counts()
        facts = replace(facts, known=counts["known"], changed=counts["changed"], gone=counts["gone"])
    return StageResult(facts=facts.as_json(), files=files)


def where_it_is(config: SnapshotConfig, options: Mapping[str, Any]) -> SnapshotConfig:
    """Return the configuration with the addresses at which the files are now, given the step's options."""
    return replace(config, **options.get(MOVED, {}))


def preview(config: SnapshotConfig, progress: Progress, *, files: int) -> SnapshotFacts:
    """Return the facts of a listing of the first files of the source. Nothing is kept."""
    with tempfile.TemporaryDirectory() as scratch:
        return _take(config, EarlierListing([]), Path(scratch), progress, files=files)[0]


def check_layout(config: SnapshotConfig, *, files: int) -> None:
    """Raise DataError or ConfigError if the splits of a source of at most so many files cannot be read from its names.

    A larger source is not checked: it is listed once only."""
    items = list(islice(list_source(config.source, besides=config.labels), files + 1))
    found = [item for item in items if item.role != "ignored"]
    if (
        len(items) > files
        or config.labels is not None
        or config.split_from == "column"
        or config.split_column is not None
    ):
        return
    paths = [item.path for item in found]
    if found[0].role == "image":
        find_layout(FolderEvidence().add_all(paths), config.split_from)
    else:
        named_splits(paths, config.split_from)


class EarlierListing:
    """What earlier parts list: asked about every file of a listing, in path order."""

    def __init__(self, parts: Sequence[Path]) -> None:
        """`parts`: their tables (`listed_files`)."""
        self._entries = heapq.merge(*map(_entries, parts))  # streams: no part is held in memory
        self._head = next(self._entries, None)
        self.known = self.changed = self.gone = 0

    def is_new(self, path: str, size: int) -> bool:
        """Return whether no part lists the file with this size."""
        self._skip_to(path)
        sizes = set()
        while self._head is not None and self._head[0] == path:
            sizes.add(self._head[1])
            self._head = next(self._entries, None)
        self.known += size in sizes
        self.changed += bool(sizes) and size not in sizes
        return size not in sizes

    def counts(self) -> dict[str, int]:
        """Return how many files were listed before, with another size, and no longer exist. Call it after the last file."""
        self._skip_to(None)
        return {"known": self.known, "changed": self.changed, "gone": self.gone}

    def _skip_to(self, path: str | None) -> None:
        """Advance to `path`, or to the end. The source no longer holds the files in between."""
        while self._head is not None and (path is None or self._head[0] < path):
            skipped = self._head[0]
            self.gone += 1
            while self._head is not None and self._head[0] == skipped:
                self._head = next(self._entries, None)


def has_new_files(source: str, labels: str | None, parts: Sequence[StageInput]) -> bool:
    """Return whether the source holds a file that no part lists. It is read only up to the first such file."""
    with tempfile.TemporaryDirectory() as scratch:
        earlier = EarlierListing([listed_files(part, Path(scratch) / str(n)) for n, part in enumerate(parts)])
        items = (item for item in list_source(source, besides=labels) if item.role != "ignored")
        return any(earlier.is_new(item.path, item.size) for item in items)


@dataclass(frozen=True)
class _Listing:
    """The new files of the source, in a scratch file, and what was found on the way."""

    path: Path
    kind: SourceKind
    passed_over: PassedOver
    folders: FolderEvidence
    """Of all images, new or not, so that all parts agree on the layout."""
    labels: Labels | None
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


class _Batch(TypedDict):
    """Columns of a batch of a scratch file."""

    path: list[str]
    size: list[int]
    label: NotRequired[list[str | None]]
    split: NotRequired[list[str | None]]
    row_group: NotRequired[list[int]]


_Resolver = Callable[[_Batch], tuple[list[str | None], list[str]]]
"""Returns label names and splits of a batch."""


def reread(config: SnapshotConfig, parts: Sequence[StageInput]) -> tuple[str, str]:
    """Compare the last of the parts, which an older version listed, with how this version reads the same paths.

    Returns both readings in words; the second is empty if they agree. Labels of a labels file and columns of tables are not
    compared: reading those has not changed."""
    facts = SnapshotFacts.read(parts[-1].facts)
    if config.labels is not None or (facts.kind == "Parquet tables" and config.split_column is not None):
        return "", ""
    with tempfile.TemporaryDirectory() as scratch:
        tables = [
            local_copy(part.store, SNAPSHOT_FILE, Path(scratch) / str(number)) for number, part in enumerate(parts)
        ]
        paths = (path for table in tables for path in _paths_of(table))
        then, now = SplitTally(), SplitTally()
        names: dict[str | None, int] = {}
        same, pairs = True, set[tuple[int, int]]()
        try:
            read = _reader(config, facts.kind, paths)
            for batch in _read_batches(tables[-1]):
                old: dict[str, Any] = dict(batch)  # of a written snapshot, where labels are numbers
                labels, splits = read(batch)
                numbers = [NO_LABEL if name is None else names.setdefault(name, len(names)) for name in labels]
                then.add(old["split"], old["label"])
                now.add(splits, numbers)
                same = same and splits == old["split"]
                pairs.update(zip(old["label"], numbers, strict=True))
        except DataError as error:
            return _in_words(facts.splits, facts.classes), f"a layout that it refuses: {error}"
    # a class may have another name (`label=cat` is now `cat`), but no class may be cut or merged
    one_to_one = len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
    if same and (one_to_one or facts.kind != "images"):
        return "", ""
    return _in_words(facts.splits, facts.classes), _in_words(now.counts, sorted(name for name in names if name))


def _reader(config: SnapshotConfig, kind: SourceKind, paths: Iterable[str]) -> _Resolver:
    """Return how this version reads rows of a listing of these paths. For tars and tables only splits are read."""
    if kind == "images":
        layout = find_layout(FolderEvidence().add_all(paths), config.split_from)

        def by_folders(batch: _Batch) -> tuple[list[str | None], list[str]]:
            found = [split_and_label(p, layout, test_share=config.test_share, seed=config.seed) for p in batch["path"]]
            return [label for _, label in found], [split for split, _ in found]

        return by_folders
    files = list(dict.fromkeys(_file_of(path, kind) for path in paths))
    named = named_splits(files, config.split_from)
    split_of = dict(zip(files, named, strict=True)) if named else {}

    def by_files(batch: _Batch) -> tuple[list[str | None], list[str]]:
        given: Any = batch["split"]  # of a pool, whose draw has not changed
        splits = [split_of.get(_file_of(p, kind), s) for p, s in zip(batch["path"], given, strict=True)]
        return [None] * len(given), splits

    return by_files


def _file_of(path: str, kind: SourceKind) -> str:
    return split_row_name(path)[0] if kind == "Parquet tables" else path


def _paths_of(table: Path) -> Iterator[str]:
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=["path"]):
            yield from batch.column(0).to_pylist()


def _in_words(splits: Mapping[str, int], classes: Sequence[str]) -> str:
    counts = ", ".join(f"{split} {images}" for split, images in splits.items())
    shown = ", ".join(classes[:6]) + (f" and {len(classes) - 6} more" if len(classes) > 6 else "")
    return f"{counts}; {f'classes {shown}' if classes else 'no classes in the listing'}"


def _take(
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
    )
    return facts, listing.path


def _list(
    config: SnapshotConfig, earlier: EarlierListing, path: Path, progress: Progress, *, files: int | None
) -> _Listing:
    """List the source in one pass, or its first `files` files."""
    labels = Labels(config.labels) if config.labels else None
    folders, passed_over = FolderEvidence(), PassedOver()
    role: Role = "ignored"
    seen = without_split = 0
    schema = _LABELLED_FILES if labels else _FILES
    with pq.ParquetWriter(path, schema) as writer:
        for batch in _batches(islice(list_source(config.source, besides=config.labels), files), _BATCH_ROWS):
            items = [item for item in batch if item.role != "ignored"]
            passed_over.add_all(item.path for item in batch if item.role == "ignored")
            seen += len(items)
            progress.update(seen, seen, unit="files listed")
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
            new = [index for index, item in enumerate(items) if earlier.is_new(item.path, item.size)]
            columns: _Batch = {
                "path": [items[index].path for index in new],
                "size": [items[index].size for index in new],
            }
            if match:
                columns["label"] = [match.labels[index] for index in new]
                columns["split"] = [match.splits[index] for index in new]
            writer.write_table(pa.table(columns, schema=schema))
    if role == "ignored":
        raise DataError(f"{config.source}: none of its first {files} files is an image, a tar or a table")
    if labels and files is None:
        labels.check_all_known(config.source)
    return _Listing(path, KINDS[role], passed_over, folders, labels, without_split, files or math.inf)


def _resolve_images(config: SnapshotConfig, listing: _Listing, folder: Path) -> _Listed:
    """Take labels and splits from the labels file, the folders and the keyed hash, in this order."""
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

    def resolve(batch: _Batch) -> tuple[list[str | None], list[str]]:
        by_name = [
            split_and_label(path, layout, test_share=config.test_share, seed=config.seed) for path in batch["path"]
        ]
        names = batch.get("label", [name for _, name in by_name])
        splits = [split for split, _ in by_name]
        if given:
            splits = [named or split for named, split in zip(batch["split"], splits, strict=True)]
        return names, splits

    listed = _write(folder / SNAPSHOT_FILE, _read_batches(listing.path), resolve, classes, SNAPSHOT)
    notes = () if labels else listing.passed_over.emptied(listing.folders.names, layout.label_depth)
    # the fact is about labels files and tables that leave images out, not about images outside class folders
    return listed._replace(unlabelled=listed.unlabelled if labels else None, origin=layout.origin, notes=notes)


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

    def resolve(batch: _Batch) -> tuple[list[str | None], list[str]]:
        return [None] * len(batch["path"]), [split_of[path] for path in batch["path"]]

    listed = _write(folder / SNAPSHOT_FILE, _read_batches(listing.path), resolve, (), SNAPSHOT)
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
            for rows in list_rows(config.source, file["path"], file["size"], columns, batch_rows=_BATCH_ROWS):
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

    def resolve(batch: _Batch) -> tuple[list[str | None], list[str]]:
        resolved = [
            given or pool_split(path, test_share=config.test_share, seed=config.seed)
            for given, path in zip(batch["split"], batch["path"], strict=True)
        ]
        return batch["label"], resolved

    listed = _write(folder / SNAPSHOT_FILE, _read_batches(scratch), resolve, class_order(names), TABLE_SNAPSHOT)
    return listed._replace(origin="column" if by_column else "names" if splits else "hash")


def _write(
    path: Path, batches: Iterable[_Batch], resolve: _Resolver, classes: tuple[str, ...], schema: pa.Schema
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


def _read_batches(path: Path) -> Iterator[_Batch]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            yield batch.to_pydict()


def listed_files(part: StageInput, scratch: Path) -> Path:
    """Return the table, with columns path and size in path order, of the files that a part lists. `scratch`: for a download."""
    name = FILES_FILE if SnapshotFacts.read(part.facts).kind == "Parquet tables" else SNAPSHOT_FILE
    return local_copy(part.store, name, scratch)


def _entries(table_path: Path) -> Iterator[tuple[str, int]]:
    """Yield (path, size) of the files that a part lists, in path order."""
    with pq.ParquetFile(table_path) as table:
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=["path", "size"]):
            yield from zip(batch.column("path").to_pylist(), batch.column("size").to_pylist(), strict=True)


def _batches(items: Iterator[SourceItem], size: int) -> Iterator[list[SourceItem]]:
    while batch := list(islice(items, size)):
        yield batch
