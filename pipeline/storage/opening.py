"""Open a store by its address, and check that a run can rely on it.

Addresses: `file:///abs/folder`, a plain folder path, `s3://bucket/prefix`. A run needs put-if-absent (`create`) to be
atomic, which not every store offers; `probe` tries it before a run starts.
Errors: ConfigError for any other address; WrongStoreAddress for a folder that cannot be written; StorageError for a store that is
unfit for a run."""

import contextlib
import errno
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import ConfigError, StorageError, WrongStoreAddress
from pipeline.storage.folder import FileStore
from pipeline.storage.store import Store, checked_key

_PROBE_CREATES = 8
_PROBE_START_S = 60.0
_WHY_ATOMIC = (
    "so two drivers could claim the same generation. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2)"
)


_BUCKET = r"[a-zA-Z0-9.\-_]{1,255}"
"""What botocore accepts; AWS itself is stricter, other stores are not."""
_WRONG_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
}


def open_store(uri: str) -> Store:
    """Return the store at an address, without touching it."""
    scheme, separator, rest = uri.partition("://")
    problem = ""
    # checked first: a line break from a config would make other messages unreadable
    if re.search(r"[\x00-\x1f\x7f]", uri):
        problem = "it holds a control character, such as a line break; "
    elif uri and not separator:
        try:
            return FileStore(Path(uri).expanduser().absolute())
        except RuntimeError as cause:  # `~name` of nobody
            problem = f"{cause}; "
    elif scheme == "file" and rest.startswith("/"):
        if not re.search("[?#]", rest):
            # as_uri() quotes, so this has to undo it
            return FileStore(Path(unquote(rest)))
        problem = "in a file:// address, ? and # end the path: write %3F and %23, or the plain path; "
    elif scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        prefix = prefix.strip("/")
        if re.fullmatch(_BUCKET, bucket):
            from pipeline.storage.s3 import S3Store  # boto3 takes time to import, and a run on folders does without it

            return S3Store(bucket, checked_key(uri, prefix) if prefix else "")
        problem = f"{bucket!r} is not the name of a bucket (letters, digits, dots, _ and -); " if bucket else ""
    raise ConfigError(
        f"store address {uri!r} is not usable: {problem}write file:///absolute/folder, a folder path, or s3://bucket/prefix"
    )


def probe(store: Store) -> None:
    """Check a store by writing, reading, deleting and creating one object under `.probe/`; raise StorageError if it is unfit.

    The last check creates the same key from eight threads at once: exactly one of them may succeed. It is a race,
    so one probe can miss a store whose create is not atomic."""
    # a key of its own: several runs may probe one store at once
    key, data = f".probe/{uuid.uuid4().hex}", b"mae"
    try:
        _write_first(store, key, data)
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
        with contextlib.suppress(StorageError):  # the probe's own error matters more
            store.delete(key)


def _write_first(store: Store, key: str, data: bytes) -> None:
    """Write the first object; a folder that cannot be one is the person's mistake."""
    try:
        store.write(key, data)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _WRONG_PATH:
            raise WrongStoreAddress(
                f"{store.uri}: no store can be kept there: {cause.strerror} ({cause.filename}). Write the path of a folder in "
                "which this user may create files"
            ) from error
        raise


def _create_together(store: Store, key: str, number: int, barrier: threading.Barrier) -> bool:
    barrier.wait()
    return store.create(key, b"%d" % number)
