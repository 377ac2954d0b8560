"""From an address to a store that a run may rely on.

Addresses: `file:///abs/folder`, a plain folder path, `s3://bucket/prefix`. Put-if-absent (`create`) is the one condition asked of a
store; `probe` proves it before a run starts. Errors: ConfigError for an address that is none of the three; StorageError for a store
that is no place for a run."""

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError, StorageError
from pipeline.storage.folder import FileStore
from pipeline.storage.s3 import S3Store
from pipeline.storage.store import Store, checked

_PROBE_CREATES = 8
_WHY_CREATE = "so two drivers could claim one generation. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2)"


def open_store(uri: str) -> Store:
    """The store at an address; nothing is touched yet."""
    scheme, separator, rest = uri.partition("://")
    if uri and not separator:
        return FileStore(Path(uri).expanduser().absolute())
    if scheme == "file" and rest.startswith("/"):
        return FileStore(Path(unquote(urlsplit(uri).path)))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if bucket:
            return S3Store(bucket, checked(uri, prefix) if prefix else "")
    raise ConfigError(
        f"store address {uri!r} is not usable: write file:///absolute/folder, a folder path, or s3://bucket/prefix"
    )


def probe(store: Store) -> None:
    """Writes, creates twice and at once, reads and deletes under `.probe/`; StorageError if the store is no place for a run."""
    key, data = f".probe/{uuid.uuid4().hex}", b"mae"
    try:
        store.write(key, data)
        if store.create(key, b"twice"):
            raise StorageError(
                f"{store.uri}: create of {key} replaced an object that existed: this store ignores `If-None-Match: *`, "
                f"{_WHY_CREATE}"
            )
        if store.read(key) != data:
            raise StorageError(f"{store.uri}: {key} reads back other bytes than were written. Use another store")
        store.delete(key)
        if not store.create(key, data):
            raise StorageError(
                f"{store.uri}: create of {key} says it exists right after its deletion. Use a consistent store"
            )
        store.delete(key)
        with ThreadPoolExecutor(_PROBE_CREATES) as pool:
            together = threading.Barrier(_PROBE_CREATES)
            won = sum(pool.map(lambda number: _create_together(store, key, number, together), range(_PROBE_CREATES)))
        if won != 1:
            raise StorageError(
                f"{store.uri}: {won} of {_PROBE_CREATES} simultaneous creates of {key} succeeded: `If-None-Match: *` is not "
                f"atomic in this store, {_WHY_CREATE}"
            )
    finally:
        with contextlib.suppress(StorageError):
            store.delete(key)


def _create_together(store: Store, key: str, number: int, together: threading.Barrier) -> bool:
    together.wait()
    return store.create(key, b"%d" % number)
