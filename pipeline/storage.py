"""Object stores behind one small interface: a folder (`FileStore`) or an S3 bucket (`S3Store`).

Addresses: `file:///abs/folder`, a plain folder path, `s3://bucket/prefix`. Keys: text with `/` between non-empty parts,
none of them `.` or `..`; listings come in the order of the keys. Sizes in bytes. A store is a small value: threads may
share it, pickling is cheap, and a worker reopens it from `uri`. S3 is boto3's transfers and retries; endpoint, region
and credentials come from AWS's standard environment and files.
What a reader sees is whole: files appear by rename (`write`, `upload`) or hard link (`create`), never half written.
Put-if-absent (`create`) is the one condition asked of a store; `probe` proves it before a run starts.
Errors: ConfigError for an address that is none of the three; StorageError for everything else, with MissingObject and
DeniedObject where one object rather than the store is the trouble."""

import contextlib
import errno
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, HTTPClientError, NoCredentialsError

from pipeline.errors import ConfigError, StorageError

TEMPORARY = ".tmp-"
"""Names that begin so are unfinished files; they are never listed."""
_CONFLICT_TRIES = 5
_READ_TRIES = 4


class MissingObject(StorageError):
    """There is no object under this key."""


class DeniedObject(StorageError):
    """The store answers, and refuses this object to us."""


class ObjectInfo(NamedTuple):
    """One line of a listing."""

    key: str
    size: int


class Store(Protocol):
    """What the pipeline asks of an object store."""

    @property
    def uri(self) -> str:
        """The address that `open_store` makes this store from again."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object; MissingObject when there is none."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; StorageError when the object ends before."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Puts the object, replacing what was there, at once."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent: False, and nothing changed, if the key exists.

        After an answer lost on the way the existing object may be this very call's.
        """
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
            return S3Store(bucket, _checked(uri, prefix) if prefix else "")
    raise ConfigError(
        f"store address {uri!r} is not usable: write file:///absolute/folder, a folder path, or s3://bucket/prefix"
    )


def probe(store: Store) -> None:
    """Writes, creates twice, reads and deletes under `.probe/`; StorageError if the store is no place for a run."""
    key, data = f".probe/{uuid.uuid4().hex}", b"mae"
    try:
        store.write(key, data)
        if store.create(key, b"twice"):
            raise StorageError(
                f"{store.uri}: create of {key} replaced an object that existed: this store ignores `If-None-Match: *`, "
                "so two drivers could claim one generation. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2)"
            )
        if store.read(key) != data:
            raise StorageError(f"{store.uri}: {key} reads back other bytes than were written. Use another store")
        store.delete(key)
        if not store.create(key, data):
            raise StorageError(
                f"{store.uri}: create of {key} says it exists right after its deletion. Use a consistent store"
            )
    finally:
        with contextlib.suppress(StorageError):
            store.delete(key)


