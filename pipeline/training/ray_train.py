"""The loop as Ray Train's worker group: retry budgets, elastic range, restarts.

Ray Train restarts the group when a worker or its node dies. The loop then starts from the newest checkpoint in the store,
which alone is authoritative (Ray's own snapshot holds nothing of ours). A group that fails too often, or in a way that would
only repeat itself, is given up by `failures.reason_to_give_up`, which Ray Train asks through its callback.
This module and `pipeline.cluster` are the only importers of ray.
Errors: PipelineError when a training step is given up."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import cluster
from pipeline.errors import PipelineError
from pipeline.graph.step import Attempt
from pipeline.training.health.failures import GOES_ON, RestartBudget, classify, last_line
from pipeline.training.health.stop_reasons import stop_on_sigterm
from pipeline.training.health.watchdog import stack_dump_hint
from pipeline.training.ray_task import WorkerFunction
from pipeline.training.spec.train_spec import TrainSpec


def fit(run_worker: WorkerFunction, spec: TrainSpec, attempt: Attempt) -> None:
    """Run `run_worker` on as many workers as there is room for, within the range, until all have returned."""
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
        self.budget = RestartBudget(attempt)

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        errors = list(worker_exceptions.values())
        # Ray Train has a budget of its own for preemptions, and may report the same one more than once.
        if classify(errors) != "preempted" and (problem := self.budget.give_up(errors)):
            raise problem
