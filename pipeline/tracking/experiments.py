"""MLflow's experiments, and the search for runs in them."""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import TrackingError
from pipeline.tracking.connection import artifact_location, client_of

KIND_TAG, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""Without it, MLflow shows the experiment among pages for language models."""


def experiment_named(uri: str, name: str) -> str:
    """Return the experiment's id, creating it if necessary; of two processes that try at once, the second takes the first's."""
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            where, tags = artifact_location(uri), {KIND_TAG: TRAINING}
            return str(client.create_experiment(name, artifact_location=where, tags=tags))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    # a deleted experiment keeps its name, so creating it again would fail
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} was deleted in MLflow: restore it there, or choose another tracking.experiment"
        )
    return str(found.experiment_id)


def runs_found(client: Any, experiment_ids: Sequence[str], query: str) -> list[Any]:
    """Return the newest hundred runs that a filter matches, newest first."""
    order = ["attributes.start_time DESC"]
    return list(client.search_runs(list(experiment_ids), filter_string=query, order_by=order, max_results=100))