@dataclass(frozen=True)
class FileStore:
    """A folder of this machine, or of a file system that all machines mount."""

    root: Path

    @property
    def uri(self) -> str:
        """`file:///...`."""
        return self.root.as_uri()

    def read(self, key: str) -> bytes:
        """See Store."""
        with _explained(self.uri, key, "read"):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        with _explained(self.uri, key, "read"), self._path(key).open("rb", buffering=0) as file:
            parts, at = [], start
            while at < start + length and (part := os.pread(file.fileno(), start + length - at, at)):
                parts.append(part)
                at += len(part)
        return _whole(self.uri, key, start, length, b"".join(parts))

    def write(self, key: str, data: bytes) -> None:
        """See Store."""
        with _explained(self.uri, key, "write"), _beside(self._path(key)) as temporary:
            _write_synced(temporary, data)
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> bool:
        """See Store."""
        with _explained(self.uri, key, "create"), _beside(self._path(key)) as temporary:
            _write_synced(temporary, data)
            try:
                self._path(key).hardlink_to(temporary)
            except FileExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        """See Store."""
        with _explained(self.uri, key, "look for"):
            return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Links to folders are followed; a dangling link is listed with size 0."""
        folder, _, name = prefix.rpartition("/")
        base = self._path(folder) if folder else self.root
        with _explained(self.uri, prefix, "list"):
            if base.is_dir():
                yield from _walk(base, f"{folder}/" if folder else "", name, (_inode(base.stat()),))

    def delete(self, key: str) -> None:
        """See Store."""
        with _explained(self.uri, key, "delete"):
            self._path(key).unlink(missing_ok=True)

    def upload(self, key: str, path: Path) -> None:
        """See Store."""
        with _explained(self.uri, key, f"upload of {path}"), _beside(self._path(key)) as temporary:
            _copy_synced(path, temporary)
            temporary.replace(self._path(key))

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with _explained(self.uri, key, f"download to {path}"), _beside(path) as temporary:
            _copy_synced(self._path(key), temporary)
            temporary.replace(path)

    def at(self, prefix: str) -> "FileStore":
        """See Store."""
        return FileStore(self._path(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        """See Store."""
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.root / _checked(str(self.root), key)


@dataclass(frozen=True)
class S3Store:
    """A prefix of a bucket."""

    bucket: str
    prefix: str = ""

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> bytes:
        """See Store."""
        with _explained(self.uri, key, "read"):
            return self._get(self._name(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        if length == 0:
            return b""
        with _explained(self.uri, key, f"read of bytes {start} to {start + length}"):
            data = self._get(self._name(key), Range=f"bytes={start}-{start + length - 1}")
        return _whole(self.uri, key, start, length, data)

    def write(self, key: str, data: bytes) -> None:
        """See Store."""
        with _explained(self.uri, key, "write"):
            _client().put_object(Bucket=self.bucket, Key=self._name(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        """See Store."""
        with _explained(self.uri, key, "create"):
            for tries_left in reversed(range(_CONFLICT_TRIES)):
                try:
                    _client().put_object(Bucket=self.bucket, Key=self._name(key), Body=data, IfNoneMatch="*")
                except ClientError as error:
                    status = _status(error)
                    if status == 412:
                        return False
                    if status != 409 or not tries_left:
                        raise
                    time.sleep(random.uniform(0.05, 0.2) * (_CONFLICT_TRIES - tries_left))  # noqa: S311
                else:
                    return True
        raise AssertionError("the last try returns or raises")

    def exists(self, key: str) -> bool:
        """See Store."""
        with _explained(self.uri, key, "look for"):
            try:
                _client().head_object(Bucket=self.bucket, Key=self._name(key))
            except ClientError as error:
                if _status(error) == 404:
                    return False
                raise
            return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Keys that end in `/` (a console's folder marks) are left out."""
        base = f"{self.prefix}/" if self.prefix else ""
        with _explained(self.uri, prefix, "list"):
            pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):
                        yield ObjectInfo(item["Key"][len(base) :], item["Size"])

    def delete(self, key: str) -> None:
        """See Store."""
        with _explained(self.uri, key, "delete"):
            _client().delete_object(Bucket=self.bucket, Key=self._name(key))

    def upload(self, key: str, path: Path) -> None:
        """See Store."""
        with _explained(self.uri, key, f"upload of {path}"):
            _client().upload_file(str(path), self.bucket, self._name(key))

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with _explained(self.uri, key, f"download to {path}"), _beside(path) as temporary:
            _client().download_file(self.bucket, self._name(key), str(temporary))
            temporary.replace(path)

    def at(self, prefix: str) -> "S3Store":
        """See Store."""
        return S3Store(self.bucket, self._name(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        """See Store."""
        return None

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{_checked(self.uri, key)}" if self.prefix else _checked(self.uri, key)

    def _get(self, name: str, **options: str) -> bytes:
        """botocore retries the request but not a body that breaks off: that is done here."""
        for tries_left in reversed(range(_READ_TRIES)):
            body = _client().get_object(Bucket=self.bucket, Key=name, **options)["Body"]
            try:
                data: bytes = body.read()
            except BotoCoreError:
                if not tries_left:
                    raise
                time.sleep(0.2 * (_READ_TRIES - tries_left))
            else:
                return data
        raise AssertionError("the last try returns or raises")


def _checked(location: str, key: str) -> str:
    if "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise StorageError(
            f"{location}: {key!r} is no key: write names joined by single slashes, without '.', '..' or a leading '/'"
        )
    return key


def _whole(location: str, key: str, start: int, length: int, data: bytes) -> bytes:
    if len(data) != length:
        raise StorageError(
            f"{location}: {key} ends early: {len(data)} of {length} bytes from {start}. It is cut off; write it anew"
        )
    return data


# Folders


def _walk(folder: Path, base: str, begins: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Files below a folder in key order: a folder sorts as its name and a slash, as in an object store."""
    with os.scandir(folder) as entries:
        found = sorted(
            (entry.name + "/" if entry.is_dir() else entry.name, entry)
            for entry in entries
            if entry.name.startswith(begins)
        )
    for name, entry in found:
        if name.endswith("/"):
            inode = _inode(entry.stat())
            if inode in above:
                raise OSError(errno.ELOOP, "a link leads back to a folder above it; remove the link", entry.path)
            yield from _walk(Path(entry.path), base + name, "", (*above, inode))
        elif not name.startswith(TEMPORARY):
            try:
                size = entry.stat().st_size
            except FileNotFoundError:
                size = 0
            yield ObjectInfo(base + name, size)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name in the file's own folder, gone afterwards whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_synced(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


# S3

_clients: dict[tuple[int, str | None], Any] = {}
_clients_lock = threading.Lock()


def _client() -> Any:
    """One client a process and endpoint: clients are thread-safe, but do not survive a fork."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    with _clients_lock:
        key = (os.getpid(), endpoint)
        if key not in _clients:
            retries: dict[str, Any] = {"mode": "standard"}
            if "AWS_MAX_ATTEMPTS" not in os.environ:
                retries["total_max_attempts"] = 6
            options: dict[str, Any] = {
                "retries": retries,
                "connect_timeout": 10,
                "read_timeout": 60,
                "max_pool_connections": 32,
            }
            if endpoint:  # not AWS itself: virtual hosts and the newer checksums are not everywhere
                options |= {"s3": {"addressing_style": "path"}, "request_checksum_calculation": "when_required"}
            _clients[key] = boto3.session.Session().client("s3", config=Config(**options))
        return _clients[key]


def _status(error: Any) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


# Errors in words


@contextlib.contextmanager
def _explained(location: str, key: str, operation: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ClientError, BotoCoreError, Boto3Error) as error:
        # boto3's S3UploadFailedError keeps what happened only in its context
        cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error
        kind, words = _reason(cause)
        raise kind(f"{location}: {operation} failed for {key or 'the whole store'}: {words}") from error


def _reason(error: BaseException) -> tuple[type[StorageError], str]:
    """The class of a failure, and cause with way out in one line."""
    if isinstance(error, ClientError):
        return _s3_reason(error)
    if isinstance(error, NoCredentialsError):
        return StorageError, "no AWS credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, (EndpointConnectionError, HTTPClientError)):
        return (
            StorageError,
            f"the endpoint does not answer ({error}). Check AWS_ENDPOINT_URL, region and network, then run again",
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return MissingObject, f"no such file ({error.filename}). Check the path, or run the step that writes it"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return DeniedObject, f"permission denied ({error}). Give this user access to the folder, or choose another"
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError, f"no space left ({error}). Free some, or choose another store; finished work is kept"
    return StorageError, f"{type(error).__name__}: {error}"


def _s3_reason(error: Any) -> tuple[type[StorageError], str]:
    code, status = error.response.get("Error", {}).get("Code", ""), _status(error)
    if code == "NoSuchBucket":
        return StorageError, "no such bucket. Create it, or correct the address"
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"}:
        return (
            StorageError,
            f"the credentials are refused ({code}). Renew the key, secret or token, and check the clock",
        )
    if status == 404:
        return MissingObject, "no such object. Check the address, or run the step that writes it"
    if status == 403:
        return (
            DeniedObject,
            f"access denied ({code}). Grant s3:GetObject, s3:PutObject, s3:ListBucket and s3:DeleteObject on it",
        )
    if status == 416:
        return StorageError, "it ends before that. It is cut off; write it anew"
    if status == 501:
        return StorageError, "the store does not know this request (501): it must support `If-None-Match: *` on put"
    return StorageError, f"{code or status}: {error}"
