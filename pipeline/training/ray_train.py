"""The loop as Ray Train's worker group: retry budgets, elastic range, restarts.

Ray Train restarts the group when a worker or its node dies. The loop then starts from the newest checkpoint in the store,
which alone is authoritative (Ray's own snapshot holds nothing of ours). A group that fails too often, or in a way that would
only repeat itself, is given up by `failures.reason_to_give_up`, which Ray Train asks through its callback.
This module and `pipeline.cluster` are the only importers of ray.
Errors: PipelineError when a training step is given up."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import cluster
from pipeline.errors import PipelineError, Stopped, StorageError
from pipeline.graph.step import Attempt
from pipeline.training.checkpoints.format import committed
from pipeline.training.device import choose_device
from pipeline.training.health.failures import FailureStreak, classify, reason_to_give_up
from pipeline.training.health.stop_reasons import StoreStopSignal, stop_on_sigterm
from pipeline.training.health.watchdog import stack_dump_hint
from pipeline.training.spec.train_spec import TrainSpec

log = logging.getLogger(__name__)
WorkerFunction = Callable[[TrainSpec, Attempt], None]
GOES_ON = "The same command goes on from the last checkpoint"
STOPPED_BY = {"asked": "asked to stop", "fenced": "another run has claimed a higher generation"}
_ANSWER_S = 45.0
"""Within which an autoscaler that can start a GPU node has begun to. It looks for demand every 5 s."""


def fit(run_worker: WorkerFunction, spec: TrainSpec, attempt: Attempt) -> None:
    """Run `run_worker` on as many workers as there is room for, within the range, until all have returned."""
    decided = {"decode_workers": attempt.resources.decode_workers}
    spec = replace(spec, resources=spec.resources.model_copy(update=decided))
    with tempfile.TemporaryDirectory(prefix="mae-ray-train-", ignore_cleanup_errors=True) as scratch:
        try:
            _trainer(run_worker, spec, attempt, scratch).fit()
        except Exception as error:
            given_up = getattr(error, "controller_failure", None)  # what _GiveUp raised, wrapped by Ray Train
            if isinstance(given_up, PipelineError):
                raise given_up from None  # our own message says it all; Ray's wrapping of it would only repeat it
            raise PipelineError(
                f"{attempt.step_name}: Ray Train gave up: {last_line(error)}. {stack_dump_hint(attempt.store)}{GOES_ON}"
            ) from error


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
    cpus = cluster.cpus_per_gpu(workers=resources.worker_range[1]) if choice.use_gpu else 0.0
    return replace(attempt, resources=resources.model_copy(update={"use_gpu": choice.use_gpu}).decided_for(cpus))


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


def _trainer(run_worker: WorkerFunction, spec: TrainSpec, attempt: Attempt, scratch: str) -> TorchTrainer:
    """Return the trainer; `scratch` is a folder for Ray Train's own notes."""
    resources = attempt.resources
    use_gpu, need = resources.use_gpu is True, resources.per_worker
    least, most = resources.worker_range
    # Ray Train counts a draining node as room until it is dead, and would wait for it. So its maximum is what fits on the nodes
    # that stay. When there is more room, the loop stops with a checkpoint (`resized`); Ray Train would cut the workers off.
    most = max(least, min(most, cluster.worker_capacity(need, of="all")))
    return TorchTrainer(
        _on_worker,
        train_loop_config={
            "run_worker": run_worker,
            "spec": spec,
            "attempt": attempt,
            # The worker's own share: workers on a node that each started a thread per core would crowd each other out. A worker
            # with a GPU is mostly waiting for it.
            "threads": None if use_gpu else max(1, int(resources.cpus_per_worker)),
        },
        torch_config=_Config(backend="nccl" if use_gpu else "gloo", timeout_s=resources.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),  # a pair makes the group elastic
            use_gpu=use_gpu,
            resources_per_worker=need,
            elastic_resize_monitor_interval_s=float("inf"),  # never resize a healthy group: see above
        ),
        run_config=RunConfig(
            # Ray Train would silently continue an old run of this name in this folder, so the folder is this call's own.
            name=f"{attempt.step_name}-{attempt.fingerprint[:12]}-{attempt.generation:04d}",
            storage_path=scratch,
            # Ray Train may see any number of failures in total: _GiveUp counts those in a row.
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=resources.max_preemptions),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[_GiveUp(attempt)],
        ),
    )


def _on_worker(settings: Mapping[str, Any]) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    settings["run_worker"](settings["spec"], settings["attempt"])


@dataclass
class _Config(TorchConfig):  # type: ignore[misc] # Ray has no types
    """Ray's set-up of torch, after which SIGTERM to a worker asks for a checkpoint; Ray's own handler ends the process."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


# Ray keeps the base class private; this property is the public way to it.
class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Runs on the workers' main threads, the only ones that may set a signal handler; the loop runs in another thread."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        # After Ray's own set-up, whose handler this replaces.
        worker_group.execute(stop_on_sigterm)


class _GiveUp(UserCallback):  # type: ignore[misc]
    """Called by Ray Train's controller when workers have failed; raising from it ends the training."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.failures = attempt, FailureStreak()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        kind = classify(worker_exceptions.values())
        if kind == "preempted":  # Ray Train has its own budget for these, and may report the same one more than once
            return
        try:
            newest = next(committed(self.attempt.root), "")
        except StorageError as error:
            log.warning("cannot see whether there is a new checkpoint: %s", error)
            # Counts as no progress: a store that is away must not make the budget endless.
            newest = self.failures.newest_checkpoint
        if reason := reason_to_give_up(kind, self.failures.count_with(newest), self.attempt.resources):
            last = last_line(next(iter(worker_exceptions.values())))
            raise PipelineError(
                f"{self.attempt.step_name}: {reason}; last error: {last}. {stack_dump_hint(self.attempt.store)}{GOES_ON}"
            )


def last_line(error: BaseException) -> str:
    """Return the last line of one of Ray's long error messages, taken from the first worker that reported one."""
    worker_errors = getattr(error, "worker_failures", None)
    reported = next(iter(worker_errors.values())) if worker_errors else error
    lines = [line.strip() for line in str(reported).splitlines() if line.strip()]
    return lines[-1] if lines else type(reported).__name__
