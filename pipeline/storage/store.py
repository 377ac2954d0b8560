"""What the pipeline asks of an object store, and what goes wrong with one.

Keys: text with `/` between non-empty parts, none of them `.` or `..`; listings come in the order of the keys. Sizes in bytes.
A store is a small value: threads may share it, pickling is cheap, and a worker reopens it from `uri`.
What a reader sees is whole: files appear by rename (`write`, `upload`) or hard link (`create`), never half written.
Errors: StorageError, with MissingObject and DeniedObject where one object rather than the store is the trouble. After an error
nobody knows whether a write came through: the object is there whole, or as it was."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.errors import StorageError

TEMPORARY = ".tmp-"
"""Names that begin so are unfinished files; they are never listed."""


class MissingObject(StorageError):
    """There is no object under this key."""


class DeniedObject(StorageError):
    """The store answers, and refuses this object to us."""


class ObjectInfo(NamedTuple):
    """One line of a listing."""

    key: str
    size: int


class Traffic(NamedTuple):
    """What this process has exchanged with buckets since it began, over all of them: take the difference of two."""

    requests: int
    """HTTP requests sent, repeated ones included."""
    bytes_received: int
    """Bytes of objects that arrived."""
    retries: int
    """Requests that repeated one whose answer failed, was refused for load, or broke off."""


class Store(Protocol):
    """What the pipeline asks of an object store."""

    @property
    def uri(self) -> str:
        """The address that `open_store` makes this store from again."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What went over the network so far; zeros for a folder."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object; MissingObject when there is none."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; StorageError when the object ends before."""
        ...

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Puts the object, replacing what was there, at once. Large data is not held a second time."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent: True if this very call made the object; False, and nothing changed, if the key existed."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object under this key."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` (text, not a folder), in key order."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; absent is fine."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Puts a local file; visible whole or not at all."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Fetches into a local file, written beside and renamed."""
        ...

    def at(self, prefix: str) -> "Store":
        """The store one or more folders further down."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a file of this machine; None when the store is remote."""
        ...


def checked(location: str, key: str) -> str:
    """The key, if it is one; `location`: the store's address, for the message."""
    if "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise StorageError(
            f"{location}: {key!r} is no key: write names joined by single slashes, without '.', '..' or a leading '/'"
        )
    return key


def whole(location: str, key: str, start: int, length: int, data: bytes) -> bytes:
    """The data, if all of a range has come."""
    if len(data) != length:
        raise StorageError(
            f"{location}: {key} ends early: {len(data)} of {length} bytes from {start}. It is cut off; write it anew"
        )
    return data


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the file's own folder, gone afterwards whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
