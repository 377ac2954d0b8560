"""The parent of a run in MLflow: one for a configuration in a store, however often it is started.

MLflow has no create-if-absent, so a parent is looked for by its tags. Of two drivers that create one at the same moment, both
look again, and the one that came second deletes its own. Errors: TrackingError."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.tracking.connection import client_of, local_folder, translate_errors
from pipeline.tracking.database import sqlite_file
from pipeline.tracking.experiments import experiment_named, runs_found
from pipeline.tracking.mlflow_format import mlflow_tags
from pipeline.tracking.names import ATTEMPT_TAG, ATTEMPTS_TAG, DIGEST_TAG, RUN_TAG, STORE_TAG
from pipeline.tracking.records import log_params, log_tags
from pipeline.tracking.runs import RunStatus


class Parent(NamedTuple):
    """A parent that this driver has opened."""

    run_id: str
    attempt: str
    """Id of this start."""
    ended: tuple[str, int] | None = None
    """Status and time of its end, in ms since 1970, if it had ended when it was found."""


def open_parent(
    uri: str, *, experiment: str, name: str, attempt: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> Parent:
    """Find the parent with the same run, digest and store among its tags, or create it, and set it to RUNNING.

    `attempt`: an id of this start."""
    tags = mlflow_tags(tags)
    with translate_errors(uri, f"opening the run {name!r}"):
        client = client_of(uri)
        experiment_id = experiment_named(uri, experiment)
        found = _find(client, uri, experiment_id, tags)
        if found is None:
            created = client.create_run(experiment_id, tags=tags, run_name=name)
            found = _find(client, uri, experiment_id, tags) or created
            if found.info.run_id != created.info.run_id:
                client.delete_run(created.info.run_id)
        run_id, info = str(found.info.run_id), found.info
        ended = None if info.status in {"RUNNING", "SCHEDULED"} else (str(info.status), int(info.end_time))
        if ended:
            client.update_run(run_id, status="RUNNING")
        starts = int(found.data.tags.get(ATTEMPTS_TAG, "0")) + 1
        log_tags(client, run_id, {**tags, ATTEMPT_TAG: attempt, ATTEMPTS_TAG: str(starts)})
    log_params(uri, run_id, params)
    return Parent(run_id, attempt, ended)


def close_parent(uri: str, parent: Parent, status: RunStatus, *, worked: bool) -> None:
    """Set the final state. If a later start has taken the run over, only that one may say that the run failed or was stopped.

    A start that found nothing to do (`worked` is false) gives the run back the end that it had, so that its duration stays."""
    with translate_errors(uri, "closing the run"):
        client = client_of(uri)
        run = client.get_run(parent.run_id)
        if run.data.tags.get(ATTEMPT_TAG, parent.attempt) != parent.attempt and status != "FINISHED":
            return
        same_end = parent.ended is not None and not worked and parent.ended[0] == status
        ended_at = parent.ended[1] if same_end and parent.ended else None
        client.set_terminated(parent.run_id, status=status, end_time=ended_at)


def _find(client: Any, uri: str, experiment_id: str, tags: Mapping[str, str]) -> Any | None:
    """Return the oldest run with the same name and digest: of the same store or, in a database inside the store, of one that
    is gone.

    The store belongs to the identity because two stores hold two trainings. A folder that was moved is still the same store,
    though, and its database moved with it."""
    query = " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in (RUN_TAG, DIGEST_TAG))
    runs = sorted(runs_found(client, [experiment_id], query), key=lambda run: (run.info.start_time, run.info.run_id))
    same = [run for run in runs if run.data.tags.get(STORE_TAG) == tags[STORE_TAG]]
    if not same and _holds(tags[STORE_TAG], sqlite_file(uri)):
        same = [run for run in runs if not (_folder(run, STORE_TAG) or Path("/")).exists()]
    return same[0] if same else None


def _holds(store_uri: str, database: Path | None) -> bool:
    return database is not None and local_folder(store_uri) == database.parent


def _folder(run: Any, tag: str) -> Path | None:
    return local_folder(run.data.tags.get(tag, ""))
