"""Adapters for libraries that want files: an object as a seekable file, memory as a file, an object on the local disk.

Sizes and offsets in bytes. Errors: StorageError from the store."""

import hashlib
import io
from pathlib import Path
from typing import Any

from pipeline.storage.store import Store


class RangeFile(io.RawIOBase):
    """An object as a seekable file, for Parquet: each read is one ranged request."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def tell(self) -> int:
        """See io.RawIOBase."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """See io.RawIOBase."""
        left = max(0, self._size - self._at)
        # no more than there is: at the end of a file a read returns less, where read_range would raise
        data = self._store.read_range(self._key, self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


class MemoryFile(io.RawIOBase):
    """A read-only file over memory that must not change meanwhile.

    boto3 uploads from files, and `io.BytesIO` would hold a second copy of the data."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def seekable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, target: Any) -> int:
        """See io.RawIOBase."""
        room = memoryview(target)
        # copied straight into the caller's buffer: reading makes no copy of its own
        part = self._data[self._at : self._at + len(room)]
        room[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io.RawIOBase."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at


def local_copy(store: Store, key: str, scratch: Path) -> Path:
    """Return the path of an object on this machine: its own if the store is local, otherwise `scratch`, once downloaded."""
    local = store.local_path(key)
    if local is None:
        store.download(key, scratch)
    return local or scratch


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
