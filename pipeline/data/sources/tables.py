"""Parquet tables whose rows hold images: list the rows, and read the images of planned rows.

An image is a column of bytes, or Hugging Face's struct {bytes, path}. A row's name is `<file>#<row of the file>`.
Units: bytes. Memory: one batch of rows.
Errors: DataError for a file that is not a Parquet table or lacks a column; StorageError when a store is down."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Required, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.images.intake import Refused
from pipeline.data.sources.labels import TextColumn, label_texts, split_texts
from pipeline.errors import DataError
from pipeline.storage import Store, open_store
from pipeline.storage.files import RangeFile

_IMAGE_ROWS = 64
"""Rows decoded at a time: 6 MB of ImageNet's images."""
_BUFFER = 8 * 2**20


@dataclass(frozen=True)
class TableColumns:
    """Names of a table's columns."""

    image: str
    label: str | None
    split: str | None


class _ImageStruct(TypedDict, total=False):
    """Hugging Face's image value."""

    bytes: Required[bytes | None]
    path: str | None


def row_name(file: str, row: int) -> str:
    """Return the name of a table's row."""
    return f"{file}#{row}"


def split_row_name(name: str) -> tuple[str, int]:
    """Return file and row number of a row's name."""
    file, _, row = name.rpartition("#")
    return file, int(row)


def list_rows(source: str, file: str, size: int, columns: TableColumns, *, batch_rows: int) -> Iterator[pa.Table]:
    """Yield tables (path, size, label, split, row_group) of a file's rows, in order, without reading the images."""
    where = f"{open_store(source).uri}/{file}"
    with _opened(open_store(source), file, size) as table:
        schema = table.schema_arrow
        _check_image_column(schema, columns.image, where)
        # the default name may be missing; one that the user wrote may not
        label = _present(schema, columns.label, where, named="data.label_column", may_lack=columns.label == "label")
        split = _present(schema, columns.split, where, named="data.split_column", may_lack=False)
        wanted = [name for name in (label, split) if name]
        names = _class_names(schema, label) if label else ()
        first = 0
        for group in range(table.num_row_groups):
            share = _image_bytes(table.metadata.row_group(group), columns.image)
            for rows in _batches_of(table, group, wanted, batch_rows):
                count = rows.num_rows
                nothing = pa.nulls(count, pa.large_string())
                yield pa.table(
                    {
                        "path": pa.array([row_name(file, row) for row in range(first, first + count)], pa.string()),
                        "size": pa.array([share] * count, pa.int64()),
                        "label": _named(label_texts(rows.column(label), where), names, where) if label else nothing,
                        "split": split_texts(rows.column(split), where) if split else nothing,
                        "row_group": pa.array([group] * count, pa.int32()),
                    }
                )
                first += count


