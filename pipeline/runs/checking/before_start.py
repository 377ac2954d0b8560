"""Checks that refuse a run before anything is written or any GPU is held."""

import logging
import os
from collections.abc import Collection, Sequence

from pipeline import cluster, tracking
from pipeline.cluster.device import choose_device, choose_device_here
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.data.snapshots.config import where_it_is
from pipeline.data.snapshots.rereading import check_layout
from pipeline.data.sources.listing import MOVED, list_source
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.classifiers import ClassifierConfig
from pipeline.graph.plan import plan_graph
from pipeline.graph.step import Step
from pipeline.planning.estimate import check_memory, training_configs
from pipeline.planning.hardware import Hardware, cluster_hardware, cpu_computes_bf16, local_hardware
from pipeline.runs.checking.findings import check_reading, examine, finished_in, problem_of
from pipeline.storage import Store, open_store, probe

log = logging.getLogger(__name__)

CHECKED_FILES = 20_000
"""Sources with more files than this are listed by their step alone; 20,000 are a second, or twenty requests to a bucket."""


def check_before_start(
    config: RunConfig,
    steps: Sequence[Step],
    store: Store,
    executor: Executor,
    *,
    checked: Collection[str] = (),
) -> None:
    """Check source, CPUs, memory and store. Raises ConfigError or PipelineError for the first problem.

    Memory is only checked for this machine; for a cluster, see `check_fits_cluster`. `checked`: titles of steps that another
    configuration shares and that were looked at with it."""
    waiting = [step for step in steps_to_run(steps, store) if step.title not in checked]
    finished = finished_in(store)
    for step in steps:
        check_reading(step, finished, mark=True)
    if wrong := problem_of(examine(config, steps, finished)):
        raise wrong
    for step in waiting:
        if problem := source_problem(step):
            raise problem
    if advice := slow_precision(waiting, config.resources):
        log.warning(advice)
    if executor == "ray" and "RAY_ADDRESS" not in os.environ:
        _check_cpus(config.resources)
    if executor == "in_process" or "RAY_ADDRESS" not in os.environ:
        local = config.resources.model_copy(update={"workers": 1}) if executor == "in_process" else config.resources
        if training_configs(waiting):
            choose_device_here(local).or_refuse()
        _check_memory(waiting, local, local_hardware(local), alone=executor == "in_process")
    probe(store)  # last, because it writes an object


def _check_cpus(resources: Resources) -> None:
    """Raise ConfigError if the workers of a step need more CPUs than this machine has."""
    there, decoding = os.cpu_count() or 1, resources.decode_processes
    for name, one in (("workers", resources), ("evaluation_workers", resources.for_evaluation(on_gpus=False))):
        low = one.worker_range[0]
        if (needed := low * one.per_worker["CPU"]) > there:
            also = f" and decode_workers={decoding}" if decoding else ""
            raise ConfigError(
                f"resources.{name}={low} at cpus_per_worker={one.cpus_per_worker}{also} need {needed} CPUs, but this machine has "
                f"{there}: write fewer workers, or "
                f"{'fewer decode_workers' if decoding else f'cpus_per_worker={there / low:.2f}'}"
            )


def _check_memory(waiting: Sequence[Step], resources: Resources, hardware: Hardware, *, alone: bool = False) -> None:
    """Raise ConfigError if a step cannot fit. `alone`: in this process, one worker whatever is configured."""
    evaluation = resources if alone else resources.for_evaluation(on_gpus=hardware.kind == "cuda")
    check_memory([step for step in waiting if step.kind != "evaluate"], resources, hardware)
    check_memory([step for step in waiting if step.kind == "evaluate"], evaluation, hardware)


