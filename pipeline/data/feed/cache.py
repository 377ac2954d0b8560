"""A node's disk cache of whole shards; each is fetched once, however many processes ask for it.

Shards of a local store are used where they are. Others are downloaded under a lock per shard (flock, which the kernel releases
when its holder dies), checked for size and SHA-256, and renamed into place, so a name that exists is a whole shard. The size
limit is hard: before a download, space is reserved by a folder whose name has the size, and made by deleting the least
recently used shards; shards are deleted in the same way when the disk fills up earlier. `path` and `touch` count as use. A
loader calls them when a shard comes into its lookahead, so the shards that were needed longest ago go first.
Layout: <sha256>.tar, <sha256>.<bytes>.part/ during a download, locks/. The directory may be kept between runs.
Errors: DataError for a shard that differs from its row in the manifest or exceeds the limit; StorageError from the store, and
for a disk that is full or refuses access."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from pipeline.data.dataset.address import locate_shard, shard_address
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.storage import Store

_POLL_SECONDS = 0.05
_DOWNLOAD_TRIES = 2  # of a shard whose bytes are wrong: wrong twice means that the object is, not the transfer

log = logging.getLogger(__name__)


class CacheCounts(NamedTuple):
    """What one cache object has done so far. Each process that shares the directory counts for itself."""

    hits: int = 0
    """Reads that found their shard on disk."""
    misses: int = 0
    """Reads that had to wait for it."""
    downloads: int = 0
    """Shards fetched completely and put in place."""
    bytes: int = 0
    """Bytes of the downloaded shards."""
    evictions: int = 0
    """Shards deleted to make room."""
    repairs: int = 0
    """Copies that were damaged on disk and deleted."""


class CachedShard(NamedTuple):
    """A shard on disk. The least recently used sorts first."""

    used_ns: int
    bytes: int
    path: Path


class ShardCache:
    """The node's cache for the shards of one store. Threads and processes may share the directory."""

    def __init__(self, store: Store, directory: Path, *, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes} of the shard cache is not positive: give a size in bytes")
        self.store, self.directory, self.max_bytes = store, directory, max_bytes
        self.counts = CacheCounts()
        self._counting = threading.Lock()
        self.local_path = lru_cache(maxsize=None)(self._find_local)  # called at every read
        """Key -> path of a shard that needs no copy, or None for one that must be fetched."""

    def __reduce__(self) -> tuple[Callable[..., "ShardCache"], tuple[Store, Path]]:
        return partial(ShardCache, max_bytes=self.max_bytes), (self.store, self.directory)

    def path(self, key: str, *, sha256: str, bytes: int) -> Path:  # noqa: A002 (the manifest's word)
        """Return the shard's path, and fetch it first if necessary. It may be evicted later: on FileNotFoundError call again."""
        local = self.local_path(key)
        if local is not None:
            return local
        path = self._copy(sha256)
        with self._explained(bytes):
            # first without the lock: nearly every call finds its shard, and a lock costs a file to open
            if not _touched(path):
                with self._locked(sha256):
                    if not _touched(path):  # whoever held the lock before may have fetched it
                        self._download(key, path, sha256=sha256, size=bytes)
        return path

    def touch(self, key: str, *, sha256: str) -> bool:
        """Mark the shard as used now and return whether it is on disk. Nothing is fetched."""
        return self.local_path(key) is not None or _touched(self._copy(sha256))

    def open(self, key: str, *, sha256: str, bytes: int) -> int:  # noqa: A002 (the manifest's word)
        """Return a descriptor for reading, which the caller closes, and fetch the shard first if necessary.

        Raises OSError for a local shard that cannot be opened.
        """
        local = self.local_path(key)
        if local is not None:
            return os.open(local, os.O_RDONLY)
        try:
            descriptor = os.open(self._copy(sha256), os.O_RDONLY)
        except FileNotFoundError:
            self.count(misses=1)
        else:
            self.count(hits=1)
            return descriptor
        while True:  # another process may evict the shard between the download and open()
            path = self.path(key, sha256=sha256, bytes=bytes)
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY)

    def discard_if_damaged(self, key: str, *, sha256: str, descriptor: int) -> bool:
        """Delete the copy open as `descriptor` if it is damaged, and return whether it was. The next `open` fetches it again."""
        if self.local_path(key) is not None:
            return False
        path = self._copy(sha256)
        # the lock: of two readers of a damaged copy, the second must not delete the new one that the first has fetched
        with self._locked(sha256):
            if not _is_open_as(path, descriptor):
                return True  # another reader has already replaced it
            # dup: the caller's descriptor must stay open. It shares the offset, which nobody uses, as readers use pread
            with os.fdopen(os.dup(descriptor), "rb") as file:
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return False
            path.unlink(missing_ok=True)
        self.count(repairs=1)
        log.warning(
            "the cached copy %s of %s was damaged on this disk and will be fetched again",
            path,
            shard_address(self.store, key),
        )
        return True

    def _find_local(self, key: str) -> Path | None:
        store, name = locate_shard(self.store, key)
        return store.local_path(name)

    def _copy(self, sha256: str) -> Path:
        # named by content, so datasets that share shards share the copies
        return self.directory / f"{sha256}.tar"

    def _download(self, key: str, path: Path, *, sha256: str, size: int) -> None:
        if size > self.max_bytes:
            raise DataError(
                f"{shard_address(self.store, key)}: {size} bytes do not fit into a shard cache of {self.max_bytes} bytes. Raise "
                "resources.cache_max_bytes"
            )
        part = self.directory / f"{sha256}.{size}.part"
        shutil.rmtree(part, ignore_errors=True)  # left by a holder that died
        # while downloads of others fill the cache, nothing can be evicted: a finished one can
        while not self._reserve(part, size):
            time.sleep(_POLL_SECONDS)
        try:
            fetched = part / "shard.tar"
            self._fetch(key, fetched, sha256=sha256, size=size)
            fetched.rename(path)
            self.count(downloads=1, bytes=size)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch(self, key: str, target: Path, *, sha256: str, size: int) -> None:
        """Download and check a shard; retry once if the bytes are wrong, and whenever a full disk yields space by evictions."""
        store, name = locate_shard(self.store, key)
        tries_left = _DOWNLOAD_TRIES  # a full disk costs no try: each eviction makes progress, and shards run out
        while True:
            try:
                store.download(name, target)
                with target.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except (StorageError, OSError) as error:
                if not _is_full(error):
                    raise
                with self._locked("cache"):
                    if not self._evict(least_recent(self._cached(), excess=size)):
                        raise self._full(size) from error
                continue
            if (length := target.stat().st_size) == size and found == sha256:
                return
            tries_left -= 1
            if not tries_left:
                raise DataError(
                    f"{shard_address(self.store, key)}: {length} bytes with sha256 {found}, the manifest says {size} bytes with "
                    f"{sha256}. It was damaged or replaced. Delete it and run the shard step again, which writes missing shards"
                )

    def _reserve(self, part: Path, size: int) -> bool:
        """Reserve space, evicting shards if necessary, and return whether there was enough."""
        with self._locked("cache"):
            for left in self.directory.glob("*.part"):  # the lock of a holder that died is free
                # LOCK_NB: a live holder may wait for the cache lock that is held here, so waiting for it would deadlock
                with contextlib.suppress(BlockingIOError), self._locked(left.name.split(".")[0], wait=fcntl.LOCK_NB):
                    shutil.rmtree(left, ignore_errors=True)
            # parts before tars: a part renamed to a tar in between is then counted twice rather than not at all
            reserved = sum(int(other.name.split(".")[1]) for other in self.directory.glob("*.part"))
            if reserved + size > self.max_bytes:
                return False
            cached = self._cached()
            excess = reserved + size + sum(shard.bytes for shard in cached) - self.max_bytes
            self._evict(least_recent(cached, excess=excess))
            # still under the lock: the folder is the reservation, and the next holder must see it
            part.mkdir()
            return True

    def _cached(self) -> list[CachedShard]:
        """Return the complete shards on disk."""
        cached = []
        for path in self.directory.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # `discard_if_damaged` may have deleted it meanwhile
                # mtime, which `_touched` sets: many mounts do not keep atime, or keep it only once a day
                info = path.stat()
                cached.append(CachedShard(info.st_mtime_ns, info.st_size, path))
        return cached

    def _evict(self, shards: Sequence[CachedShard]) -> bool:
        """Delete these shards and return whether there were any."""
        for shard in shards:
            shard.path.unlink(missing_ok=True)
        self.count(evictions=len(shards))
        return bool(shards)

    def count(self, **more: int) -> None:
        """Add to the counts: also what the cache of a decode worker did, which is this one in another process."""
        with self._counting:
            self.counts = CacheCounts(**{name: was + more.get(name, 0) for name, was in self.counts._asdict().items()})

    @contextlib.contextmanager
    def _explained(self, size: int) -> Iterator[None]:
        """Turn what the disk refuses into a StorageError with the remedy."""
        try:
            yield
        except OSError as error:
            if _is_full(error):
                raise self._full(size) from error
            raise StorageError(
                f"shard cache {self.directory}: {error}. Make it a folder that this user may write to, or set another folder in "
                "resources.cache_directory"
            ) from error

    def _full(self, size: int) -> StorageError:
        return StorageError(
            f"shard cache {self.directory}: the disk is full. The next shard needs {size} bytes, and the cache holds none that it "
            "could delete. Free that much, or set a folder on a larger disk in resources.cache_directory; the same command then "
            "continues"
        )

    @contextlib.contextmanager
    def _locked(self, name: str, *, wait: int = 0) -> Iterator[None]:
        # a descriptor per use: flock excludes open files from each other, so it works between threads as well
        path = self.directory / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
            yield
        finally:
            os.close(descriptor)  # releases the lock


def least_recent(cached: Sequence[CachedShard], *, excess: int) -> list[CachedShard]:
    """Return the least recently used shards that together free `excess` bytes; all of them if they do not suffice."""
    chosen = []
    for shard in sorted(cached):
        if excess <= 0:
            break
        chosen.append(shard)
        excess -= shard.bytes
    return chosen


def _touched(path: Path) -> bool:
    """Mark the file as used now and return whether it exists."""
    now = time.time_ns()  # utime's default is the kernel's clock, which is only as fine as its tick
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
    """Return whether a full disk or quota caused a failure."""
    # a store wraps what the disk said (storage/error_messages.py); this module's own calls raise it as it is
    cause = error.__cause__ if isinstance(error, StorageError) else error
    return isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}
