"""The interface of an object store, and its errors.

Keys: non-empty parts joined by `/`, none of them `.` or `..`. Listings come in key order. Sizes in bytes.
A store is a small value: threads may share it, it pickles cheaply, and a worker can reopen it from its `uri`.
Readers only ever see whole objects. In a folder, files appear by rename (`write`, `upload`) or hard link (`create`).
Errors: StorageError, or its subclasses MissingObject and DeniedObject when one object is at fault rather than the store.
After an error a write may or may not have happened: the object is either complete or unchanged."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.errors import StorageError

TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files, which are never listed."""


class MissingObject(StorageError):
    """There is no object under this key."""


class DeniedObject(StorageError):
    """The store is reachable but denies us access to this object."""


class ObjectInfo(NamedTuple):
    """One entry of a listing."""

    key: str
    size: int


class Traffic(NamedTuple):
    """This process's traffic with all buckets since it started; take the difference of two readings."""

    requests: int
    """HTTP requests sent, retries included."""
    bytes_received: int
    """Bytes of object data received."""
    retries: int
    """Requests repeated because the previous answer was lost, cut short, or a refusal under load."""


class Store(Protocol):
    """An object store, as the pipeline uses one."""

    @property
    def uri(self) -> str:
        """The address from which `open_store` reopens this store."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Network traffic so far; all zeros for a folder."""
        ...

    def read(self, key: str) -> bytes:
        """Return the whole object; raise MissingObject if there is none."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return exactly `length` bytes from `start`; raise StorageError if the object ends sooner."""
        ...

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write the object atomically, replacing any earlier one. Large data is not copied in memory."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put if absent: return True if this very call created the object, False (and change nothing) if the key existed."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is an object under this key."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose key begins with `prefix` (plain text, not a folder), in key order."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object; do nothing if there is none."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a local file, atomically."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Fetch the object into a local file, which appears by rename once it is complete."""
        ...

    def at(self, prefix: str) -> "Store":
        """Return the store rooted at a folder of this one, one or more levels down."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the object's path on this machine, or None if the store is remote."""
        ...


def checked_key(location: str, key: str) -> str:
    """Return the key if it is valid; otherwise raise StorageError, with the store's address `location` in the message."""
    # stricter than S3, so that every key is a path as well and cannot leave the store's folder
    if "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise StorageError(
            f"{location}: {key!r} is not a valid key: write names joined by single slashes, without '.', '..' or a leading '/'"
        )
    return key


def checked_length(location: str, key: str, start: int, length: int, data: bytes) -> bytes:
    """Return the data of a range if all of it has arrived; otherwise raise StorageError."""
    if len(data) != length:
        raise StorageError(
            f"{location}: {key} ends early: it has {len(data)} of the {length} bytes expected from byte {start}. "
            "It is truncated: delete it and rerun the step that writes it"
        )
    return data


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the file's own folder, so that a rename is atomic; delete it afterwards in any case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: several processes may write one key at once
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
