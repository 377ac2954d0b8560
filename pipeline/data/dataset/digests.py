"""SHA-256 digests of values rather than of files: of a table's columns, and of plain JSON values.

A digest of values survives another Parquet encoder, another compression level or another number of row groups."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class ContentHash:
    """A hash of a table's values, fed in any number of pieces. How Arrow holds the values has no influence."""

    def __init__(self, columns: Sequence[str]) -> None:
        # one hash per column: then it does not matter into how many pieces the rows are divided
        self._hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}

    def update(self, table: pa.Table) -> None:
        """Add a table's rows after those already hashed."""
        for name, (values, lengths) in self._hashes.items():
            column = table.column(name)
            if pa.types.is_string(column.type):
                texts = [text.encode() for text in column.to_pylist()]
                values.update(b"".join(texts))
                # without the lengths, ["ab", "c"] and ["a", "bc"] would hash alike
                lengths.update(np.fromiter(map(len, texts), "<i8", len(texts)).tobytes())
            else:
                numbers = column.to_numpy()
                # little-endian on every machine: the digest is an identity
                values.update(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())

    def hexdigest(self) -> str:
        """Return 64 hex digits."""
        parts = {name: [values.hexdigest(), lengths.hexdigest()] for name, (values, lengths) in self._hashes.items()}
        return json_digest(parts)


def content_digest(table: pa.Table, columns: Sequence[str]) -> str:
    """Return the digest of some columns of a table."""
    content = ContentHash(columns)
    content.update(table)
    return content.hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of plain JSON values in their one canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
