"""Memory as a file to read from: boto3's transfers take files, and `io.BytesIO` would hold the data a second time.

Units: bytes. Errors: none of its own."""

import io
import os
from typing import Any


class MemoryFile(io.RawIOBase):
    """Reads a piece of memory that stays as it is meanwhile."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def readable(self) -> bool:
        """See io."""
        return True

    def seekable(self) -> bool:
        """See io."""
        return True

    def readinto(self, target: Any) -> int:
        """See io."""
        room = memoryview(target)
        part = self._data[self._at : self._at + len(room)]
        room[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        self._at = base + offset
        return self._at
