"""The loop as Ray Train's worker group: budgets, elastic range, restarts. The other importer of ray beside cluster.py.

Ray Train restarts the group when a worker or its node dies; the loop then starts from the newest checkpoint in the store, which
alone is the truth (Ray's own snapshot holds nothing of ours). Who fails too often, or in a way that would repeat itself, is
given up by `failures.verdict`, which Ray Train asks through its callback.
Errors: PipelineError when a training step is given up."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import cluster
from pipeline.errors import PipelineError, StorageError
from pipeline.graph.step import Attempt
from pipeline.training.checkpoints.format import committed
from pipeline.training.health.failures import Restarts, classify, verdict
from pipeline.training.health.stop_reasons import StoreSupervisor, listen
from pipeline.training.health.watchdog import stacks_left
from pipeline.training.spec.train_spec import TrainSpec

log = logging.getLogger(__name__)
Work = Callable[[TrainSpec, Attempt], None]


def fit(work: Work, spec: TrainSpec, attempt: Attempt) -> None:
    """Runs `work` on the workers that there is room for, within the range, until all have returned from it."""
    with tempfile.TemporaryDirectory(prefix="mae-ray-train-", ignore_cleanup_errors=True) as notes:
        try:
            _trainer(work, spec, attempt, notes).fit()
        except Exception as error:
            given_up = getattr(error, "controller_failure", None)  # by _GiveUp
            if isinstance(given_up, PipelineError):
                raise given_up from None
            raise PipelineError(
                f"{attempt.step_name}: Ray Train gave up: {last_line(error)}. {stacks_left(attempt.store)}{GOES_ON}"
            ) from error


GOES_ON = "The same command goes on from the last checkpoint"


def decided(attempt: Attempt) -> Attempt:
    """The attempt with `use_gpu` decided, once: workers whose GPU nodes are taken away must not go on without."""
    use_gpu = attempt.resources.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= attempt.resources.worker_range[0]
    return replace(attempt, resources=attempt.resources.model_copy(update={"use_gpu": use_gpu}))


def await_room(attempt: Attempt) -> str:
    """Waits until the fewest workers fit on the nodes that stay; returns why it did not wait longer, empty: they fit."""
    need, (least, _) = attempt.resources.per_worker, attempt.resources.worker_range
    store, until = StoreSupervisor(attempt), time.monotonic() + attempt.resources.node_wait_s
    while cluster.worker_capacity(need, of="all") < least:
        if reason := store.should_stop():
            return "asked to stop" if reason == "asked" else "another run has claimed a higher generation"
        if time.monotonic() >= until:
            return f"the nodes that stay have no room for {least} workers, after {attempt.resources.node_wait_s:g} s"
        time.sleep(1.0)
    return ""


def _trainer(work: Work, spec: TrainSpec, attempt: Attempt, notes: str) -> TorchTrainer:
    """`notes`: a folder for what Ray Train writes down for itself."""
    resources = attempt.resources
    use_gpu, need = resources.use_gpu, resources.per_worker
    least, most = resources.worker_range
    # Ray Train counts a draining node as room until it is dead, and would wait for it: it is told what stays. When there is
    # more, the loop stops for it (`resized`) with a checkpoint, where Ray Train itself would cut the workers off.
    most = max(least, min(most, cluster.worker_capacity(need, of="all")))
    return TorchTrainer(
        _on_worker,
        train_loop_config={"work": work, "spec": spec, "attempt": attempt, "cpus": resources.cpus_per_worker},
        torch_config=_Config(backend="nccl" if use_gpu else "gloo", timeout_s=resources.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=use_gpu,
            resources_per_worker=need,
            elastic_resize_monitor_interval_s=float("inf"),
        ),
        run_config=RunConfig(
            # Ray Train would silently continue an old run of this name in this folder, so the folder is this call's own.
            name=f"{attempt.step_name}-{attempt.fingerprint[:12]}-{attempt.generation:04d}",
            storage_path=notes,
            # Of failures in all there may be any number: _GiveUp counts those in a row.
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=resources.max_preemptions),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[_GiveUp(attempt)],
        ),
    )


def _on_worker(settings: Mapping[str, Any]) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(settings["cpus"])))
    settings["work"](settings["spec"], settings["attempt"])


@dataclass
class _Config(TorchConfig):  # type: ignore[misc] # Ray has no types
    """Ray's set-up of torch, after which SIGTERM to a worker asks for a checkpoint: Ray's own handler ends the process at once."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Runs on the workers' main threads, where alone a signal can be taken; the loop has a thread beside it."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(listen)


class _GiveUp(UserCallback):  # type: ignore[misc]
    """Asked by Ray Train's controller when workers have failed; what it raises ends the training."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.restarts = attempt, Restarts()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        kind = classify(worker_exceptions.values())
        if kind == "preempted":  # Ray Train has a budget for these, and may show one of them more than once
            return
        try:
            newest = next(committed(self.attempt.root), "")
        except StorageError as error:
            log.warning("cannot see whether there is a new checkpoint: %s", error)
            newest = self.restarts.committed
        if words := verdict(kind, self.restarts.after(newest), self.attempt.resources):
            last = last_line(next(iter(worker_exceptions.values())))
            raise PipelineError(
                f"{self.attempt.step_name}: {words}; last error: {last}. {stacks_left(self.attempt.store)}{GOES_ON}"
            )


def last_line(error: BaseException) -> str:
    """What an error of Ray's many lines ends in, of the first worker that has one."""
    failures = getattr(error, "worker_failures", None)
    said = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[-1] if lines else type(said).__name__
