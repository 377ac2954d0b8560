"""Whole shards on this node's disk, each fetched once however many processes ask.

A local store's shards are used where they lie. Others are downloaded under a lock of the shard (flock: it goes with its
holder), checked for size and SHA-256, and renamed into place, so that a name that exists is a whole shard. The cap is
hard: space is reserved before a download, by a folder that bears the size, and made by deleting least recently used shards.
Layout: <sha256>.tar, <sha256>.<bytes>.part/ while it is fetched, locks/. The directory may be kept between runs.
Errors: DataError for a shard that is not what its row says or larger than the cap, StorageError from the store."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ConfigError, DataError
from pipeline.storage import Store

_POLL_SECONDS = 0.05


class ShardCache:
    """The node's cache for the shards of one store. Threads and processes may share the directory."""

    def __init__(self, store: Store, directory: Path, *, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes} of the shard cache is not positive: write its size in bytes")
        self.store, self.directory, self.max_bytes = store, directory, max_bytes
        self.downloads = 0
        """Shards this object fetched."""

    def path(self, key: str, *, sha256: str, bytes: int) -> Path:  # noqa: A002 (the manifest's word)
        """Where the shard lies, fetched if need be. It may be evicted later: on FileNotFoundError ask again."""
        local = self.store.local_path(key)
        if local is not None:
            return local
        path = self.directory / f"{sha256}.tar"
        if not _touched(path):
            with self._locked(sha256):
                if not _touched(path):
                    self._download(key, path, sha256=sha256, size=bytes)
        return path

    def _download(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        where = f"{self.store.uri}/{key}"
        if size > self.max_bytes:
            raise DataError(
                f"{where}: {size} bytes do not fit in a shard cache of {self.max_bytes}: raise its max_bytes"
            )
        part = self.directory / f"{sha256}.{size}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a holder that died
        while not self._reserve(part, size):  # others' downloads fill the cache; they end, and can then be evicted
            time.sleep(_POLL_SECONDS)
        try:
            fetched = part / "shard.tar"
            self.store.download(key, fetched)
            with fetched.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if (length := fetched.stat().st_size) != size or found != sha256:
                raise DataError(
                    f"{where}: {length} bytes with sha256 {found}, the manifest says {size} bytes with {sha256}. It was damaged "
                    "or replaced: delete it and run the shard step again, which writes what is missing"
                )
            fetched.rename(path)
            self.downloads += 1
        finally:
            shutil.rmtree(part)

    def _reserve(self, part: Path, size: int) -> bool:
        """Makes room and takes it, or says that there is none now."""
        with self._locked("cache"):
            for left in self.directory.glob("*.part"):  # a holder that died has left its lock free
                with contextlib.suppress(BlockingIOError), self._locked(left.name.split(".")[0], wait=fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
            # parts before tars: one that becomes a tar in between is counted twice, not left out
            reserved = sum(int(other.name.split(".")[1]) for other in self.directory.glob("*.part"))
            tars = [
                (info.st_mtime_ns, info.st_size, tar) for tar in self.directory.glob("*.tar") for info in [tar.stat()]
            ]
            held = sum(length for _, length, _ in tars)
            if reserved + size > self.max_bytes:
                return False
            for _, length, tar in sorted(tars):
                if reserved + held + size <= self.max_bytes:
                    break
                tar.unlink()
                held -= length
            part.mkdir()
            return True

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: int = 0) -> Iterator[None]:
        path = self.directory / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
            yield
        finally:
            os.close(descriptor)  # frees the lock


def _touched(path: Path) -> bool:
    """Whether it exists, marked as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
