"""MLflow's address, its client, and clear errors when it cannot be used.

Importing mlflow takes seconds, so the functions that need it import it; it reads its settings from the environment at
import, so `client_of` sets them just before. Errors: TrackingError when the server or database cannot be used."""

import contextlib
import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import PipelineError, TrackingError, WrongTrackingAddress
from pipeline.tracking.database import create_database, sqlite_address, sqlite_file
from pipeline.tracking.mlflow_format import redact_text

log = logging.getLogger(__name__)
_ANSWER_TRIES, _ANSWER_S, _ANSWER_PAUSE_S = 2, 20.0, 1.0
NO_TRACKING = "none"
"""The word in place of an address with which a run keeps no runs in MLflow, and does not import it."""
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # with the default of 7, four minutes pass before a dead server is reported
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; 120 by default
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # at INFO, a new database is announced table by table
}


def resolve_tracking_uri(configured: str | None, *, store_uri: str) -> str:
    """Return MLflow's address: the configured one, or MLFLOW_TRACKING_URI, or a SQLite file. Empty for the word `none`.

    The file lies in the store if that is a local folder, otherwise under `./.mae/`. Relative SQLite paths become absolute,
    because workers and `mae ui` start in other directories."""
    chosen = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        folder = local_folder(store_uri)
        database = ((folder or Path(".mae")) / "mlflow.db").absolute()
        if folder is None:
            log.warning(
                "the store is a bucket and tracking.uri is not set: MLflow's runs are kept here, in %s", database
            )
        return sqlite_address(database)
    if chosen == NO_TRACKING:
        return ""
    file = sqlite_file(chosen)
    if file is None:
        return chosen
    _, separator, options = chosen.partition("?")
    return sqlite_address(file.absolute()) + separator + options


def check_tracking(uri: str) -> None:
    """Open the tracking store, and create it if it is new, so that a wrong address fails before any work is done."""
    _check_address(uri)
    # a server has a database of its own; only a file is created here
    if database := sqlite_file(uri):
        _check_writable(database)
        with translate_errors(uri, "creating the database"):
            _set_defaults()
            create_database(database, artifacts=str(artifact_location(uri)))
    elif uri.startswith("http"):
        _await_answer(uri)
    with translate_errors(uri, "connecting"):
        # the cheapest call that needs tables and permissions
        client_of(uri).search_experiments(max_results=1)


def _check_address(uri: str) -> None:
    """Refuse what cannot be an address of MLflow, before MLflow or a database driver waits for it."""
    shown, way_out = (
        redact_text(uri),
        "write http://host:port of an MLflow server, or sqlite:///<absolute path>/mlflow.db",
    )
    try:
        parts = urlsplit(uri)
        port = parts.port  # parsed on access: ValueError if it is no number
    except ValueError as cause:
        raise WrongTrackingAddress(f"tracking address {shown!r} is not an address ({cause}): {way_out}") from cause
    if parts.scheme in {"", "file"}:
        raise WrongTrackingAddress(
            f"tracking address {shown!r} is a folder, which MLflow no longer supports: {way_out}"
        )
    if parts.scheme in {"http", "https"} and (not parts.hostname or port == 0):
        raise WrongTrackingAddress(f"tracking address {shown!r} names no host or port: {way_out}")
    if parts.scheme.partition("+")[0] == "sqlite" and (sqlite_file(uri) or Path()).name in {"", ":memory:"}:
        raise WrongTrackingAddress(f"tracking address {shown!r} names no file: {way_out}")
    artifact_location(uri)


def _await_answer(uri: str) -> None:
    """Return once the server has answered anything; raise TrackingError within three quarters of a minute if it does not.

    Importing MLflow takes seconds, and its own retries multiply its limits. Certificates are left to MLflow, which has settings
    for them."""
    parts = urlsplit(uri)
    # urllib takes `user:password@` for part of the host's name
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    for tries_left in reversed(range(_ANSWER_TRIES)):
        try:
            urllib.request.urlopen(address, timeout=_ANSWER_S).close()  # noqa: S310 - http or https
        # any answer will do, even 401 or 404: a server is there
        except (urllib.error.HTTPError, http.client.HTTPException):
            return
        except OSError as cause:  # URLError is one
            if isinstance(getattr(cause, "reason", cause), ssl.SSLError):
                return
            if not tries_left:
                raise TrackingError(
                    f"MLflow at {redact_text(uri)} does not answer ({root_cause(cause)}). {_way_out(uri, '')}"
                ) from cause
            time.sleep(_ANSWER_PAUSE_S)
        else:
            return


def _check_writable(database: Path) -> None:
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        target = database if database.exists() else database.parent
    except OSError as cause:
        raise WrongTrackingAddress(
            f"tracking database {database}: its folder cannot be created ({cause}). Choose another path"
        ) from cause
    if database.is_dir():
        raise WrongTrackingAddress(
            f"tracking database {database} is a folder. Write the path of a file, such as mlflow.db"
        )
    if not os.access(target, os.W_OK):
        raise WrongTrackingAddress(
            f"tracking database {database}: {target} is not writable. Choose another path, or give this user access"
        )


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its files: beside a SQLite database, or None where a server decides.

    By default MLflow would write them to `./mlruns` in whatever directory the process was started in."""
    database = sqlite_file(uri)
    if database:
        folder = database.absolute().parent / "mlartifacts"
        # MLflow takes a plain path for part of an address; where that would not give the path back, it must be quoted
        return str(folder) if quote(str(folder)) == str(folder) else folder.as_uri()
    if urlsplit(uri).scheme not in {"http", "https", "databricks", "databricks-uc", "uc"}:
        raise WrongTrackingAddress(
            f"tracking address {redact_text(uri)} is neither an MLflow server nor a SQLite file, and a bare database has no place "
            "for artifacts: use http://host:port or sqlite:///<absolute path>/mlflow.db"
        )
    return None


def local_folder(uri: str) -> Path | None:
    """Return the folder behind a path or a file:// address, or None for any other address."""
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def client_of(uri: str) -> Any:
    """Return MLflow's client for an address.

    Global effects: MLflow's environment variables get our defaults where unset, and urllib3's retry warnings are silenced."""
    _set_defaults()
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry of every call
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _set_defaults() -> None:
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


def root_cause(error: BaseException) -> str:
    """Return the message of the innermost error: "Connection refused" rather than three layers of retries around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return redact_text(" ".join(str(error).split()))[:300]


@contextlib.contextmanager
def translate_errors(uri: str, action: str) -> Iterator[None]:
    """Turn whatever MLflow, SQLAlchemy or requests raise into a TrackingError that names address, action and way out."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as cause:
        message = root_cause(cause)
        raise TrackingError(
            f"MLflow at {redact_text(uri)}: {action} failed ({message}). {_way_out(uri, message)}"
        ) from cause


def _way_out(uri: str, message: str) -> str:
    """Return what to do about a failure: no more than its message shows."""
    if re.search(r"\b403\b", message):
        return "The server refuses this host name: start it with --allowed-hosts"
    if "SSL" in message or "certificate" in message:
        return "Check http:// or https:// in the address, and the server's certificate"
    if uri.startswith("http"):
        return "Check that the server is up and the address is right"
    if "locked" in message:
        return "Another process keeps it locked: end that process, or wait for it, and run the same command again"
    if "unable to open" in message or "readonly" in message:
        return "Check that the path is right and writable"
    return "See the message for the way out; another path in tracking.uri begins a new database"
