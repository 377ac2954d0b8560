"""Whole shards on this node's disk, each fetched once however many processes ask.

A local store's shards are used where they lie. Others are downloaded under a lock of the shard (flock: it goes with its
holder), checked for size and SHA-256, and renamed into place, so that a name that exists is a whole shard. The cap is
hard: space is reserved before a download, by a folder that bears the size, and made by deleting least recently used shards;
a disk that is full before the cap is reached gives up shards likewise. Use is what `path` and `touch` are called for: a
loader calls them when a shard comes into its view ahead, so that those go first whose last known need is longest past.
Layout: <sha256>.tar, <sha256>.<bytes>.part/ while it is fetched, locks/. The directory may be kept between runs.
Errors: DataError for a shard that is not what its row says or larger than the cap; StorageError from the store, and for a
disk that is full or refuses."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pipeline.data.dataset.manifest import locate, shard_address
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.storage import Store

_POLL_SECONDS = 0.05
_DOWNLOAD_TRIES = 2

log = logging.getLogger(__name__)


class CacheCounts(NamedTuple):
    """What one cache object did so far; other processes that share the directory count for themselves."""

    hits: int = 0
    """Reads that found their shard on the disk."""
    misses: int = 0
    """Reads that had to wait for it."""
    downloads: int = 0
    """Shards fetched whole and put in place."""
    bytes: int = 0
    """Of these."""
    evictions: int = 0
    """Shards deleted to make room."""
    repairs: int = 0
    """Copies that had been damaged on the disk, and were deleted."""


class CachedShard(NamedTuple):
    """A shard on the disk; older ones sort first."""

    used_ns: int
    bytes: int
    path: Path


class ShardCache:
    """The node's cache for the shards of one store. Threads and processes may share the directory."""

    def __init__(self, store: Store, directory: Path, *, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes} of the shard cache is not positive: write its size in bytes")
        self.store, self.directory, self.max_bytes = store, directory, max_bytes
        self.counts = CacheCounts()
        self._counting = threading.Lock()
        self.local_path = lru_cache(maxsize=None)(self._find_local)  # asked for at every read
        """Key -> where a shard lies that needs no copy; None: it is fetched."""

    def path(self, key: str, *, sha256: str, bytes: int) -> Path:  # noqa: A002 (the manifest's word)
        """Where the shard lies, fetched if need be. It may be evicted later: on FileNotFoundError ask again."""
        local = self.local_path(key)
        if local is not None:
            return local
        path = self._copy(sha256)
        with self._explained(bytes):
            if not _touched(path):
                with self._locked(sha256):
                    if not _touched(path):
                        self._download(key, path, sha256=sha256, size=bytes)
        return path

    def touch(self, key: str, *, sha256: str) -> bool:
        """Whether the shard is there, marked as used now; nothing is fetched."""
        return self.local_path(key) is not None or _touched(self._copy(sha256))

    def open(self, key: str, *, sha256: str, bytes: int) -> int:  # noqa: A002 (the manifest's word)
        """A descriptor for reading, to be closed by the caller; the shard is fetched if need be.

        Errors: OSError for a local shard that cannot be opened.
        """
        local = self.local_path(key)
        if local is not None:
            return os.open(local, os.O_RDONLY)
        try:
            descriptor = os.open(self._copy(sha256), os.O_RDONLY)
        except FileNotFoundError:
            self._count(misses=1)
        else:
            self._count(hits=1)
            return descriptor
        while True:  # what was fetched may be evicted before it is opened
            path = self.path(key, sha256=sha256, bytes=bytes)
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY)

    def repaired(self, key: str, *, sha256: str, descriptor: int) -> bool:
        """Whether the copy open as `descriptor` was damaged: it is then deleted, and the next `open` fetches it anew."""
        if self.local_path(key) is not None:
            return False
        path = self._copy(sha256)
        with self._locked(sha256):
            if not _is_open_as(path, descriptor):
                return True  # another reader was quicker
            with os.fdopen(os.dup(descriptor), "rb") as file:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return False
            path.unlink(missing_ok=True)
        self._count(repairs=1)
        log.warning(
            "the cached copy %s of %s was damaged on this disk: it is fetched again",
            path,
            shard_address(self.store, key),
        )
        return True

    def _find_local(self, key: str) -> Path | None:
        store, name = locate(self.store, key)
        return store.local_path(name)

    def _copy(self, sha256: str) -> Path:
        return self.directory / f"{sha256}.tar"

    def _download(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        if size > self.max_bytes:
            raise DataError(
                f"{shard_address(self.store, key)}: {size} bytes do not fit in a shard cache of {self.max_bytes}: raise "
                "resources.cache_max_bytes"
            )
        part = self.directory / f"{sha256}.{size}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a holder that died
        while not self._reserve(part, size):  # others' downloads fill the cache; they end, and can then be evicted
            time.sleep(_POLL_SECONDS)
        try:
            fetched = part / "shard.tar"
            self._fetch(key, fetched, sha256=sha256, size=size)
            fetched.rename(path)
            self._count(downloads=1, bytes=size)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch(self, key: str, target: Path, *, sha256: str, size: int) -> None:
        """Downloads, and checks; once more when other bytes came than were promised, or room could be made on a full disk."""
        store, name = locate(self.store, key)
        tries_left = _DOWNLOAD_TRIES
        while True:
            try:
                store.download(name, target)
                with target.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except (StorageError, OSError) as error:
                if not _is_full(error):
                    raise
                with self._locked("cache"):
                    if not self._evict(least_recent(self._held(), excess=size)):
                        raise self._full(size) from error
                continue
            if (length := target.stat().st_size) == size and found == sha256:
                return
            tries_left -= 1
            if not tries_left:
                raise DataError(
                    f"{shard_address(self.store, key)}: {length} bytes with sha256 {found}, the manifest says {size} bytes with "
                    f"{sha256}. It was damaged or replaced: delete it and run the shard step again, which writes what is missing"
                )

    def _reserve(self, part: Path, size: int) -> bool:
        """Makes room and takes it, or says that there is none now."""
        with self._locked("cache"):
            for left in self.directory.glob("*.part"):  # a holder that died has left its lock free
                with contextlib.suppress(BlockingIOError), self._locked(left.name.split(".")[0], wait=fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
            # parts before tars: one that becomes a tar in between is counted twice, not left out
            reserved = sum(int(other.name.split(".")[1]) for other in self.directory.glob("*.part"))
            if reserved + size > self.max_bytes:
                return False
            held = self._held()
            excess = reserved + size + sum(shard.bytes for shard in held) - self.max_bytes
            self._evict(least_recent(held, excess=excess))
            part.mkdir()
            return True

    def _held(self) -> list[CachedShard]:
        """The whole shards on the disk."""
        held = []
        for path in self.directory.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # a damaged one may go meanwhile
                info = path.stat()
                held.append(CachedShard(info.st_mtime_ns, info.st_size, path))
        return held

    def _evict(self, shards: Sequence[CachedShard]) -> bool:
        """Deletes these; whether there was one."""
        for shard in shards:
            shard.path.unlink(missing_ok=True)
        self._count(evictions=len(shards))
        return bool(shards)

    def _count(self, **more: int) -> None:
        with self._counting:
            self.counts = CacheCounts(**{name: was + more.get(name, 0) for name, was in self.counts._asdict().items()})

    @contextlib.contextmanager
    def _explained(self, size: int) -> Iterator[None]:
        """What the disk refuses, in words."""
        try:
            yield
        except OSError as error:
            if _is_full(error):
                raise self._full(size) from error
            raise StorageError(
                f"shard cache {self.directory}: {error}. Make it a folder that this user may write to, or name another one in "
                "resources.cache_directory"
            ) from error

    def _full(self, size: int) -> StorageError:
        return StorageError(
            f"shard cache {self.directory}: the disk is full, {size} bytes are needed for the next shard and the cache holds "
            "none that it could delete. Free as much, or name a folder on a larger disk in resources.cache_directory; the same "
            "command then goes on"
        )

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


def least_recent(held: Sequence[CachedShard], *, excess: int) -> list[CachedShard]:
    """The shards to delete, longest unused first, so that `excess` bytes go; all of them when they are fewer."""
    chosen = []
    for shard in sorted(held):
        if excess <= 0:
            break
        chosen.append(shard)
        excess -= shard.bytes
    return chosen


def _touched(path: Path) -> bool:
    """Whether it exists, marked as used now."""
    now = time.time_ns()  # the kernel's own stamp is as coarse as its tick
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_full(error: BaseException) -> bool:
    """Whether a full disk (or quota) is behind a failure."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}
