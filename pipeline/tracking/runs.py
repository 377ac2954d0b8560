"""The family: parent = one pipeline run; child = one step, found again by its fingerprint and resumed by later attempts.

Tags:   `mae.fingerprint` on a child; every parent names all its children, cached ones too: `mae.step.<step name>` = run id.
        A rollback opens another child of the fingerprint: `mae.rollbacks` counts them, `mae.rolled_back_to` is a step.
Errors: TrackingError."""

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.tracking.connection import TrackingError, artifact_location, clear_errors, client_of
from pipeline.tracking.mlflow_format import mlflow_key, mlflow_tags
from pipeline.tracking.records import log_params, log_tags

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

FINGERPRINT_TAG = "mae.fingerprint"
PARENT_TAG = "mlflow.parentRunId"
LATER_PARENTS_TAG = "mae.later_parents"
STEP_TAG = "mae.step."
ROLLBACKS_TAG = "mae.rollbacks"
ROLLED_BACK_TO_TAG = "mae.rolled_back_to"


def open_parent(
    uri: str,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    artifact_root: str | None = None,
) -> str:
    """Opens the run of one `mae run`, in an experiment that is made when missing; returns its run id."""
    with clear_errors(uri, f"opening the run {name!r}"):
        experiment_id = _experiment(uri, experiment, artifact_root=artifact_root)
        run_id = str(client_of(uri).create_run(experiment_id, tags=mlflow_tags(tags), run_name=name).info.run_id)
    log_params(uri, run_id, params)
    return run_id


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
    """Opens the run of one step: the newest one of this fingerprint, RUNNING again, else a new one; returns its run id."""
    run_id = find_child(uri, experiment=experiment, fingerprint=fingerprint)
    with clear_errors(uri, f"opening the run of step {name!r}"):
        client = client_of(uri)
        if run_id is None:
            family = {FINGERPRINT_TAG: fingerprint, PARENT_TAG: parent_run_id}
            experiment_id = _experiment(uri, experiment)
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
    """The newest run of a step with this fingerprint, whatever its state; None when nobody tracked it."""
    with clear_errors(uri, "looking for a step's run"):
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        query = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([found.experiment_id], filter_string=query, order_by=order, max_results=1)
        return str(runs[0].info.run_id) if runs else None


def child_after(uri: str, run_id: str, *, rollbacks: int, to_step: int) -> str:
    """The child that holds the curve of a step after so many rollbacks: the one given or one beside it, made when missing."""
    with clear_errors(uri, "looking for the run after a rollback"):
        client = client_of(uri)
        given = client.get_run(run_id)
        tags = given.data.tags
        query = f"tags.`{FINGERPRINT_TAG}` = '{tags.get(FINGERPRINT_TAG, '')}'"
        order = ["attributes.start_time DESC"]
        family = [given, *client.search_runs([given.info.experiment_id], filter_string=query, order_by=order)]
        for run in family:
            if int(run.data.tags.get(ROLLBACKS_TAG, "0")) == rollbacks:
                return str(run.info.run_id)
        kept = {key: value for key, value in tags.items() if not key.startswith("mlflow.") or key == PARENT_TAG}
        told = {ROLLBACKS_TAG: str(rollbacks), ROLLED_BACK_TO_TAG: str(to_step)}
        made = client.create_run(given.info.experiment_id, tags={**kept, **told}, run_name=given.info.run_name)
        client.set_terminated(run_id, status="KILLED")
        return str(made.info.run_id)


def link_child(uri: str, *, parent_run_id: str, name: str, run_id: str) -> None:
    """Names a step's run in its parent; a run that began under another parent (resumed or cached) remembers this one too."""
    with clear_errors(uri, f"linking step {name!r}"):
        client = client_of(uri)
        log_tags(client, parent_run_id, {f"{STEP_TAG}{mlflow_key(name)}": run_id})
        tags = client.get_run(run_id).data.tags
        later = tags.get(LATER_PARENTS_TAG, "").split()
        if tags.get(PARENT_TAG) != parent_run_id and parent_run_id not in later:
            log_tags(client, run_id, {LATER_PARENTS_TAG: " ".join([*later, parent_run_id][-200:])})


def close_run(uri: str, run_id: str, status: RunStatus) -> None:
    """Sets a run's final state; a later attempt may open it again."""
    with clear_errors(uri, "closing a run"):
        client_of(uri).set_terminated(run_id, status=status)


def _experiment(uri: str, name: str, *, artifact_root: str | None = None) -> str:
    """The experiment's id. Two processes may create it at once: whoever comes second takes the first one's."""
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri, artifact_root)))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(f"experiment {name!r} was deleted in MLflow: restore it there, or choose another name")
    return str(found.experiment_id)
