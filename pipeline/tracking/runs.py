"""The children of a run in MLflow: one for each step, which later attempts find by its fingerprint and resume.

Each child has its `mae.fingerprint`, and each parent names all its children, cached ones included. A rollback opens another child
with the same fingerprint, tagged with the number of rollbacks so far (`mae.rollbacks`) and the step it went back to
(`mae.rolled_back_to`). Errors: TrackingError."""

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.tracking.connection import client_of, translate_errors
from pipeline.tracking.experiments import experiment_named, runs_found
from pipeline.tracking.mlflow_format import mlflow_key, mlflow_tags
from pipeline.tracking.names import (
    FINGERPRINT_TAG,
    LATER_PARENTS_TAG,
    PARENT_TAG,
    ROLLBACKS_TAG,
    ROLLED_BACK_TO_TAG,
    STEP_TAG,
    URI_TAG,
)
from pipeline.tracking.records import log_params, log_tags

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def open_child(
    uri: str,
    *,
    experiment: str,
    parent_run_id: str,
    name: str,
    fingerprint: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> str:
    """Resume the newest run with this fingerprint, or open a new one for the step; return its run id."""
    run_id = find_child(uri, experiment=experiment, fingerprint=fingerprint)
    with translate_errors(uri, f"opening the run of step {name!r}"):
        client = client_of(uri)
        if run_id is None:
            family = {FINGERPRINT_TAG: fingerprint, PARENT_TAG: parent_run_id}
            experiment_id = experiment_named(uri, experiment)
            run_id = str(
                client.create_run(experiment_id, tags=mlflow_tags({**tags, **family}), run_name=name).info.run_id
            )
        else:
            client.update_run(run_id, status="RUNNING")
            log_tags(client, run_id, tags)
    link_child(uri, parent_run_id=parent_run_id, name=name, run_id=run_id)
    log_params(uri, run_id, params)
    return run_id


def find_child(uri: str, *, experiment: str, fingerprint: str) -> str | None:
    """Return the newest run with this fingerprint, in whatever state, or None if there is none.

    The given experiment comes first, then all others: runs on other data may share a benchmark's steps, and before there was an
    experiment for each data set, all of them were in one."""
    with translate_errors(uri, "looking for a step's run"):
        client = client_of(uri)
        query = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
        own = client.get_experiment_by_name(experiment)
        found = runs_found(client, [own.experiment_id], query) if own else []
        if not found:
            found = runs_found(client, [one.experiment_id for one in client.search_experiments()], query)
        return str(found[0].info.run_id) if found else None


def child_after(uri: str, run_id: str, *, rollbacks: int, to_step: int) -> str:
    """Return the child that holds a step's curve after this many rollbacks, creating it if necessary.

    It is the given run or one with the same fingerprint. A new one takes over the tags of the given run, which ends as
    KILLED."""
    with translate_errors(uri, "looking for the run after a rollback"):
        client = client_of(uri)
        given = client.get_run(run_id)
        tags = given.data.tags
        query = f"tags.`{FINGERPRINT_TAG}` = '{tags.get(FINGERPRINT_TAG, '')}'"
        order = ["attributes.start_time DESC"]
        family = [given, *client.search_runs([given.info.experiment_id], filter_string=query, order_by=order)]
        for run in family:
            # a run without the tag is the one before any rollback
            if int(run.data.tags.get(ROLLBACKS_TAG, "0")) == rollbacks:
                return str(run.info.run_id)
        # `mlflow.` tags are MLflow's own (user, source), and a new run gets its own
        kept = {key: value for key, value in tags.items() if not key.startswith("mlflow.") or key == PARENT_TAG}
        added = {ROLLBACKS_TAG: str(rollbacks), ROLLED_BACK_TO_TAG: str(to_step)}
        created = client.create_run(given.info.experiment_id, tags={**kept, **added}, run_name=given.info.run_name)
        client.set_terminated(run_id, status="KILLED")
        return str(created.info.run_id)


def link_child(uri: str, *, parent_run_id: str, name: str, run_id: str, files_uri: str = "") -> None:
    """Tag the parent with a step's run, and tag a run that began under another parent (resumed or cached) with this one.

    `files_uri`: where the finished step's files are; of two stores that have them, the first one stays."""
    with translate_errors(uri, f"linking step {name!r}"):
        client = client_of(uri)
        log_tags(client, parent_run_id, {f"{STEP_TAG}{mlflow_key(name)}": run_id})
        tags = client.get_run(run_id).data.tags
        later = tags.get(LATER_PARENTS_TAG, "").split()
        if tags.get(PARENT_TAG) != parent_run_id and parent_run_id not in later:
            # a tag holds 8000 characters, and an id has 32
            log_tags(client, run_id, {LATER_PARENTS_TAG: " ".join([*later, parent_run_id][-200:])})
        if files_uri and URI_TAG not in tags:
            log_tags(client, run_id, {URI_TAG: files_uri})


def parents_of(uri: str, run_id: str) -> list[str]:
    """Return the ids of the parents that use a step's run, without those that are deleted."""
    with translate_errors(uri, "looking for a step's parents"):
        client = client_of(uri)
        tags = client.get_run(run_id).data.tags
        named = [tags.get(PARENT_TAG, ""), *tags.get(LATER_PARENTS_TAG, "").split()]
        return [parent for parent in named if parent and _is_there(client, parent)]


def _is_there(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def close_run(uri: str, run_id: str, status: RunStatus) -> None:
    """Set a run's final state; a later attempt may resume it."""
    with translate_errors(uri, "closing a run"):
        client_of(uri).set_terminated(run_id, status=status)


def pages_of_children(uri: str, parent_run_id: str) -> dict[str, str]:
    """Return the address of the page of each step's run, by step name, relative to MLflow's own pages."""
    with translate_errors(uri, "looking for the steps' runs"):
        client = client_of(uri)
        tags = client.get_run(parent_run_id).data.tags
        ids = {key.removeprefix(STEP_TAG): run_id for key, run_id in tags.items() if key.startswith(STEP_TAG)}
        return {
            name: f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
            for name, run_id in ids.items()
        }
