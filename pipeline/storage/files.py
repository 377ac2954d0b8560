"""files: split from pipeline.data.dataset.manifest."""

import io
from pathlib import Path

from pipeline.storage import Store


class RangeFile(io.RawIOBase):
    """An object as a file that Parquet can seek in: a read is one ranged request."""

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
        data = self._store.read_range(self._key, self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def local_copy(store: Store, key: str, scratch: Path) -> Path:
    """An object as a file of this machine: where it lies, else downloaded to `scratch`."""
    local = store.local_path(key)
    if local is None:
        store.download(key, scratch)
    return local or scratch
