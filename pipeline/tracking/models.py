"""Encoders in MLflow's model registry: one registered model for a run's name, one version for each encoder.

A version points at the encoder's folder in the store. A server refuses folders of its own machine as a source, so there a version
points at an *external model* of MLflow instead, and its tag `mae.uri` names the folder. Aliases: `newest` follows the last
version; `best-linear` moves only to a better linear score on the same data. Errors: TrackingError."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.tracking.connection import client_of, translate_errors
from pipeline.tracking.mlflow_format import mlflow_tags
from pipeline.tracking.names import BEST_LINEAR_ALIAS, FINGERPRINT_TAG, NEWEST_ALIAS, URI_TAG

LINEAR_TAG, LINEAR_ON_TAG = "mae.linear", "mae.linear_on"


class LinearScore(NamedTuple):
    """Top-1 accuracy of the linear probe, and what it was measured on; scores on other data cannot be compared with it."""

    top1: float
    data: str


def register_encoder(
    uri: str,
    name: str,
    *,
    run_id: str,
    fingerprint: str,
    files_uri: str,
    linear: LinearScore | None,
    tags: Mapping[str, str],
) -> str:
    """Register an encoder, unless it is registered already, and move the aliases. Returns the version."""
    with translate_errors(uri, f"registering the model {name!r}"):
        client = client_of(uri)
        version = _version_of(client, name, fingerprint)
        if version is None:
            every = mlflow_tags({**tags, FINGERPRINT_TAG: fingerprint, URI_TAG: files_uri})
            version = _create(client, uri, name, run_id=run_id, files_uri=files_uri, tags=every)
            client.set_registered_model_alias(name, NEWEST_ALIAS, version)
        if linear:
            client.set_model_version_tag(name, version, LINEAR_TAG, f"{linear.top1:.6f}")
            client.set_model_version_tag(name, version, LINEAR_ON_TAG, linear.data)
            if _is_best(client, name, linear):
                client.set_registered_model_alias(name, BEST_LINEAR_ALIAS, version)
        return version


def _version_of(client: Any, name: str, fingerprint: str) -> str | None:
    query = f"name = '{name}' and tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
    found = client.search_model_versions(query, max_results=1)
    return str(found[0].version) if found else None


def _create(client: Any, uri: str, name: str, *, run_id: str, files_uri: str, tags: Mapping[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    try:
        made = client.create_model_version(name, files_uri, run_id=run_id, tags=tags)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        run = client.get_run(run_id)
        model = client.create_logged_model(run.info.experiment_id, name=name, source_run_id=run_id, tags=tags)
        client.finalize_logged_model(model.model_id, "READY")
        source = f"models:/{model.model_id}"
        made = client.create_model_version(name, source, run_id=run_id, tags=tags, model_id=model.model_id)
    return str(made.version)


def _is_best(client: Any, name: str, linear: LinearScore) -> bool:
    """Return whether nothing is known of the present best one, or it was scored on the same data and is worse."""
    version = client.get_registered_model(name).aliases.get(BEST_LINEAR_ALIAS)
    if version is None:
        return True
    known = client.get_model_version(name, version).tags
    same_data = known.get(LINEAR_ON_TAG) == linear.data
    return LINEAR_TAG not in known or (same_data and float(known[LINEAR_TAG]) < linear.top1)
