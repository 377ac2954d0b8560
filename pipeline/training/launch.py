"""Start the loop, as Ray Train's worker group (`ray_train.py`), as a plain Ray task (`ray_task.py`: one worker) or alone in this
process, and again when its workers must move.

A PipelineError is never retried: all workers return, rank 0 writes it down, and the stage that started them raises it.
Workers also save and return when their node is about to go, or when there is room for more of them. The group is then
started again on the nodes there are, and nothing is trained twice.
Errors: Stopped when asked to stop, or when there is no more room; Fenced; a worker's own PipelineError or ConfigError;
PipelineError when the training is given up. Unanswered, a PipelineError that is retried, if a worker does not come in time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline import errors
from pipeline.cluster.device import choose_device_here
from pipeline.errors import ConfigError, PipelineError, Stopped
from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker, node_metrics, open_tracker
from pipeline.training import ray_task, room
from pipeline.training.health.failures import FailureStreak, reason_to_give_up
from pipeline.training.health.stop_reasons import stop_on_sigterm_if_unhandled, stop_signal_of
from pipeline.training.loop.loop import TrainingResult, train
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import ELSEWHERE, Unanswered, enter_world, leave_launcher

RESULT = "trained.json"
"""The loop's result in the generation's directory: how a worker group answers the stage that started it."""


def run_training(spec: TrainSpec, attempt: Attempt) -> TrainingResult:
    """Train to the end. This is the one call that a stage makes."""
    # Once for all groups of workers: one whose GPU nodes are taken away must not go on without GPUs.
    attempt = _with_device_decided(attempt)
    if attempt.executor == "ray":
        decided = {"decode_workers": attempt.resources.decode_workers}
        spec = replace(spec, resources=spec.resources.model_copy(update=decided))
    # Counted here, because to Ray Train each of these groups has finished cleanly.
    preemptions = FailureStreak()
    # `fenced` never comes back here: the loop raises Fenced for it.
    while (result := _run_workers(spec, attempt)).stopped:
        where = f"{attempt.step_name}: stopped at step {result.global_step} of {result.total_steps}"
        saved = "saved; the same command goes on from there"
        if result.stopped == "asked":
            raise Stopped(f"{where}, {saved}")
        reason = ""
        if result.stopped == "preempted":
            reason = reason_to_give_up("preempted", preemptions.count_with(result.checkpoint_key), attempt.resources)
        if reason := reason or _reason_not_to_restart(attempt):
            raise Stopped(f"{where}: {reason}; {saved}")
    return result


def _with_device_decided(attempt: Attempt) -> Attempt:
    """Return the attempt with `use_gpu` decided, once for all groups of workers, and say what was decided."""
    if attempt.executor == "ray":
        return room.with_hardware_decided(attempt)
    resources = attempt.resources.model_copy(update={"workers": 1})  # this process
    choice = choose_device_here(resources).or_refuse()
    attempt.progress.say(choice.text)
    return replace(attempt, resources=attempt.resources.model_copy(update={"use_gpu": choice.use_gpu}))


def _run_workers(spec: TrainSpec, attempt: Attempt) -> TrainingResult:
    """Run one group of workers from the newest checkpoint to the end, or to where all of them agreed to stop."""
    attempt.store.delete(RESULT)  # the answer of an earlier call must not be taken for this one's
    if attempt.executor == "in_process":
        leave_launcher()
        run_worker(spec, attempt)
    elif attempt.resources.one_worker:
        ray_task.fit(run_worker, spec, attempt)
    else:
        from pipeline.training import ray_train  # takes seconds

        ray_train.fit(run_worker, spec, attempt)
    answer = json.loads(attempt.store.read(RESULT))
    if "error" in answer:
        # Only the class's name and the message travelled; the exit code depends on the class.
        raise getattr(errors, answer["error"], PipelineError)(answer["message"])
    return TrainingResult(**answer)


def _reason_not_to_restart(attempt: Attempt) -> str:
    """Return why workers that had to move cannot be restarted, or an empty string if they can."""
    if attempt.executor == "in_process":
        return "this process was told to end"
    return room.wait_for_room(attempt)


def run_worker(spec: TrainSpec, attempt: Attempt) -> None:
    """Run the loop as one worker of the world; rank 0 writes the answer to the store."""
    stop_on_sigterm_if_unhandled()
    resources = attempt.resources
    world = enter_world(use_gpu=resources.use_gpu is True, timeout_s=resources.collective_timeout_s)
    tracker = (
        open_tracker(attempt.tracking_uri, attempt.mlflow_run_id, attempt.store) if world.is_first else NullTracker()
    )
    answer: Mapping[str, Any]
    try:
        # one worker speaks for its node
        watched = attempt.tracking_uri if world.local_rank == 0 else ""
        with stop_signal_of(attempt, world) as stop_signal, node_metrics(watched, attempt.mlflow_run_id):
            answer = asdict(train(spec, attempt, world=world, tracker=tracker, stop_signal=stop_signal))
    except Unanswered:
        raise  # the workers cannot agree on an answer either, and starting them again may help
    except (PipelineError, ConfigError) as error:
        # Returned instead of raised: Ray Train would restart the group for it, and it would only happen again.
        answer = {"error": type(error).__name__, "message": str(error)}
    finally:
        tracker.close()
    answers = world.all_gather(answer)  # every rank comes here: the loop's errors are raised on all of them
    if world.is_first:
        attempt.store.write(RESULT, json.dumps(_first_error(answers) or answer).encode())


def _first_error(answers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the error of the worker that met it, rather than of those that only heard of it; None if there is none."""
    failed = [answer for answer in answers if "error" in answer]
    return next((answer for answer in failed if answer["message"] != ELSEWHERE), failed[0] if failed else None)
