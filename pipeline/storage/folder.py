"""A folder as an object store.

Files appear by rename or hard link, after fsync, so that the data of a visible file are already on the disk.
Errors: see store.py."""

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.storage.error_messages import translate_errors
from pipeline.storage.store import TEMPORARY, ObjectInfo, Traffic, checked_key, checked_length, temporary_beside


@dataclass(frozen=True)
class FileStore:
    """A folder on this machine, or on a file system that all machines mount."""

    root: Path

    @property
    def uri(self) -> str:
        """The address, `file:///...`."""
        return self.root.as_uri()

    @property
    def traffic(self) -> Traffic:
        """See Store."""
        return Traffic(0, 0, 0)

    def read(self, key: str) -> bytes:
        """See Store."""
        with translate_errors(self.uri, key, "read"):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        # unbuffered, since pread goes past Python's buffer anyway
        with translate_errors(self.uri, key, "read"), self._path(key).open("rb", buffering=0) as file:
            parts, at = [], start
            # a single pread may return less than asked, and returns at most 2 GiB
            while at < start + length and (part := os.pread(file.fileno(), start + length - at, at)):
                parts.append(part)
                at += len(part)
        return checked_length(self.uri, key, start, length, b"".join(parts))

    def write(self, key: str, data: bytes | memoryview) -> None:
        """See Store."""
        with translate_errors(self.uri, key, "write"), temporary_beside(self._path(key)) as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> bool:
        """See Store."""
        with translate_errors(self.uri, key, "create"), temporary_beside(self._path(key)) as temporary:
            _write_synced(temporary, data)
            try:
                # unlike a rename, a hard link fails if the name exists
                self._path(key).hardlink_to(temporary)
            except FileExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        """See Store."""
        with translate_errors(self.uri, key, "existence check"):
            return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Follows links to folders, and lists a dangling link with size 0."""
        folder, _, name = prefix.rpartition("/")
        base = self._path(folder) if folder else self.root
        with translate_errors(self.uri, prefix, "list"):
            if base.is_dir():
                # the prefix is text and not a folder, so its last part is only the beginning of names
                yield from _walk(base, f"{folder}/" if folder else "", name, (_inode(base.stat()),))

    def delete(self, key: str) -> None:
        """See Store."""
        with translate_errors(self.uri, key, "delete"):
            self._path(key).unlink(missing_ok=True)

    def upload(self, key: str, path: Path) -> None:
        """See Store."""
        with translate_errors(self.uri, key, f"upload of {path}"), temporary_beside(self._path(key)) as temporary:
            # copied, not linked: the source is the caller's to change or delete
            _copy_synced(path, temporary)
            temporary.replace(self._path(key))

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with translate_errors(self.uri, key, f"download to {path}"), temporary_beside(path) as temporary:
            _copy_synced(self._path(key), temporary)
            temporary.replace(path)

    def at(self, prefix: str) -> "FileStore":
        """See Store."""
        return FileStore(self._path(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        """See Store."""
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(str(self.root), key)


def _walk(folder: Path, base: str, name_prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Yield the files below a folder in key order; `above` holds the inodes of its ancestors, to detect loops of links.

    A folder sorts as its name plus a slash, as in an object store: `a-b/y` comes before `a/x`."""
    with os.scandir(folder) as entries:
        # sorted with the slash, see above, and in one go: scandir has no order
        found = sorted(
            (entry.name + "/" if entry.is_dir() else entry.name, entry)
            for entry in entries
            if entry.name.startswith(name_prefix)
        )
    for name, entry in found:
        if name.endswith("/"):
            inode = _inode(entry.stat())
            if inode in above:
                raise OSError(errno.ELOOP, "this link leads back to a folder above it: remove the link", entry.path)
            yield from _walk(Path(entry.path), base + name, "", (*above, inode))
        elif not name.startswith(TEMPORARY):
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # a dangling link, or a file deleted since the scan
                size = 0
            yield ObjectInfo(base + name, size)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        # fsync knows nothing of Python's buffer
        file.flush()
        os.fsync(file.fileno())


def _copy_synced(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