def read_images(source: str, rows: pa.Table, column: str) -> Iterator[tuple[str, bytes | Refused]]:
    """Yield (name, bytes) of planned rows (path, row_group), file by file and row group by row group, each read once."""
    store = open_store(source)
    wanted: dict[str, dict[int, set[int]]] = {}
    for name, group in zip(rows.column("path").to_pylist(), rows.column("row_group").to_pylist(), strict=True):
        file, row = split_row_name(name)
        wanted.setdefault(file, {}).setdefault(group, set()).add(row)
    for file, groups in sorted(wanted.items()):
        with _opened(store, file, None) as table:
            _check_image_column(table.schema_arrow, column, f"{store.uri}/{file}")
            starts = _row_starts(table)
            for group, numbers in sorted(groups.items()):
                if group >= table.num_row_groups or max(numbers) >= starts[group + 1]:
                    raise DataError(
                        f"{store.uri}/{file}: row {max(numbers)} of row group {group} no longer exists: the file has changed since "
                        "it was listed. Name a new data.snapshot"
                    )
                row = starts[group]
                for batch in table.iter_batches(batch_size=_IMAGE_ROWS, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        # pyarrow cannot start within a row group, so rows of other shards are read and passed over
                        if row in numbers:
                            yield row_name(file, row), _image_of(value.as_py())
                        row += 1


def _image_of(value: bytes | _ImageStruct | None) -> bytes | Refused:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        path = value.get("path") if isinstance(value, dict) else None
        return Refused(
            "missing", f"the row holds no bytes, only the path {path!r}" if path else "the row holds no image"
        )
    return data


@contextmanager
def _opened(store: Store, file: str, size: int | None) -> Iterator[pq.ParquetFile]:
    local = store.local_path(file)
    try:
        if local is None and size is None:
            # a listing gives the size without opening the file; the prefix may match longer names too
            size = next(info.size for info in store.list(file) if info.key == file)
        # buffered and not pre-buffered: a row group of images can be hundreds of megabytes
        table = pq.ParquetFile(local or RangeFile(store, file, size or 0), buffer_size=_BUFFER, pre_buffer=False)
        with table:
            yield table
    except (pa.ArrowException, FileNotFoundError, StopIteration, OSError) as error:
        raise DataError(
            f"{store.uri}/{file} cannot be read as a Parquet table ({error or 'it no longer exists'}). Replace or remove it, "
            "and name a new data.snapshot"
        ) from error


def _check_image_column(schema: pa.Schema, column: str, where: str) -> None:
    names = ", ".join(schema.names)
    if column not in schema.names:
        raise DataError(
            f"{where} has no column {column!r}, only {names}. Name the column that holds the images in data.image_column"
        )
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{where}: column {column!r} is {kind}, neither bytes nor a struct with bytes. Name the column that holds "
            f"the images in data.image_column; there are {names}"
        )


def _present(schema: pa.Schema, column: str | None, where: str, *, named: str, may_lack: bool) -> str | None:
    if column is None or column in schema.names:
        return column
    if may_lack:
        return None
    raise DataError(f"{where} has no column {column!r} ({named}), only {', '.join(schema.names)}")


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the names of Hugging Face's ClassLabel, by which whole numbers in the column stand for classes; else nothing."""
    if not pa.types.is_integer(schema.field(column).type):
        return ()
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    # names that are empty or not distinct would merge classes, so the numbers stay
    distinct = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
    names = tuple(name.strip() for name in names) if distinct else ()
    return names if len(set(names)) == len(names) else ()


def _named(labels: TextColumn, names: Sequence[str], where: str) -> TextColumn:
    """Replace numbers by the names of their classes, if there are names."""
    if not names:
        return labels
    strange = [text for text in pc.unique(labels).drop_null().to_pylist() if int(text) >= len(names)]
    if strange:
        raise DataError(
            f"{where}: label {strange[0]} has no name; its features name {len(names)} classes, 0 to {len(names) - 1}. Repair "
            "the labels or the table's metadata, or set data.label_column to another column"
        )
    return pa.array(names, pa.large_string()).take(labels.cast(pa.int64()))


def _batches_of(table: pq.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[pa.Table]:
    """Yield batches of some columns. Without columns only the number of rows counts, and nothing is read."""
    if columns:
        yield from table.iter_batches(batch_size=rows, row_groups=[group], columns=columns)
        return
    left = table.metadata.row_group(group).num_rows
    while left > 0:
        yield pa.table({"none": pa.nulls(min(left, rows))})
        left -= rows


def _row_starts(table: pq.ParquetFile) -> list[int]:
    starts = [0]
    for group in range(table.num_row_groups):
        starts.append(starts[-1] + table.metadata.row_group(group).num_rows)
    return starts


def _image_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Return the average stored size of the group's images, from the footer alone."""
    chunks = (group.column(index) for index in range(group.num_columns))
    # a struct column has one chunk per field, all of whose paths begin with the column's name
    total = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    return int(-(-total // max(1, group.num_rows)))
