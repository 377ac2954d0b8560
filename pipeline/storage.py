"""Object stores behind one small interface: a folder (`FileStore`) or an S3 bucket (`S3Store`).

Addresses: `file:///abs/folder`, a plain folder path, `s3://bucket/prefix`. Keys: text with `/` between non-empty parts,
none of them `.` or `..`; listings come in the order of the keys. Sizes in bytes. A store is a small value: threads may
share it, pickling is cheap, and a worker reopens it from `uri`. S3 is boto3's transfers and retries, with pauses of our own
while a store is away; endpoint, region, addressing style and credentials come from AWS's standard environment and files
(docs/storage.md).
What a reader sees is whole: files appear by rename (`write`, `upload`) or hard link (`create`), never half written.
Put-if-absent (`create`) is the one condition asked of a store; `probe` proves it before a run starts.
Errors: ConfigError for an address that is none of the three; StorageError for everything else, with MissingObject and
DeniedObject where one object rather than the store is the trouble. After an error nobody knows whether a write came through:
the object is there whole, or as it was. No message holds a key, secret or token."""

import contextlib
import errno
import logging
import os
import random
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import boto3
import botocore.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from s3transfer.exceptions import S3DownloadFailedError

from pipeline.errors import ConfigError, StorageError

log = logging.getLogger(__name__)
TEMPORARY = ".tmp-"
"""Names that begin so are unfinished files; they are never listed."""
_CONFLICT_TRIES = 5
_READ_TRIES = 4
_UPLOAD_TRIES = 2
_MAX_ATTEMPTS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 16.0
"""The pauses between the attempts of one request add up to 24 to 48 s: a store that restarts is waited for."""
_PROBE_CREATES = 8
_WHY_CREATE = "so two drivers could claim one generation. Use a store with conditional writes (AWS S3, MinIO, Ceph, R2)"
_PART_BYTES = 16 * 2**20
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES,
    multipart_chunksize=_PART_BYTES,
    max_concurrency=8,
    preferred_transfer_client="classic",  # the other one, in C, hangs in a process forked after its first use
)
_CREATED_BY = "mae-created-by"
"""Name of the metadata by which a `create` knows its own object again."""


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

    def write(self, key: str, data: bytes) -> None:
        """Puts the object, replacing what was there, at once."""
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


@dataclass(frozen=True)
class FileStore:
    """A folder of this machine, or of a file system that all machines mount."""

    root: Path

    @property
    def uri(self) -> str:
        """`file:///...`."""
        return self.root.as_uri()

    @property
    def traffic(self) -> Traffic:
        """See Store."""
        return Traffic(0, 0, 0)

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

    @property
    def traffic(self) -> Traffic:
        """See Store."""
        return _meter.read()

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
        """See Store. When an answer is lost, boto3 asks again, and 412 may mean the object of the first request."""
        name, mark = self._name(key), uuid.uuid4().hex
        condition = {"IfNoneMatch": "*", "Metadata": {_CREATED_BY: mark}}
        asked_before = False
        with _explained(self.uri, key, "create"):
            for tries_left in reversed(range(_CONFLICT_TRIES)):
                try:
                    _client().put_object(Bucket=self.bucket, Key=name, Body=data, **condition)
                except ClientError as error:
                    status = _status(error)
                    asked_before = asked_before or _attempts(error) > 1
                    if status == 412:
                        return asked_before and self._is_ours(name, mark, data)
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
            for tries_left in reversed(range(_UPLOAD_TRIES)):
                try:
                    _client().upload_file(str(path), self.bucket, self._name(key), Config=_TRANSFER)
                except Boto3Error as error:
                    if not tries_left or not _is_lost_upload(error):
                        raise
                    _meter.add(retries=1)
                else:
                    return

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with _explained(self.uri, key, f"download to {path}"), _beside(path) as temporary:
            _client().download_file(
                self.bucket, self._name(key), str(temporary), Config=_TRANSFER, Callback=_count_received
            )
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
        return self._answer(name, **options)[0]

    def _answer(self, name: str, **options: str) -> tuple[bytes, Mapping[str, str]]:
        """Bytes and metadata. botocore retries the request but not a body that breaks off: that is done here."""
        for tries_left in reversed(range(_READ_TRIES)):
            answer = _client().get_object(Bucket=self.bucket, Key=name, **options)
            try:
                data: bytes = answer["Body"].read()
            except BotoCoreError:
                if not tries_left:
                    raise
                _meter.add(retries=1)
                time.sleep(random.uniform(0.1, 0.3) * (_READ_TRIES - tries_left))  # noqa: S311
            else:
                _meter.add(bytes_received=len(data))
                return data, answer["Metadata"]
        raise AssertionError("the last try returns or raises")

    def _is_ours(self, name: str, mark: str, data: bytes) -> bool:
        """Whether the object under a name is the one that this call of `create` sent."""
        try:
            found, metadata = self._answer(name)
        except ClientError as error:
            if _status(error) == 404:  # made, and deleted since
                return False
            raise
        made_by = metadata.get(_CREATED_BY)
        return found == data if made_by is None else made_by == mark  # some stores keep no metadata


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

