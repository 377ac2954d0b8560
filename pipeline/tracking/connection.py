"""Where MLflow is, how it is reached, and what it says when it cannot be. The one place that makes its client.

Errors: TrackingError when the server or database cannot be used.
Importing mlflow takes seconds, so functions import it; the settings it reads at import are set just before."""

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
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 takes four minutes to say that a server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; 120 by default
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # or a new database is announced table by table
}


class TrackingError(PipelineError):
    """MLflow's server or database cannot be reached, or refuses. After `check_tracking` passed, a warning is answer enough."""


def resolve_tracking_uri(configured: str | None, *, store_uri: str) -> str:
    """The configured address, else MLFLOW_TRACKING_URI, else a SQLite file in the local store, else one under `./.mae/`.

    Relative SQLite paths become absolute: workers and `mae ui` start in other directories."""
    chosen = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        folder = _local_folder(store_uri) or Path.cwd() / ".mae"
        return f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    database = sqlite_file(chosen)
    return chosen.replace(f":///{database}", f":///{database.absolute()}") if database else chosen


def check_tracking(uri: str) -> None:
    """Opens (and, when new, creates) the tracking store, so that a wrong address is answered before any work is done."""
    if urlsplit(uri).scheme in {"", "file"}:
        raise TrackingError(
            f"tracking {redact_text(uri)!r} is a folder, which MLflow no longer writes: use sqlite:///<absolute path>/mlflow.db"
        )
    database = sqlite_file(uri)
    if database:
        _check_writable(database)
    with clear_errors(uri, "opening it"):
        client_of(uri).search_experiments(max_results=1)


def _check_writable(database: Path) -> None:
    target = database if database.exists() else database.parent
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise TrackingError(f"tracking database {database}: its folder cannot be made ({cause})") from cause
    if not os.access(target, os.W_OK):
        raise TrackingError(f"tracking database {database}: {target} is not writable; choose another path or its owner")


def artifact_location(uri: str, artifact_root: str | None) -> str | None:
    """Where a new experiment keeps its files: beside a SQLite database, as the server says, else where the caller says.

    Left to itself MLflow would write `./mlruns` into whatever directory the process was started in."""
    database = sqlite_file(uri)
    if artifact_root or database is None:
        if not artifact_root and urlsplit(uri).scheme not in {"http", "https", "databricks"}:
            raise TrackingError(
                f"tracking {redact_text(uri)} is a bare database: say where artifacts go, or use a server"
            )
        return artifact_root
    return str(database.absolute().parent / "mlartifacts")


def _local_folder(uri: str) -> Path | None:
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def sqlite_file(uri: str) -> Path | None:
    """The file behind a SQLite address; None for any other."""
    prefix, found, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if found and prefix.startswith("sqlite") else None


def client_of(uri: str) -> Any:
    """MLflow's client for one address; sets nothing global but the defaults of its environment variables."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces each retry of each call
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def words_of(error: BaseException) -> str:
    """What went wrong at the bottom: "Connection refused" rather than three layers of retries around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return redact_text(" ".join(str(error).split()))[:300]


@contextlib.contextmanager
def clear_errors(uri: str, doing: str) -> Iterator[None]:
    """Turns whatever MLflow, SQLAlchemy or requests raise into one sentence that names the address and the way out."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as cause:
        words = words_of(cause)
        hint = (
            "is the server up, and the address right?" if uri.startswith("http") else "is the path right and writable?"
        )
        if re.search(r"\b403\b", words):
            hint = "the server refuses this host name: start it with --allowed-hosts"
        raise TrackingError(f"tracking {redact_text(uri)}: {doing} failed ({words}); {hint}") from cause
