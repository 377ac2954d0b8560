"""MLflow's address, its client, and clear errors when it cannot be used.

Importing mlflow takes seconds, so the functions that need it import it; it reads its settings from the environment at
import, so `client_of` sets them just before. Errors: TrackingError when the server or database cannot be used."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError
from pipeline.tracking.mlflow_format import redact_text

MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # with the default of 7, four minutes pass before a dead server is reported
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; 120 by default
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # at INFO, a new database is announced table by table
}


class TrackingError(PipelineError):
    """MLflow's server or database cannot be reached, or refuses.

    Once `check_tracking` has passed, callers log this error as a warning instead of failing the run."""


def resolve_tracking_uri(configured: str | None, *, store_uri: str) -> str:
    """Return MLflow's address: the configured one, or MLFLOW_TRACKING_URI, or a SQLite file.

    The file lies in the store if that is a local folder, otherwise under `./.mae/`. Relative SQLite paths become absolute,
    because workers and `mae ui` start in other directories."""
    chosen = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        folder = _local_folder(store_uri) or Path.cwd() / ".mae"
        return f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    database = sqlite_file(chosen)
    return chosen.replace(f":///{database}", f":///{database.absolute()}") if database else chosen


def check_tracking(uri: str) -> None:
    """Open the tracking store, and create it if it is new, so that a wrong address fails before any work is done."""
    if urlsplit(uri).scheme in {"", "file"}:
        raise TrackingError(
            f"tracking address {redact_text(uri)!r} is a folder, which MLflow no longer supports: "
            "use sqlite:///<absolute path>/mlflow.db"
        )
    database = sqlite_file(uri)
    if database:
        _check_writable(database)
    with translate_errors(uri, "connecting"):
        client_of(uri).search_experiments(max_results=1)


def _check_writable(database: Path) -> None:
    target = database if database.exists() else database.parent
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise TrackingError(
            f"tracking database {database}: its folder cannot be created ({cause}). Choose another path"
        ) from cause
    if not os.access(target, os.W_OK):
        raise TrackingError(
            f"tracking database {database}: {target} is not writable. Choose another path, or give this user access"
        )


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its files: beside a SQLite database, or None where a server decides.

    By default MLflow would write them to `./mlruns` in whatever directory the process was started in."""
    database = sqlite_file(uri)
    if database:
        return str(database.absolute().parent / "mlartifacts")
    if urlsplit(uri).scheme not in {"http", "https", "databricks"}:
        raise TrackingError(
            f"tracking address {redact_text(uri)} is a bare database, which has no place for artifacts: "
            "use an MLflow server (http://host:port) or a SQLite file (sqlite:///path)"
        )
    return None


def _local_folder(uri: str) -> Path | None:
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def sqlite_file(uri: str) -> Path | None:
    """Return the file behind a SQLite address, or None for any other address."""
    prefix, found, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if found and prefix.startswith("sqlite") else None


def client_of(uri: str) -> Any:
    """Return MLflow's client for an address.

    Global effects: MLflow's environment variables get our defaults where unset, and urllib3's retry warnings are silenced."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry of every call
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


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
        hint = "Check that the path is right and writable"
        if uri.startswith("http"):
            hint = "Check that the server is up and the address is right"
        if re.search(r"\b403\b", message):
            hint = "The server refuses this host name: start it with --allowed-hosts"
        raise TrackingError(f"MLflow at {redact_text(uri)}: {action} failed ({message}). {hint}") from cause
