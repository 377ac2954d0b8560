"""What is refused before anything is written or any GPU is held."""

import logging
import os
from collections.abc import Sequence

from pipeline import cluster, tracking
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.data.sources.listing import list_source
from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.runner import plan_graph
from pipeline.graph.step import Step
from pipeline.planning.estimate import refuse_what_cannot_fit
from pipeline.planning.hardware import here, of_cluster
from pipeline.storage import Store, open_store, probe

log = logging.getLogger(__name__)


def check_before(config: RunConfig, steps: Sequence[Step], store: Store, executor: Executor) -> None:
    """Whatever can be refused before GPUs are held, or anything is written."""
    waiting = steps_to_run(steps, store)
    for step in waiting:
        if problem := source_problem(step):
            raise problem
    low = config.resources.worker_range[0]
    needed, there = low * config.resources.cpus_per_worker, os.cpu_count() or 1
    if executor == "ray" and "RAY_ADDRESS" not in os.environ and needed > there:
        raise ConfigError(
            f"resources.workers={low} at cpus_per_worker={config.resources.cpus_per_worker} need {needed} CPUs, this machine has "
            f"{there}: write fewer workers, or cpus_per_worker={there / low:.2f}"
        )
    if executor == "in_process" or "RAY_ADDRESS" not in os.environ:
        alone = config.resources.model_copy(update={"workers": 1}) if executor == "in_process" else config.resources
        refuse_what_cannot_fit(waiting, alone, here(workers=alone.worker_range[0], use_gpu=alone.use_gpu))
    probe(store)


def steps_to_run(steps: Sequence[Step], store: Store) -> list[Step]:
    """Those that a run would run."""
    return [row.step for row in plan_graph(steps, store=store) if row.state == "to_run"]


def check_fits_cluster(config: RunConfig, waiting: Sequence[Step]) -> None:
    """Refuses what the cluster's GPUs cannot hold, by what Ray calls them; a cluster of CPUs, or of others, is not judged."""
    count, kinds = cluster.gpus()
    resources = config.resources
    if resources.use_gpu is not False and count >= resources.worker_range[0] and (device := of_cluster(kinds)):
        refuse_what_cannot_fit(waiting, resources, device)


def warn_of_folders(store: Store, tracking_uri: str) -> None:
    """On a cluster of several machines a folder of this one is not where the others look."""
    nodes = cluster.node_count()
    if store.local_path("x") and nodes > 1:
        log.warning(
            "store %s is a folder and the cluster has %d nodes: every one must see it under this path", store.uri, nodes
        )
    if tracking_uri.startswith("sqlite") and (nodes > 1 or ("RAY_ADDRESS" in os.environ and not store.local_path("x"))):
        log.warning(
            "tracking %s is a file of the machine that drives the run: other nodes cannot write to it, and it goes when that "
            "machine goes. Set tracking.uri or MLFLOW_TRACKING_URI to a server; the report and history.jsonl in the store "
            "hold the curves either way",
            tracking.redact_text(tracking_uri),
        )


def source_problem(step: Step) -> PipelineError | ConfigError | None:
    if step.kind != "snapshot":
        return None
    try:
        labels = step.config.labels
        if labels is not None:
            folder, _, name = labels.rpartition("/")
            if not open_store(folder or "/").exists(name):
                return ConfigError(
                    f"data.labels={labels!r} does not exist. Write the address of a .csv, .jsonl or .parquet file"
                )
        next(item for item in list_source(step.config.source, besides=labels) if item.role != "ignored")
    except (PipelineError, ConfigError) as problem:
        return problem
    return None
