"""Labels and splits from a labels file: CSV, JSON lines or Parquet with columns path, label and, optionally, split.

`path` is relative to the source, as in the listing; `label` is text or a whole number; an empty label or split, or a
negative number, means that the image has none. The file is held in memory, sorted by path (about 150 bytes per row), and
matched with the listing batch by batch.
Errors: DataError for a file that cannot be read, lacks a column, names a path twice, or has an unknown split or paths
that are not in the source."""

import hashlib
import io
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.data.sources.listing import file_address
from pipeline.data.sources.splits import class_order
from pipeline.data.sources.words import split_named
from pipeline.errors import DataError
from pipeline.storage import open_store

CLASSES_MAX = 100_000
"""More distinct labels than this are captions or ids, not classes."""
TextColumn: TypeAlias = pa.Array
"""An Arrow array or chunked array of strings."""
_TEXT = pa.large_string()  # `string` holds at most 2 GiB of text per array
_SHOWN = 3


class LabelMatch(NamedTuple):
    """Labels and splits of some images; None where the file has none."""

    labels: list[str | None]
    splits: list[str | None]


class Labels:
    """The file's rows, matched with a listing in path order."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._table = _checked(uri, _read(uri))
        self._paths = self._table.column("path").combine_chunks()
        self._next = 0
        self._unknown: list[str] = []
        self._unknown_count = 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Every label of the file, in the order of their label numbers."""
        return class_order(pc.unique(self._table.column("label")).drop_null().to_pylist())

    def match(self, paths: Sequence[str]) -> LabelMatch:
        """Return labels and splits of the next images of the listing."""
        # both sides are in path order, so the rows of this batch end where its last path would be inserted
        end = bisect_right(range(len(self._paths)), paths[-1], lo=self._next, key=lambda row: self._paths[row].as_py())
        rows = self._table.slice(self._next, end - self._next)
        self._next = end
        listed = pa.array(paths, _TEXT)
        self._note_unknown(rows.filter(pc.invert(pc.is_in(rows.column("path"), value_set=listed))))
        # index_in is null where the file has no row, and take makes nulls of these
        found = rows.take(pc.index_in(listed, value_set=rows.column("path")))
        return LabelMatch(found.column("label").to_pylist(), found.column("split").to_pylist())

    def check_all_known(self, source: str) -> None:
        """Raise DataError if the file names images that the source does not hold. Call it after the last image."""
        self._note_unknown(self._table.slice(self._next))
        if self._unknown_count:
            raise DataError(
                f"data.labels={self.uri!r}: {self._unknown_count} of its {len(self._paths)} paths are not images of {source}: "
                f"{', '.join(self._unknown)}. Write them relative to data.source, as in `folder/name.jpg`, or remove these rows"
            )

    def _note_unknown(self, rows: pa.Table) -> None:
        self._unknown_count += rows.num_rows
        self._unknown += rows.column("path").slice(0, _SHOWN - len(self._unknown)).to_pylist()


def sha256_of_labels(uri: str) -> str:
    """Return the SHA-256 of a labels file, 64 hex digits."""
    folder, _, name = uri.rpartition("/")
    return hashlib.sha256(open_store(folder or "/").read(name)).hexdigest()


def label_texts(column: pa.Array, where: str) -> TextColumn:
    """Return labels as text without blanks around them, as `.cls` of tars; empty ones and negative numbers become null."""
    # categories, as pandas writes them
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    if not (pa.types.is_integer(kind) or any(is_text(kind) for is_text in texts)):
        raise DataError(f"{where}: the labels are of type {kind}. Write whole numbers or text")
    labels = pc.utf8_trim_whitespace(column.cast(_TEXT))
    return pc.if_else(pc.match_substring_regex(labels, r"^(-[0-9]+)?$"), pa.scalar(None, _TEXT), labels)


def split_texts(column: pa.Array, where: str) -> TextColumn:
    """Return splits as `train`, `val` or `test`; empty ones become null."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        texts = column.cast(_TEXT)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: the splits are of type {column.type}. Write train, val or test") from error
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, _TEXT), texts)
    # each distinct text is parsed once, not each row
    names = pc.unique(texts).drop_null().to_pylist()
    if strange := sorted(name for name in names if split_named(name) is None):
        raise DataError(f"{where}: split {strange[0]!r} is unknown. Write train, val or test, or leave it empty")
    values = pa.array([split_named(name) for name in names], _TEXT)
    return values.take(pc.index_in(texts, value_set=pa.array(names, _TEXT))) if names else texts


def _read(uri: str) -> pa.Table:
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or "/")
    suffix = name.rpartition(".")[2].lower()
    if suffix not in {"csv", "jsonl", "ndjson", "json", "parquet"}:
        raise DataError(
            f"data.labels={uri!r} is not a table. Give a .csv, .jsonl or .parquet file with the columns path, label[, split]"
        )
    data = io.BytesIO(store.read(name))
    try:
        if suffix == "csv":
            # as text: read as a number, the label 007 would become 7
            texts = dict.fromkeys(("path", "label", "split"), _TEXT)
            # only an empty cell is null: a class may be called NA
            options = pyarrow.csv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
            return pyarrow.csv.read_csv(data, convert_options=options)
        if suffix == "parquet":
            return pq.read_table(data)
        return pyarrow.json.read_json(data)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file_address(uri)} (data.labels) cannot be read as {suffix}: {error}. Repair or rename it"
        ) from error


def _checked(uri: str, table: pa.Table) -> pa.Table:
    """Return the columns path, label and split as text, in path order."""
    where = f"{file_address(uri)} (data.labels)"
    for name in ("path", "label"):
        if name not in table.column_names:
            raise DataError(
                f"{where} has no column {name!r}, only {', '.join(table.column_names)}. Rename the column that holds it"
            )
    paths = table.column("path").cast(_TEXT)
    splits = split_texts(table.column("split"), where) if "split" in table.column_names else None
    columns = {
        "path": paths,
        "label": label_texts(table.column("label"), where),
        "split": pa.nulls(table.num_rows, _TEXT) if splits is None else splits,
    }
    rows = pa.table(columns).sort_by("path").combine_chunks()
    names = rows.column("path")
    if names.null_count:
        raise DataError(f"{where}: {names.null_count} rows have no path. Fill or remove them")
    twice = pc.index(pc.equal(names.slice(1), names.slice(0, max(0, len(names) - 1))), True).as_py()
    if twice >= 0:
        raise DataError(f"{where} names {names[twice].as_py()!r} twice. Keep one row per image")
    classes = pc.count_distinct(rows.column("label")).as_py()
    if classes > CLASSES_MAX:
        raise DataError(
            f"{where}: {classes} distinct labels are too many to be classes. Write the class into the column label"
        )
    return rows
