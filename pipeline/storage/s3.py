"""A bucket, or a prefix of one, as an object store, with boto3's transfers and retries (connection.py).

Put-if-absent is `If-None-Match: *`. Three things boto3 does not retry are retried here: a conflict of simultaneous creates,
a response body that breaks off, and an upload that the store has forgotten. Each has a fixed number of tries, and the last
error is raised. Errors: see store.py."""

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from pipeline.storage.connection import client, count_received
from pipeline.storage.files import MemoryFile
from pipeline.storage.s3_error_messages import attempts_of, is_lost_upload, status_of, translate_errors
from pipeline.storage.store import ObjectInfo, Traffic, checked_key, checked_length, temporary_beside
from pipeline.storage.traffic import traffic_meter

_CONFLICT_TRIES = 5
_READ_TRIES = 4
_UPLOAD_TRIES = 2
_PART_BYTES = 16 * 2**20
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES,
    multipart_chunksize=_PART_BYTES,
    max_concurrency=8,
    preferred_transfer_client="classic",  # the one in C hangs in a process forked after its first use
)
_CREATED_BY = "mae-created-by"
"""Metadata key under which a `create` leaves its mark, to recognise its own object."""


@dataclass(frozen=True)
class S3Store:
    """A bucket, or the part of it below a prefix."""

    bucket: str
    prefix: str = ""

    @property
    def uri(self) -> str:
        """The address, `s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def traffic(self) -> Traffic:
        """See Store."""
        return traffic_meter.read()

    def read(self, key: str) -> bytes:
        """See Store."""
        with translate_errors(self.uri, key, "read"):
            return self._get(self._name(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        # HTTP's ranges name their last byte, so an empty one cannot be written
        if length == 0:
            return b""
        with translate_errors(self.uri, key, f"read of bytes {start} to {start + length}"):
            data = self._get(self._name(key), Range=f"bytes={start}-{start + length - 1}")
        return checked_length(self.uri, key, start, length, data)

    def write(self, key: str, data: bytes | memoryview) -> None:
        """See Store. Data larger than one part goes up in parallel parts, since a single PUT may hold at most 5 GiB."""
        with translate_errors(self.uri, key, "write"):
            if len(data) <= _PART_BYTES:
                # boto3 takes no memoryview; what is copied is at most one part
                client().put_object(Bucket=self.bucket, Key=self._name(key), Body=bytes(data))
                return
            self._in_parts(
                lambda: client().upload_fileobj(MemoryFile(data), self.bucket, self._name(key), Config=_TRANSFER)
            )

    def create(self, key: str, data: bytes) -> bool:
        """See Store. A lost answer makes boto3 repeat the request, and the 412 it then gets may be due to our own object.

        Each call therefore marks its object, and reads the mark back when a repeated request fails with 412."""
        name, mark = self._name(key), uuid.uuid4().hex
        condition = {"IfNoneMatch": "*", "Metadata": {_CREATED_BY: mark}}
        asked_before = False
        with translate_errors(self.uri, key, "create"):
            for tries_left in reversed(range(_CONFLICT_TRIES)):
                try:
                    client().put_object(Bucket=self.bucket, Key=name, Body=data, **condition)
                except ClientError as error:
                    status = status_of(error)
                    asked_before = asked_before or attempts_of(error) > 1
                    # a 412 counts as foreign unless this call may have sent the object before
                    if status == 412:
                        return asked_before and self._is_ours(name, mark, data)
                    if status != 409 or not tries_left:  # 409: another create of this key is under way
                        raise
                    # longer from try to try, and random, or those in conflict would meet again
                    time.sleep(random.uniform(0.05, 0.2) * (_CONFLICT_TRIES - tries_left))  # noqa: S311
                else:
                    return True
        raise AssertionError("the last try returns or raises")

    def exists(self, key: str) -> bool:
        """See Store."""
        with translate_errors(self.uri, key, "existence check"):
            try:
                client().head_object(Bucket=self.bucket, Key=self._name(key))
            except ClientError as error:
                # HEAD has no body, so there is no error code to ask for
                if status_of(error) == 404:
                    return False
                raise
            return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store. Skips keys that end in `/`, which consoles create to mark folders."""
        base = f"{self.prefix}/" if self.prefix else ""
        with translate_errors(self.uri, prefix, "list"):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                # a page without a match has no Contents
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):
                        yield ObjectInfo(item["Key"][len(base) :], item["Size"])

    def delete(self, key: str) -> None:
        """See Store."""
        with translate_errors(self.uri, key, "delete"):
            client().delete_object(Bucket=self.bucket, Key=self._name(key))

    def upload(self, key: str, path: Path) -> None:
        """See Store."""
        with translate_errors(self.uri, key, f"upload of {path}"):
            self._in_parts(lambda: client().upload_file(str(path), self.bucket, self._name(key), Config=_TRANSFER))

    def download(self, key: str, path: Path) -> None:
        """See Store."""
        with translate_errors(self.uri, key, f"download to {path}"), temporary_beside(path) as temporary:
            client().download_file(
                self.bucket, self._name(key), str(temporary), Config=_TRANSFER, Callback=count_received
            )
            temporary.replace(path)

    def at(self, prefix: str) -> "S3Store":
        """See Store."""
        return S3Store(self.bucket, self._name(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        """See Store."""
        return None

    def _name(self, key: str) -> str:
        return f"{self.prefix}/{checked_key(self.uri, key)}" if self.prefix else checked_key(self.uri, key)

    def _in_parts(self, upload: Callable[[], object]) -> None:
        """Upload, and repeat that once if the store has forgotten an upload whose completion it did not answer."""
        for tries_left in reversed(range(_UPLOAD_TRIES)):
            try:
                upload()
            except (Boto3Error, ClientError) as error:
                if not tries_left or not is_lost_upload(error):
                    raise
                traffic_meter.add(retries=1)
            else:
                return

    def _get(self, name: str, **options: str) -> bytes:
        return self._get_object(name, **options)[0]

    def _get_object(self, name: str, **options: str) -> tuple[bytes, Mapping[str, str]]:
        """Return an object's bytes and metadata. botocore retries the request, but not a body that breaks off."""
        for tries_left in reversed(range(_READ_TRIES)):
            answer = client().get_object(Bucket=self.bucket, Key=name, **options)
            try:
                data: bytes = answer["Body"].read()
            except BotoCoreError:
                if not tries_left:
                    raise
                traffic_meter.add(retries=1)
                time.sleep(random.uniform(0.1, 0.3) * (_READ_TRIES - tries_left))  # noqa: S311
            else:
                traffic_meter.add(bytes_received=len(data))
                return data, answer["Metadata"]
        raise AssertionError("the last try returns or raises")

    def _is_ours(self, name: str, mark: str, data: bytes) -> bool:
        """Return whether the object under this name is the one that this call of `create` sent."""
        try:
            found, metadata = self._get_object(name)
        except ClientError as error:
            if status_of(error) == 404:  # created, and deleted since
                return False
            raise
        found_mark = metadata.get(_CREATED_BY)
        return found == data if found_mark is None else found_mark == mark  # some stores drop metadata
