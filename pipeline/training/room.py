"""What a training waits for before its workers start: GPUs that an autoscaler adds, and room after nodes were taken away.

Errors: ConfigError for GPUs that are not there; Stopped if asked to stop, or if GPUs that were on their way are late."""

import time
from dataclasses import replace

from pipeline import cluster
from pipeline.cluster.device import choose_device
from pipeline.errors import Stopped
from pipeline.graph.step import Attempt
from pipeline.training.health.failures import GOES_ON
from pipeline.training.health.stop_reasons import StoreStopSignal

STOPPED_BY = {"asked": "asked to stop", "fenced": "another run has claimed a higher generation"}
_ANSWER_S = 45.0
"""Within which an autoscaler that can start a GPU node has begun to. It looks for demand every 5 s."""


def with_hardware_decided(attempt: Attempt) -> Attempt:
    """Return the attempt with `use_gpu` and `decode_workers` decided, once for all groups of workers, and say what was decided.

    A group whose GPU nodes are taken away must not go on without GPUs.
    """
    resources, others = attempt.resources, ""
    wanted = resources.use_gpu is not False
    if wanted and _gpu_count() < resources.worker_range[0] and cluster.may_grow():
        others = _ask_for_gpus(attempt)
    choice = choose_device(resources, gpus=_gpu_count(), where="this cluster", others=others).or_refuse()
    attempt.progress.say(choice.text)
    decided = resources.model_copy(update={"use_gpu": choice.use_gpu})
    return replace(attempt, resources=cluster.hardware_decided(decided))


def _gpu_count() -> int:
    return int(cluster.gpu_inventory()[0])


def _ask_for_gpus(attempt: Attempt) -> str:
    """Wait until an autoscaler has added the GPUs of the fewest workers; return why it has not, or an empty string.

    Stopped if `use_gpu` is true and nodes were on their way at the end of `node_wait_s`: then the same command may help.
    """
    resources, least = attempt.resources, attempt.resources.worker_range[0]
    need = resources.model_copy(update={"use_gpu": True}).per_worker
    attempt.progress.say(
        f"asking the autoscaler for GPUs for {least} worker{'s' if least > 1 else ''}, and waiting for up to "
        f"{resources.node_wait_s:g} s (resources.node_wait_s)"
    )
    stop_signal, began, coming = StoreStopSignal(attempt), time.monotonic(), False
    with cluster.room_asked_for(need, workers=least) as room:
        while not room.granted(timeout_s=1.0):
            if reason := stop_signal.stop_reason():
                raise Stopped(f"{attempt.step_name}: {STOPPED_BY[reason]}, while it waited for GPUs. {GOES_ON}")
            answer = room.gpus_are_coming()
            coming = coming if answer is None else answer
            waited = time.monotonic() - began
            if answer is False or (waited > _ANSWER_S and not coming):
                return "and its autoscaler starts no nodes that have what a worker needs"
            if waited > resources.node_wait_s:
                late = f"the autoscaler's nodes with GPUs did not come within {resources.node_wait_s:g} s"
                if resources.use_gpu is True:
                    raise Stopped(f"{attempt.step_name}: {late}. {GOES_ON}")
                return late
    return ""


def wait_for_room(attempt: Attempt) -> str:
    """Wait until the fewest workers fit on the remaining nodes; return why it gave up, or an empty string if they fit."""
    need, (least, _) = attempt.resources.per_worker, attempt.resources.worker_range
    stop_signal, deadline = StoreStopSignal(attempt), time.monotonic() + attempt.resources.node_wait_s
    while cluster.worker_capacity(need, of="all") < least:
        if reason := stop_signal.stop_reason():
            return STOPPED_BY[reason]
        if time.monotonic() >= deadline:
            return f"the nodes that stay have no room for {least} workers, after {attempt.resources.node_wait_s:g} s"
        time.sleep(1.0)
    return ""