_clients: dict[tuple[int, int], Any] = {}
_clients_lock = threading.Lock()


def _client() -> Any:
    """One client a process and AWS environment: clients are thread-safe, but do not survive a fork."""
    settings = hash(frozenset(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _clients_lock:
        key = (os.getpid(), settings)
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    core = botocore.session.get_session()
    profile = core.get_scoped_config()
    services = core.full_config.get("services", {}).get(profile.get("services", ""), {})
    endpoint = _endpoint(os.environ, profile, services)
    options = _client_options(os.environ, profile, own_endpoint=endpoint is not None)
    try:
        client = boto3.session.Session(botocore_session=core).client("s3", config=Config(**options))
    except ValueError as error:  # how botocore says so
        raise StorageError(
            f"the endpoint {(endpoint or '').rpartition('@')[2]!r} is no address. "
            "Write AWS_ENDPOINT_URL as http://host:port or https://host"
        ) from error
    client.meta.events.register("before-send.s3", _count_request)
    waiting = _Waiting(client.meta.config.retries["total_max_attempts"])
    client.meta.events.register_first("needs-retry.s3", waiting.seconds_to_wait)
    return client


def _endpoint(environment: Mapping[str, str], profile: Mapping[str, Any], services: Mapping[str, Any]) -> str | None:
    """The address that botocore will use instead of AWS's own, by its order of precedence; None for AWS."""
    if environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )


def _client_options(
    environment: Mapping[str, str], profile: Mapping[str, Any], *, own_endpoint: bool
) -> dict[str, Any]:
    """Ours where AWS's standard environment and profile say nothing: what is given to botocore would override them."""

    def said(variable: str, name: str) -> bool:
        return variable in environment or name in profile

    retries: dict[str, Any] = {}
    if not said("AWS_RETRY_MODE", "retry_mode"):
        retries["mode"] = "standard"
    if not said("AWS_MAX_ATTEMPTS", "max_attempts"):
        retries["total_max_attempts"] = _MAX_ATTEMPTS
    options: dict[str, Any] = {
        "retries": retries,
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 64,
    }
    if own_endpoint:  # not AWS itself: virtual hosts and the newer checksums are not everywhere
        if "addressing_style" not in profile.get("s3", {}):
            options["s3"] = {**profile.get("s3", {}), "addressing_style": "path"}
        if not said("AWS_REQUEST_CHECKSUM_CALCULATION", "request_checksum_calculation"):
            options["request_checksum_calculation"] = "when_required"
        if not said("AWS_RESPONSE_CHECKSUM_VALIDATION", "response_checksum_validation"):
            options["response_checksum_validation"] = "when_required"
    return options


def pause_s(attempt: int, max_attempts: int, share: float) -> float | None:
    """Seconds from the failure of an attempt (1, 2, ...) to the next; None: it was the last. `share` in [0, 1) spreads clients."""
    if attempt >= max_attempts:
        return None
    return min(_FIRST_PAUSE_S * 2.0 ** (attempt - 1), _LONGEST_PAUSE_S) * (1 + share) / 2


class _Waiting:
    """Pauses while a store is away or overloaded, from botocore's event `needs-retry`.

    botocore's own begin at 50 ms, and a client has 35 retries in all until something succeeds again (1.44): parallel transfers
    gave up within a second when a server was killed, and it takes longer than that to start again.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._quiet_until = 0.0

    def seconds_to_wait(self, response: Any, attempts: int, caught_exception: Any, **_: Any) -> float | None:
        """None leaves the decision to botocore."""
        away = isinstance(caught_exception, (EndpointConnectionError, HTTPClientError))
        overloaded = response is not None and response[0].status_code in {429, 500, 502, 503, 504}
        if isinstance(caught_exception, SSLError) or not (away or overloaded):
            return None
        pause = pause_s(attempts, self._max_attempts, random.random())  # noqa: S311
        if pause is not None and attempts >= 3 and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + 30
            words = f"answers {response[0].status_code}" if overloaded else "does not answer"
            log.warning("the object store %s; attempt %d of %d follows", words, attempts + 1, self._max_attempts)
        return pause


class _Meter:
    """Sums that many threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = Traffic(0, 0, 0)

    def add(self, *, requests: int = 0, bytes_received: int = 0, retries: int = 0) -> None:
        with self._lock:
            more = Traffic(requests, bytes_received, retries)
            self._sums = Traffic(*(a + b for a, b in zip(self._sums, more, strict=True)))

    def read(self) -> Traffic:
        return self._sums


_meter = _Meter()


def _count_request(request: Any, **_: Any) -> None:
    """botocore calls this before each attempt, whose number is in a header (`attempt=2; max=8`)."""
    sent = request.headers.get("amz-sdk-request", b"")
    attempt = re.search(rb"attempt=(\d+)", sent if isinstance(sent, bytes) else sent.encode())
    _meter.add(requests=1, retries=int(attempt is not None and int(attempt[1]) > 1))


def _count_received(count: int) -> None:
    """boto3 calls this as parts arrive; it takes back what it fetches again, which came over the network all the same."""
    _meter.add(bytes_received=max(count, 0))


def _status(error: Any) -> int:
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def _attempts(error: Any) -> int:
    """How often the request was sent until this answer."""
    retries: int = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
    return retries + 1


# Errors in words


def _cause(error: BaseException) -> BaseException:
    """What happened; boto3's and s3transfer's own errors keep it only beside them."""
    beside = getattr(error, "last_exception", None) or error.__context__
    return beside if isinstance(error, (Boto3Error, S3DownloadFailedError)) and beside else error


def _is_lost_upload(error: Boto3Error) -> bool:
    """Whether a multipart upload is gone: some stores say so when its completion is asked for again after a lost answer."""
    cause = _cause(error)
    return isinstance(cause, ClientError) and cause.response.get("Error", {}).get("Code") == "NoSuchUpload"


@contextlib.contextmanager
def _explained(location: str, key: str, operation: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ClientError, BotoCoreError, Boto3Error, S3DownloadFailedError) as error:
        kind, words = _reason(_cause(error))
        raise kind(f"{location}: {operation} failed for {key or 'the whole store'}: {words}") from error


def _one_line(value: object) -> str:
    """A message without line breaks, and without the `user:password@` that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//***@", " ".join(str(value).split()))


def _reason(error: BaseException) -> tuple[type[StorageError], str]:
    """The class of a failure, and cause with way out in one line."""
    said = _one_line(error)
    if isinstance(error, ClientError):
        return _s3_reason(error)
    if isinstance(error, NoCredentialsError):
        return StorageError, "no AWS credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, (PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)):
        return StorageError, f"no usable AWS credentials ({said}). Correct AWS_PROFILE, or the keys in the environment"
    if isinstance(error, (EndpointConnectionError, HTTPClientError)):
        return (
            StorageError,
            f"the endpoint does not answer ({said}). Check AWS_ENDPOINT_URL, region and network, then run again",
        )
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return MissingObject, f"no such file ({error.filename}). Check the path, or run the step that writes it"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return DeniedObject, f"permission denied ({said}). Give this user access to the folder, or choose another"
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError, f"no space left ({said}). Free some, or choose another store; finished work is kept"
    return StorageError, f"{type(error).__name__}: {said}"


_PERMISSIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
}
_REFUSED_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "RequestExpired",
}
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


def _s3_reason(error: Any) -> tuple[type[StorageError], str]:
    answer, status, operation = error.response.get("Error", {}), _status(error), error.operation_name
    code = answer.get("Code", "")
    reads = operation in {"GetObject", "HeadObject"}
    if code == "NoSuchBucket":
        return StorageError, "no such bucket. Create it, or correct the address"
    if code in _REFUSED_KEYS:
        return (
            StorageError,
            f"the credentials are refused ({code}). Renew the key, secret or token, and check the clock",
        )
    if code in _OTHER_REGION or status == 301:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = answer.get("Region") or headers.get("x-amz-bucket-region")
        where = f"AWS_DEFAULT_REGION={region}" if region else "AWS_DEFAULT_REGION to the bucket's region"
        return StorageError, f"the bucket is in another region than the request ({code or status}). Set {where}"
    if status == 404 and reads:
        return MissingObject, "no such object. Check the address, or run the step that writes it"
    if status == 403:
        permission = _PERMISSIONS.get(operation, f"s3:{operation}")
        place = "the bucket" if permission == "s3:ListBucket" else "it"
        hint = ", and s3:ListBucket on the bucket: without it a missing object is refused, too" if reads else ""
        return DeniedObject, f"access denied ({operation}). Grant {permission} on {place}{hint}"
    if status == 412 and reads:
        return StorageError, "the object was replaced while it was read. Run the same command again"
    if status == 416:
        return StorageError, "it ends before that. It is cut off; write it anew"
    if status == 501:
        return StorageError, "the store does not know this request (501): it must support `If-None-Match: *` on put"
    if status == 429 or status >= 500:
        return (
            StorageError,
            f"the store is overloaded or unwell ({code or status}), in {_attempts(error)} attempts. Run the same command "
            "again later, with fewer workers, or with a higher AWS_MAX_ATTEMPTS",
        )
    return StorageError, f"{code or status}: {_one_line(error)}"
