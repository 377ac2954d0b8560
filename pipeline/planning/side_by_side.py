"""How many steps that train run side by side: as many as the cluster has CPUs, GPUs and memory for."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from pipeline import cluster
from pipeline.cluster.resources import Resources
from pipeline.graph.runner import Parallel
from pipeline.graph.step import Step
from pipeline.planning.estimate import estimate_memory, training_configs
from pipeline.planning.hardware import local_cpu

COUNT_EVERY_S = 10.0
"""Between two counts of the cluster's room. It changes where nodes come and go."""


def parallel_steps(resources: Resources, steps: Sequence[Step]) -> Parallel:
    """Return how many steps may run at once: the configured number or, for `auto`, a function that counts the room.

    A pretraining that is the only one runs alone, as does everything that is neither pretraining nor evaluation."""
    if resources.parallel_steps != "auto":
        return resources.parallel_steps
    of_kind = {kind: [step for step in steps if step.kind == kind] for kind in ("pretrain", "evaluate")}
    counts: dict[str, Callable[[], int]] = {"evaluate": partial(evaluations_at_once, resources, of_kind["evaluate"])}
    if len(of_kind["pretrain"]) > 1:
        counts["pretrain"] = partial(pretrainings_at_once, resources, of_kind["pretrain"])
    latest = {kind: _every(COUNT_EVERY_S, count) for kind, count in counts.items()}
    return lambda kind: latest[kind]() if kind in latest else 1


def evaluations_at_once(resources: Resources, evaluations: Sequence[Step]) -> int:
    """Return how many of the steps the cluster has room for at a time. Each counts as much as the largest of them needs."""
    decided = cluster.hardware_decided(resources)
    return _at_once(decided.for_evaluation(on_gpus=bool(decided.use_gpu)), evaluations)


def pretrainings_at_once(resources: Resources, pretrainings: Sequence[Step]) -> int:
    """Return how many of the steps the cluster has room for at a time, each with as many workers as it may have."""
    return _at_once(cluster.hardware_decided(resources), pretrainings)


def _at_once(decided: Resources, steps: Sequence[Step]) -> int:
    return cluster.steps_at_once(decided, host_bytes=0 if decided.use_gpu else host_bytes(decided, steps))


def host_bytes(resources: Resources, steps: Sequence[Step]) -> int:
    """Return the memory that a worker of the largest of these trainings holds on a CPU, in bytes; 0 if none of them trains."""
    trainings = training_configs(steps).values()
    return max((estimate_memory(one, resources, local_cpu()).footprint.total for one in trainings), default=0)


def _every(seconds: float, count: Callable[[], int]) -> Callable[[], int]:
    """Return a function that counts at most once in that time, and otherwise repeats its last answer."""
    answer, counted_at = 1, float("-inf")

    def latest() -> int:
        nonlocal answer, counted_at
        if time.monotonic() - counted_at >= seconds:
            answer, counted_at = count(), time.monotonic()
        return answer

    return latest
