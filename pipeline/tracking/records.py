"""Log a run's parameters, dataset, scores and figures to MLflow. Every call is idempotent. Errors: TrackingError."""

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.tracking.connection import client_of, translate_errors
from pipeline.tracking.mlflow_format import (
    METRICS_PER_CALL,
    PARAM_MAX_CHARS,
    PARAMS_PER_CALL,
    chunks,
    flatten_params,
    mlflow_key,
    mlflow_tags,
    redact,
    redact_text,
    short_digest,
)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Log a nested config under keys like `a.b.c`, with secrets hidden and long values truncated.

    MLflow cannot change a parameter, so a new value (say, more workers in a later attempt) becomes the tag
    `mae.changed.<key>`."""
    flat = {mlflow_key(key): text[:PARAM_MAX_CHARS] for key, text in flatten_params(redact(params)).items()}
    if not flat:
        return
    with translate_errors(uri, "logging parameters"):
        from mlflow.entities import Param

        client = client_of(uri)
        known = client.get_run(run_id).data.params
        # MLflow refuses a whole batch over one parameter that has another value already
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for batch in chunks(new, PARAMS_PER_CALL):
            client.log_batch(run_id, params=batch)
        log_tags(client, run_id, {f"mae.changed.{k}": v for k, v in flat.items() if k in known and known[k] != v})


def log_dataset(
    uri: str,
    run_id: str,
    *,
    name: str,
    digest: str,
    source: str,
    context: str,
    images: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Log the identity of the data a run used, without reading it; `context` is its role: "training" or "evaluation".

    `images`: how many each split has. Stores what MLflow's MetaDataset would. MLflow limits digests to 36 characters, so the whole
    one goes into a tag."""
    with translate_errors(uri, f"logging dataset {name!r}"):
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client = client_of(uri)
        where = json.dumps({"uri": redact_text(source)})
        kind = "s3" if source.startswith("s3://") else "local"
        dataset = Dataset(
            name=name[:500],
            digest=short_digest(digest),
            source_type=kind,
            source=where,
            profile=json.dumps(dict(images)) if images else None,
        )
        client.log_inputs(run_id, [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])])
        log_tags(client, run_id, {f"mae.dataset.{mlflow_key(name)}.digest": digest})


def log_curve(uri: str, run_id: str, name: str, points: Iterable[tuple[int, float, int]]) -> None:
    """Log the points (step, value, time in ms) of a metric that lie above the highest step that the run has of it."""
    with translate_errors(uri, f"logging {name}"):
        from mlflow.entities import Metric

        client = client_of(uri)
        sent_up_to = last_steps(client, run_id).get(name, -1)
        new = [Metric(name, v, at_ms, step) for step, v, at_ms in points if step > sent_up_to and math.isfinite(v)]
        for batch in chunks(new, METRICS_PER_CALL):
            client.log_batch(run_id, metrics=batch, synchronous=True)


def last_steps(client: Any, run_id: str) -> dict[str, int]:
    """Return the highest step the server has of each metric of a run: MLflow keeps that point as the metric's latest."""
    # through the protocol buffer: the public dictionary of metrics has no steps
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run, replacing earlier values."""
    with translate_errors(uri, "setting tags"):
        log_tags(client_of(uri), run_id, tags)


def log_scores(uri: str, run_id: str, scores: Mapping[str, float]) -> None:
    """Log final scores (`score/linear/digits/pretrained`), except those that the run already has and non-finite ones."""
    with translate_errors(uri, "logging scores"):
        from mlflow.entities import Metric

        client = client_of(uri)
        known = client.get_run(run_id).data.metrics
        # MLflow appends: a repeated score would become a second point of its chart
        new = {k: v for k, v in scores.items() if math.isfinite(v) and known.get(mlflow_key(k)) != v}
        for batch in chunks([Metric(mlflow_key(k), v, now_ms(), 0) for k, v in new.items()], METRICS_PER_CALL):
            client.log_batch(run_id, metrics=batch)


def log_file(uri: str, run_id: str, content: bytes, name: str) -> None:
    """Store a file as the artifact `name` (`report/curve.png`)."""
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch, translate_errors(uri, f"storing {name}"):
        path = Path(scratch) / base
        path.write_bytes(content)
        client_of(uri).log_artifact(run_id, str(path), artifact_path=folder or None)


def log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, replacing earlier values."""
    from mlflow.entities import RunTag

    for batch in chunks([RunTag(key, value) for key, value in mlflow_tags(tags).items()], PARAMS_PER_CALL):
        client.log_batch(run_id, tags=batch)


def now_ms() -> int:
    """Return the current time as MLflow counts it, in milliseconds since 1970."""
    return int(time.time() * 1000)
