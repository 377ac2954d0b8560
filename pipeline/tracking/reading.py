"""Read runs back from MLflow: parents with their tags and metrics, and the steps that they lead to.

A SQLite file is read as the database that it is, in half a second for 1,000 runs: importing mlflow alone takes longer. Servers, and
searches in MLflow's own language, go through its client, a thousand runs per call.
Errors: TrackingError."""

import contextlib
import math
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import TrackingError, WrongTrackingAddress
from pipeline.tracking.connection import client_of, translate_errors
from pipeline.tracking.database import sqlite_file
from pipeline.tracking.mlflow_format import chunks
from pipeline.tracking.names import RUN_TAG

PAGE = 1000
"""Runs per call of MLflow's search."""
_IDS_PER_QUERY = 500
_ALL_PARENTS = f"tags.`{RUN_TAG}` LIKE '%'"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as MLflow keeps it."""

    run_id: str
    name: str
    status: str
    start_ms: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each."""
    params: Mapping[str, str] = field(default_factory=dict)


def parents_in(uri: str, *, query: str = "") -> list[TrackedRun]:
    """Return the parent runs, newest first, without their parameters; `query` is a search in MLflow's language."""
    file = sqlite_file(uri)
    if file and not query:
        with _opened(uri) as connection:
            ids = [row[0] for row in connection.execute("SELECT run_uuid FROM tags WHERE key = ?", (RUN_TAG,))]
            return _newest_first(_from_database(connection, ids, tables=("tags", "latest_metrics")))
    with translate_errors(uri, f"searching for runs with {query!r}" if query else "reading the runs"):
        client = client_of(uri)
        wanted = f"{_ALL_PARENTS} AND {query}" if query else _ALL_PARENTS
        experiments = [one.experiment_id for one in _pages(client.search_experiments)]
        return _newest_first([_tracked(run) for run in _pages(client.search_runs, experiments, filter_string=wanted)])


def runs_by_id(uri: str, ids: Collection[str]) -> dict[str, TrackedRun]:
    """Return runs of any kind by their ids, with parameters. Those that MLflow does not have are left out."""
    if not ids:
        return {}
    if sqlite_file(uri):
        with _opened(uri) as connection:
            found = _from_database(connection, list(ids), tables=("tags", "latest_metrics", "params"))
            return {run.run_id: run for run in found}
    with translate_errors(uri, "reading runs by their ids"):
        client = client_of(uri)
        experiments = [one.experiment_id for one in _pages(client.search_experiments)]
        kept: dict[str, TrackedRun] = {}
        for some in chunks(sorted(ids), 50):  # a search is at most 10,000 characters
            listed = ", ".join(f"'{run_id}'" for run_id in some)
            query = f"attributes.run_id IN ({listed})"
            kept |= {
                run.run_id: run for run in map(_tracked, _pages(client.search_runs, experiments, filter_string=query))
            }
        return kept


def _pages(search: Any, *args: Any, **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*args, **options, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tracked(run: Any) -> TrackedRun:
    return TrackedRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        start_ms=run.info.start_time,
        tags=run.data.tags,
        metrics=run.data.metrics,
        params=run.data.params,
    )


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[sqlite3.Connection]:
    database = sqlite_file(uri)
    if database is None or not database.exists():
        raise WrongTrackingAddress(
            f"there is no tracking database {database}, so no run is recorded there. Name another with --tracking, or give the "
            "store of a run"
        )
    try:
        # ro: a reader must not create the file, nor its journal
        with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            yield connection
    except sqlite3.Error as cause:
        raise TrackingError(
            f"tracking database {database} cannot be read as MLflow's ({cause}). If its version is another than this one's, start "
            "`mlflow server` over it and name its address with --tracking"
        ) from cause


def _from_database(connection: sqlite3.Connection, ids: Sequence[str], *, tables: Sequence[str]) -> list[TrackedRun]:
    """Read runs that are not deleted. Few ids are looked up; for many, whole tables are read, which is faster."""
    found: list[TrackedRun] = []
    for some in chunks(ids, _IDS_PER_QUERY):
        marks = ", ".join("?" * len(some))
        rows = connection.execute(
            f"SELECT run_uuid, name, status, start_time FROM runs WHERE lifecycle_stage = 'active' AND run_uuid IN ({marks})",  # noqa: S608
            some,
        )
        values = {table: _values(connection, table, some) for table in tables}
        for run_id, name, status, start_ms in rows:
            tags, metrics, params = (
                values.get(table, {}).get(run_id, {}) for table in ("tags", "latest_metrics", "params")
            )
            found.append(
                TrackedRun(
                    run_id=run_id,
                    name=name or "",
                    status=status,
                    start_ms=start_ms or 0,
                    tags=tags,
                    metrics=metrics,
                    params=params,
                )
            )
    return found


def _values(connection: sqlite3.Connection, table: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return run id -> key -> value of a table of tags, parameters or metrics."""
    marks = ", ".join("?" * len(ids))
    # MLflow stores NaN as 0 with a mark beside it
    not_a_number = "is_nan" if table == "latest_metrics" else "0"
    query = f"SELECT run_uuid, key, value, {not_a_number} FROM {table} WHERE run_uuid IN ({marks})"  # noqa: S608
    found: dict[str, dict[str, Any]] = {}
    for run_id, key, value, is_nan in connection.execute(query, ids):
        found.setdefault(run_id, {})[key] = math.nan if is_nan else value
    return found


def _newest_first(runs: Sequence[TrackedRun]) -> list[TrackedRun]:
    return sorted(runs, key=lambda run: (run.start_ms, run.run_id), reverse=True)
