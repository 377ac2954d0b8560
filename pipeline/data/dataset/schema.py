"""Columns of the Parquet tables of a snapshot and of a dataset.

A row is a TypedDict whose fields carry their Arrow type, so each column is declared once: mypy checks the rows that
`to_pylist()` returns, and `schema_of` derives the schema that files are written with. mypy does not look into pyarrow, so
the table aliases at the end only tell the reader which columns to expect. No column is nullable.
Units: bytes; offsets count from the start of the tar to the first byte of the image."""

from typing import Annotated, TypeAlias, TypedDict, get_type_hints

import pyarrow as pa

NO_LABEL = -1

_Bool = Annotated[bool, pa.bool_()]
_Int32 = Annotated[int, pa.int32()]
_Int64 = Annotated[int, pa.int64()]
_UInt64 = Annotated[int, pa.uint64()]
_Text = Annotated[str, pa.string()]


class SnapshotRow(TypedDict):
    """One image that a snapshot lists or, if the source holds tars, one tar."""

    sample_id: _Int64  # row number in the snapshot
    path: _Text  # relative to the source
    size: _Int64
    label: _Int32  # index into the snapshot's classes, or NO_LABEL
    split: _Text


class TableSnapshotRow(SnapshotRow):
    """One row of a Parquet table that a snapshot lists: `path` is `<file>#<row>`, `size` the average of the row group."""

    row_group: _Int32


class SampleRow(TypedDict):
    """A row of samples.parquet: one stored image."""

    sample_id: _Int64  # row number in the snapshot; for indexed tars, counted across the tars
    shard: _Int32
    offset: _Int64
    length: _Int64
    crc32: _Int64  # zlib's, of the stored bytes
    sha256: _Text  # of the stored bytes, hex
    dhash64: _UInt64  # perceptual hash: near duplicates differ in few bits
    width: _Int32  # as stored
    height: _Int32
    original_width: _Int32
    original_height: _Int32
    label: _Int32  # index into the manifest's classes, or NO_LABEL
    key: _Text  # webdataset's __key__
    source: _Text  # path relative to the source
    split: _Text
    served: _Bool  # False for an exact duplicate of a sample that is served
    policy: _Text  # "kept", "indexed", or "reencoded:" and the reasons, as in "reencoded:exif,cmyk"


class ShardRow(TypedDict):
    """A row of shards.parquet: one shard that holds at least one sample."""

    shard: _Int32
    key: _Text  # relative to the manifest's root, or the address of a tar indexed in place
    bytes: _Int64
    samples: _Int32
    served: _Int32
    sha256: _Text
    split: _Text


class QuarantineRow(TypedDict):
    """A row of quarantine.parquet: one refused image."""

    source: _Text
    split: _Text
    label: _Int32
    reason: _Text  # a short class: unreadable, truncated, empty, too_many_pixels, ...
    detail: _Text
    bytes: _Int64


def schema_of(row: type) -> pa.Schema:
    """Return the Arrow schema of a row type, in the order in which its fields are declared."""
    hints = get_type_hints(row, include_extras=True)
    return pa.schema([pa.field(name, hint.__metadata__[0], nullable=False) for name, hint in hints.items()])


SNAPSHOT = schema_of(SnapshotRow)
TABLE_SNAPSHOT = schema_of(TableSnapshotRow)
SAMPLES = schema_of(SampleRow)
SHARDS = schema_of(ShardRow)
QUARANTINE = schema_of(QuarantineRow)

SnapshotTable: TypeAlias = pa.Table
SampleTable: TypeAlias = pa.Table
ShardTable: TypeAlias = pa.Table
QuarantineTable: TypeAlias = pa.Table