def slow_precision(steps: Sequence[Step], resources: Resources) -> str:
    """Return advice if steps would compute in bf16 on this machine's CPU and it has no such arithmetic, or an empty string."""
    if "RAY_ADDRESS" in os.environ or cpu_computes_bf16():
        return ""
    if local_hardware(resources).kind != "cpu":
        return ""
    in_bf16 = [config for config in training_configs(steps).values() if config.recipe.precision == "bf16"]
    sections = (config.section if isinstance(config, ClassifierConfig) else "pretrain" for config in in_bf16)
    options = dict.fromkeys(f"--set {section}.precision=fp32" for section in sections)
    return f"this CPU has no bf16 arithmetic, fp32 is faster on it: {' '.join(options)}" if options else ""


def steps_to_run(steps: Sequence[Step], store: Store) -> list[Step]:
    """Return the steps that a run would execute."""
    return [row.step for row in plan_graph(steps, store=store) if row.state == "to_run"]


def check_fits_cluster(config: RunConfig, waiting: Sequence[Step]) -> None:
    """Raise ConfigError if the cluster cannot hold the fewest workers, or its GPUs what a worker needs.

    It has to come before any step is claimed, since a claim ends the run that is at work on the step. Clusters that may grow are
    not counted, and the memory of CPUs or of unknown GPUs is not checked."""
    if not training_configs(waiting):
        return
    resources = config.resources
    gpus, gpu_types = cluster.gpu_inventory()
    choice = choose_device(resources, gpus=int(gpus), where="this cluster")
    resources = resources.model_copy(update={"use_gpu": choice.use_gpu})
    need, evaluation = resources.per_worker, resources.for_evaluation(on_gpus=choice.use_gpu)
    room = cluster.worker_capacity(need, of="all")
    unclaimed = "Nothing was claimed: a run that is at work in this store goes on"
    kinds = {step.kind for step in waiting if training_configs([step])}
    for name, one, kind in (("workers", resources, "pretrain"), ("evaluation_workers", evaluation, "evaluate")):
        least = one.worker_range[0]
        if kind in kinds and room < least and not cluster.may_grow():
            if choice.problem:
                raise ConfigError(f"{choice.problem}. {unclaimed}")
            each = " and ".join(f"{amount:g} {what}" for what, amount in need.items())
            raise ConfigError(
                f"resources.{name}={least}: the cluster has room for {room} of {least}, each of which reserves {each}. Write fewer "
                f"workers, reserve less, or add nodes. {unclaimed}"
            )
    if choice.use_gpu and (device := cluster_hardware(gpu_types)):
        _check_memory(waiting, resources, device)


def warn_of_unshared_paths(store: Store, tracking_uri: str) -> None:
    """Warn if store or tracking is a local path and other machines take part in the run."""
    nodes = cluster.node_count()
    if store.local_path("x") and nodes > 1:
        log.warning(
            "store %s is a folder and the cluster has %d nodes: all of them must see it under this path",
            store.uri,
            nodes,
        )
    if tracking_uri.startswith("sqlite") and (nodes > 1 or ("RAY_ADDRESS" in os.environ and not store.local_path("x"))):
        log.warning(
            "tracking %s is a file on the machine that drives the run: other nodes cannot write to it, and it is lost with that "
            "machine. Set tracking.uri or MLFLOW_TRACKING_URI to a server. The curves are also in the store, in the report and "
            "history.jsonl",
            tracking.redact_text(tracking_uri),
        )


def source_problem(step: Step) -> PipelineError | ConfigError | None:
    """Return why the source of a snapshot step cannot be listed, or None. Only a small source is listed whole."""
    if step.kind != "snapshot":
        return None
    try:
        where = step.options.get(MOVED, {"source": step.config.source, "labels": step.config.labels})
        labels = where["labels"]
        if labels is not None:
            folder, _, name = labels.rpartition("/")
            if not open_store(folder or "/").exists(name):
                return ConfigError(
                    f"data.labels={labels!r} does not exist: write the address of a .csv, .jsonl or .parquet file"
                )
        # list_source raises where nothing is usable, so next() needs no default
        next(item for item in list_source(where["source"], besides=labels) if item.role != "ignored")
        check_layout(where_it_is(step.config, step.options), files=CHECKED_FILES)
    except (PipelineError, ConfigError) as problem:
        return problem
    return None
