"""`mae job submit`: a configuration checked here, and what may not work on the cluster although it works here."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.cluster.jobs import submit_run
from pipeline.config import RunConfig


def submit(config: RunConfig, *, address: str) -> str:
    """Start the run as a Ray job and return its id; a run that is already running is not started again.

    The job gets the resolved configuration, so that no file of this machine is needed there."""
    text = yaml.safe_dump(resolved_document(config), sort_keys=False)
    return submit_run(config.name, text, address=address)


def resolved_document(config: RunConfig) -> dict[str, Any]:
    """Return the whole configuration as plain values that `load_config` reads."""
    document: dict[str, Any] = json.loads(config.model_dump_json())
    if "snapshot" not in config.data.model_fields_set:
        del document["data"]["snapshot"]  # written out, it would pin the first snapshot
    return document


def warnings(config: RunConfig) -> Iterator[str]:
    """Yield one warning per address that other machines may not reach."""
    for field, address in (
        ("store", config.store),
        ("data.source", config.data.source),
        ("data.labels", config.data.labels),
    ):
        if address and not address.startswith("s3://"):
            what = "file" if field == "data.labels" else "folder"
            yield f"{field} {address} is a {what}: every node of the cluster must see it under this path"
    uri = config.tracking.uri
    if uri is None:
        yield (
            "tracking.uri is not set: unless the cluster sets MLFLOW_TRACKING_URI, MLflow's database is a file of the machine that "
            "drives the run. Name an MLflow server"
        )
    elif uri.startswith("sqlite"):
        yield f"tracking.uri {uri} is a file of the machine that drives the run. Name an MLflow server"
