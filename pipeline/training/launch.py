"""Starts the loop: as Ray Train's worker group, or alone in this process. The other importer of ray beside cluster.py.

Ray Train restarts the group when a worker dies; the loop then starts from the newest checkpoint in the store, which alone is
the truth (Ray's own snapshot holds nothing of ours). A person's error (PipelineError) is not retried: all workers return, rank 0
writes it down, and the coordinating stage raises it.
Errors: Stopped when asked to stop; Fenced; a worker's own PipelineError or ConfigError; PipelineError when Ray Train gave up."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pipeline import errors
from pipeline.errors import ConfigError, Fenced, PipelineError, Stopped, StorageError
from pipeline.graph.receipts import check_fence
from pipeline.graph.runner import stop_key
from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker, open_tracker
from pipeline.training import watchdog
from pipeline.training.loop import StopReason, Trained, train
from pipeline.training.spec import TrainSpec
from pipeline.training.world import ELSEWHERE, enter_world

log = logging.getLogger(__name__)

ASK_EVERY_S = 1.0
"""Between two looks at the store for a request to stop or a higher generation."""
RESULT = "trained.json"
"""What the loop returned, in the generation's directory: how a worker group answers the stage that started it."""


class StoreSupervisor:
    """Reads, now and then, whether the store asks this generation to stop."""

    def __init__(self, attempt: Attempt, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempt, self.clock, self.asked_at = attempt, clock, -ASK_EVERY_S

    def should_stop(self) -> StopReason:
        """`asked`, `fenced` or nothing; a store that does not answer is asked again later, and training goes on."""
        now = self.clock()
        if now - self.asked_at < ASK_EVERY_S:
            return ""
        self.asked_at = now
        try:
            check_fence(self.attempt.root, self.attempt.generation)
            return "asked" if self.attempt.root.exists(stop_key(self.attempt.generation)) else ""
        except Fenced:
            return "fenced"
        except StorageError as error:
            log.warning("cannot see whether this run is asked to stop: %s", error)
            return ""


def run_training(spec: TrainSpec, attempt: Attempt) -> Trained:
    """Trains to the end; the stage's one call."""
    attempt.store.delete(RESULT)  # an earlier call's answer must not be taken for this one's
    if attempt.executor == "in_process":
        work(spec, attempt)
    else:
        _run_on_ray(spec, attempt)
    answer = json.loads(attempt.store.read(RESULT))
    if "error" in answer:
        raise getattr(errors, answer["error"], PipelineError)(answer["message"])
    trained = Trained(**answer)
    if trained.stopped:
        raise Stopped(
            f"{attempt.step_name}: stopped at step {trained.global_step} of {trained.total_steps}, saved; "
            f"the same command goes on from there"
        )
    return trained


def work(spec: TrainSpec, attempt: Attempt) -> None:
    """One worker: joins the world, runs the loop; rank 0 writes the answer."""
    world = enter_world()
    tracker = (
        open_tracker(attempt.tracking_uri, attempt.mlflow_run_id, attempt.store) if world.is_first else NullTracker()
    )
    answer: Mapping[str, Any]
    try:
        answer = asdict(train(spec, attempt, world=world, tracker=tracker, supervisor=StoreSupervisor(attempt)))
    except (PipelineError, ConfigError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    finally:
        tracker.close()
    answers = world.all_of(answer)
    if world.is_first:
        attempt.store.write(RESULT, json.dumps(_first_error(answers) or answer).encode())


def _first_error(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The error of the worker that met it rather than of those that were told."""
    wrong = [answer for answer in answers if "error" in answer]
    return next((answer for answer in wrong if answer["message"] != ELSEWHERE), wrong[0] if wrong else None)


def _on_ray_worker(settings: Mapping[str, Any]) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(settings["cpus_per_worker"])))
    work(settings["spec"], settings["attempt"])


def _run_on_ray(spec: TrainSpec, attempt: Attempt) -> None:
    with tempfile.TemporaryDirectory(prefix="mae-ray-train-", ignore_cleanup_errors=True) as notes:
        _fit(spec, attempt, notes)


def _fit(spec: TrainSpec, attempt: Attempt, notes: str) -> None:
    """One run of Ray Train; `notes`: a folder for what it writes down for itself (the truth is in the store)."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = attempt.resources
    workers = resources["workers"]
    least = workers if isinstance(workers, int) else workers[0]
    use_gpu = resources["use_gpu"]
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) >= least
    trainer = TorchTrainer(
        _on_ray_worker,
        train_loop_config={"spec": spec, "attempt": attempt, "cpus_per_worker": resources["cpus_per_worker"]},
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(resources["collective_timeout_s"])
        ),
        scaling_config=ScalingConfig(
            num_workers=workers if isinstance(workers, int) else tuple(workers),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources["cpus_per_worker"], **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            # Ray Train would silently continue an old run of this name in this folder, so the folder is this call's own.
            name=f"{attempt.step_name}-{attempt.fingerprint[:12]}-{attempt.generation:04d}",
            storage_path=notes,
            failure_config=FailureConfig(
                max_failures=int(resources["max_failures"]),
                max_preemption_failures=int(resources["max_preemptions"]),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise PipelineError(
            f"{attempt.step_name}: the workers failed more often than max_failures={resources['max_failures']} allows; "
            f"last error: {_last_line(error)}. {stacks_left(attempt)}The same command goes on from the last checkpoint"
        ) from error


def stacks_left(attempt: Attempt) -> str:
    """Where the watchdog left what the workers were at, in a sentence; empty: it had no reason to."""
    found = any(True for _ in attempt.store.list(watchdog.FOLDER))
    return f"What they were at when they stood still: {attempt.store.uri}/{watchdog.FOLDER}. " if found else ""


def _last_line(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    text = str(next(iter(failures.values()))) if failures else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
