"""Starts the loop: as Ray Train's worker group (on_ray.py), or alone in this process; and again when its workers must move.

A person's error (PipelineError) is not retried: all workers return, rank 0 writes it down, and the coordinating stage raises it.
Workers whose node is about to go, or beside which there is room for more, save and return as well: the group is then started
anew on what there is, and nothing is trained twice.
Errors: Stopped when asked to stop, or when there is no room any more; Fenced; a worker's own PipelineError or ConfigError;
PipelineError when the training is given up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline import errors
from pipeline.errors import ConfigError, PipelineError, Stopped
from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker, open_tracker
from pipeline.training.health.failures import Restarts, verdict
from pipeline.training.health.stop_reasons import listen_when_alone, supervise
from pipeline.training.loop.loop import Trained, train
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import ELSEWHERE, enter_world

RESULT = "trained.json"
"""What the loop returned, in the generation's directory: how a worker group answers the stage that started it."""


def run_training(spec: TrainSpec, attempt: Attempt) -> Trained:
    """Trains to the end; the stage's one call."""
    if attempt.executor == "ray":
        from pipeline.training import ray_train as on_ray

        attempt = on_ray.decided(attempt)
    moves = Restarts()
    while (trained := _once(spec, attempt)).stopped:
        where = f"{attempt.step_name}: stopped at step {trained.global_step} of {trained.total_steps}"
        saved = "saved; the same command goes on from there"
        if trained.stopped == "asked":
            raise Stopped(f"{where}, {saved}")
        why = ""
        if trained.stopped == "preempted":
            why = verdict("preempted", moves.after(trained.checkpoint_key), attempt.resources)
        if why := why or _no_way_on(attempt):
            raise Stopped(f"{where}: {why}; {saved}")
    return trained


def _once(spec: TrainSpec, attempt: Attempt) -> Trained:
    """From the newest checkpoint to the end, or to where all workers agreed to stop."""
    attempt.store.delete(RESULT)  # an earlier call's answer must not be taken for this one's
    if attempt.executor == "in_process":
        work(spec, attempt)
    else:
        from pipeline.training import ray_train as on_ray

        on_ray.fit(work, spec, attempt)
    answer = json.loads(attempt.store.read(RESULT))
    if "error" in answer:
        raise getattr(errors, answer["error"], PipelineError)(answer["message"])
    return Trained(**answer)


def _no_way_on(attempt: Attempt) -> str:
    """Why workers that had to move cannot be started elsewhere; empty: they can."""
    if attempt.executor == "in_process":
        return "this process was told to end"
    from pipeline.training import ray_train as on_ray

    return on_ray.await_room(attempt)


def work(spec: TrainSpec, attempt: Attempt) -> None:
    """One worker: joins the world, runs the loop; rank 0 writes the answer."""
    listen_when_alone()
    world = enter_world()
    tracker = (
        open_tracker(attempt.tracking_uri, attempt.mlflow_run_id, attempt.store) if world.is_first else NullTracker()
    )
    answer: Mapping[str, Any]
    try:
        answer = asdict(train(spec, attempt, world=world, tracker=tracker, supervisor=supervise(attempt, world)))
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
