"""Open a store by its address, and check that a run can rely on it.

Addresses: `file:///abs/folder`, a plain folder path, `s3://bucket/prefix`. A run needs put-if-absent (`create`) to be
atomic, which not every store offers; `probe` tries it before a run starts.
Errors: ConfigError for any other address; StorageError for a store that is unfit for a run."""

import contextlib
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError, StorageError
from pipeline.storage.folder import FileStore
from pipeline.storage.s3 import S3Store
from pipeline.storage.store import Store, checked_key

_PROBE_CREATES = 8
_PROBE_START_S = 60.0
_WHY_ATOMIC = (
    "so two drivers could claim the same generation. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2)"
)


def open_store(uri: str) -> Store:
    """Return the store at an address, without touching it."""
    scheme, separator, rest = uri.partition("://")
    if uri and not separator:
        return FileStore(Path(uri).expanduser().absolute())
    if scheme == "file" and rest.startswith("/"):
        return FileStore(Path(unquote(urlsplit(uri).path)))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if bucket:
            return S3Store(bucket, checked_key(uri, prefix) if prefix else "")
    raise ConfigError(
        f"store address {uri!r} is not usable: write file:///absolute/folder, a folder path, or s3://bucket/prefix"
    )


def probe(store: Store) -> None:
    """Check a store by writing, reading, deleting and creating one object under `.probe/`; raise StorageError if it is unfit.

    The last check creates the same key from eight threads at once: exactly one of them may succeed. It is a race,
    so one probe can miss a store whose create is not atomic."""
    key, data = f".probe/{uuid.uuid4().hex}", b"mae"
    try:
        store.write(key, data)
        if store.create(key, b"twice"):
            raise StorageError(
                f"{store.uri}: create of {key} replaced an existing object: this store ignores `If-None-Match: *`, "
                f"{_WHY_ATOMIC}"
            )
        if store.read(key) != data:
            raise StorageError(f"{store.uri}: {key} does not read back as it was written. Use another store")
        store.delete(key)
        if not store.create(key, data):
            raise StorageError(
                f"{store.uri}: create of {key} reports that it exists right after it was deleted. Use a strongly consistent store"
            )
        store.delete(key)
        with ThreadPoolExecutor(_PROBE_CREATES) as pool:
            # the timeout frees the threads that wait when another one cannot be started
            barrier = threading.Barrier(_PROBE_CREATES, timeout=_PROBE_START_S)
            won = sum(pool.map(lambda number: _create_together(store, key, number, barrier), range(_PROBE_CREATES)))
        if won != 1:
            raise StorageError(
                f"{store.uri}: {won} of {_PROBE_CREATES} simultaneous creates of {key} succeeded: `If-None-Match: *` is not "
                f"atomic in this store, {_WHY_ATOMIC}"
            )
    finally:
        with contextlib.suppress(StorageError):
            store.delete(key)


def _create_together(store: Store, key: str, number: int, barrier: threading.Barrier) -> bool:
    barrier.wait()
    return store.create(key, b"%d" % number)
