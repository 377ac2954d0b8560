"""One-line messages for failures of a bucket: the cause and the way out, never a key, secret or token."""

import contextlib
from collections.abc import Iterator
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointConnectionError,
    EndpointResolutionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from s3transfer.exceptions import S3DownloadFailedError

from pipeline.errors import StorageError, WrongStoreAddress
from pipeline.storage.error_messages import explain, one_line
from pipeline.storage.store import DeniedObject, MissingObject


def status_of(error: Any) -> int:
    """Return the HTTP status of a refused request, or 0 if there is none."""
    status: int = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def attempts_of(error: Any) -> int:
    """Return how many times the request was sent before this answer."""
    retries: int = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
    return retries + 1


def _cause(error: BaseException) -> BaseException:
    """Return the underlying error: boto3 and s3transfer raise errors of their own and do not chain it with `from`."""
    underlying = getattr(error, "last_exception", None) or error.__context__
    return underlying if isinstance(error, (Boto3Error, S3DownloadFailedError)) and underlying else error


def is_lost_upload(error: Boto3Error | ClientError) -> bool:
    """Return whether the store no longer knows a multipart upload.

    Some stores answer so when a completion is repeated because the first answer was lost."""
    cause = _cause(error)
    return isinstance(cause, ClientError) and cause.response.get("Error", {}).get("Code") == "NoSuchUpload"


@contextlib.contextmanager
def translate_errors(location: str, key: str, operation: str) -> Iterator[None]:
    """Turn errors of the bucket or the local disk into a StorageError that names store, operation, key, cause and way out."""
    try:
        yield
    except (OSError, ClientError, BotoCoreError, Boto3Error, S3DownloadFailedError) as error:
        error_class, message = _explain_failure(_cause(error))
        raise error_class(f"{location}: {operation} failed for {key or 'the whole store'}: {message}") from error


def _explain_failure(error: BaseException) -> tuple[type[StorageError], str]:
    """Return the class to raise, and the cause with the way out in one line."""
    detail = one_line(error)
    if isinstance(error, ClientError):
        return _explain_refusal(error)
    if isinstance(error, NoCredentialsError):
        return StorageError, "no AWS credentials found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, (PartialCredentialsError, CredentialRetrievalError, ProfileNotFound)):
        return StorageError, f"no usable AWS credentials ({detail}). Correct AWS_PROFILE or the keys in the environment"
    if isinstance(error, EndpointResolutionError):  # botocore parses the endpoint for good with the first request
        return WrongStoreAddress, f"{detail}. Set AWS_ENDPOINT_URL to http://host:port or https://host"
    if isinstance(error, SSLError):
        return (
            StorageError,
            f"the endpoint's TLS failed ({detail}). Check http:// or https:// in AWS_ENDPOINT_URL, and AWS_CA_BUNDLE "
            "where the certificate is your own",
        )
    if isinstance(error, (EndpointConnectionError, HTTPClientError)):
        return (
            StorageError,
            f"the endpoint does not answer ({detail}). Check AWS_ENDPOINT_URL, the region and the network, "
            "then run the same command again",
        )
    return explain(error)


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
_CREDENTIALS_REFUSED = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "RequestTimeTooSkewed",
    "RequestExpired",
}
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


def _explain_refusal(error: Any) -> tuple[type[StorageError], str]:
    answer, status, operation = error.response.get("Error", {}), status_of(error), error.operation_name
    code = answer.get("Code", "")
    reads = operation in {"GetObject", "HeadObject"}
    if code == "NoSuchBucket":
        return WrongStoreAddress, "no such bucket. Create it, or correct the address"
    if code in _CREDENTIALS_REFUSED:
        return (
            StorageError,
            f"the credentials are refused ({code}). Renew the key, secret or token, and check this machine's clock",
        )
    if code in _OTHER_REGION or status == 301:
        # HEAD has no body to name the region in, only this header
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = answer.get("Region") or headers.get("x-amz-bucket-region")
        setting = f"AWS_DEFAULT_REGION={region}" if region else "AWS_DEFAULT_REGION to the bucket's region"
        return StorageError, f"the bucket is in another region ({code or status}). Set {setting}"
    if status == 404 and reads:
        return MissingObject, "no such object. Check the address, or run the step that writes it"
    if status == 403:
        permission = _PERMISSIONS.get(operation, f"s3:{operation}")
        resource = "the bucket" if permission == "s3:ListBucket" else "the object"
        # S3 tells a missing object from a forbidden one only to those who may list the bucket
        hint = ", and s3:ListBucket on the bucket: without it, a missing object is reported as denied" if reads else ""
        return DeniedObject, f"access denied ({operation}). Grant {permission} on {resource}{hint}"
    if status == 412 and reads:
        return StorageError, "the object was replaced while it was being read. Run the same command again"
    if status == 416:
        return StorageError, "the object ends before that: it is truncated. Delete it and rerun the step that writes it"
    if status == 501:
        return (
            StorageError,
            "the store does not implement this request (501): it must support `If-None-Match: *` on PUT",
        )
    if status == 429 or status >= 500:
        return (
            StorageError,
            f"the store is overloaded or unhealthy ({code or status}) after {attempts_of(error)} attempts. "
            "Run the same command again later, with fewer workers, or with a higher AWS_MAX_ATTEMPTS",
        )
    return StorageError, f"{code or status}: {one_line(error)}"
