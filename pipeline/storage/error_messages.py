"""One-line messages for failures of a disk: the cause and the way out. Those of a bucket are in s3_error_messages.py."""

import contextlib
import errno
import re
from collections.abc import Iterator

from pipeline.errors import StorageError
from pipeline.storage.store import DeniedObject, MissingObject


@contextlib.contextmanager
def translate_errors(location: str, key: str, operation: str) -> Iterator[None]:
    """Turn errors of the disk into a StorageError that names store, operation, key, cause and way out."""
    try:
        yield
    except OSError as error:
        error_class, message = explain(error)
        raise error_class(f"{location}: {operation} failed for {key or 'the whole store'}: {message}") from error


def one_line(value: object) -> str:
    """Return a message without line breaks and without the `user:password@` that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//***@", " ".join(str(value).split()))


def explain(error: BaseException) -> tuple[type[StorageError], str]:
    """Return the class to raise, and the cause with the way out in one line."""
    detail = one_line(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return MissingObject, f"no such file ({error.filename}). Check the path, or run the step that writes it"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return DeniedObject, f"permission denied ({detail}). Give this user access to the folder, or choose another one"
    if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}:
        return (
            StorageError,
            f"no space left ({detail}). Free some space, or choose another store; finished work is kept",
        )
    return StorageError, f"{type(error).__name__}: {detail}"
