"""What a disk or a bucket said, in one line that names cause and way out. No message holds a key, secret or token."""

import contextlib
import errno
import re
from collections.abc import Iterator
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from s3transfer.exceptions import S3DownloadFailedError

from pipeline.errors import StorageError
from pipeline.storage.store import DeniedObject, MissingObject


def status_of(error: Any) -> int:
    """HTTP status of a refused request; 0: there is none."""
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def attempts_of(error: Any) -> int:
    """How often the request was sent until this answer."""
    retries: int = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
    return retries + 1


def _cause(error: BaseException) -> BaseException:
    """What happened; boto3's and s3transfer's own errors keep it only beside them."""
    beside = getattr(error, "last_exception", None) or error.__context__
    return beside if isinstance(error, (Boto3Error, S3DownloadFailedError)) and beside else error


def is_lost_upload(error: Boto3Error | ClientError) -> bool:
    """Whether a multipart upload is gone: some stores say so when its completion is asked for again after a lost answer."""
    cause = _cause(error)
    return isinstance(cause, ClientError) and cause.response.get("Error", {}).get("Code") == "NoSuchUpload"


@contextlib.contextmanager
def explained(location: str, key: str, operation: str) -> Iterator[None]:
    """Turns what disk and bucket raise into a StorageError that names store, key, operation and way out."""
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
    answer, status, operation = error.response.get("Error", {}), status_of(error), error.operation_name
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
            f"the store is overloaded or unwell ({code or status}), in {attempts_of(error)} attempts. Run the same command "
            "again later, with fewer workers, or with a higher AWS_MAX_ATTEMPTS",
        )
    return StorageError, f"{code or status}: {_one_line(error)}"
