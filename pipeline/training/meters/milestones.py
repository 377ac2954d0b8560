"""Scores of checkpoints while training goes on, on CPUs and GPUs that nobody has claimed.

A thread of rank 0 hears of every commit and hands the newest checkpoint to a task, one at a time. A checkpoint that is overtaken by
a newer one before its turn is dropped and counted, and so is one that fails: scores along the way are for the eye, and never hold
up or end a training. What was scored lies in the step's directory, for retention and for whoever continues:

    milestones/step-00001000.json    {"step": 1000, "scores": {"loss": 0.41, "knn": 0.52, ...}, "seconds": 12.3}

Units: seconds; loss as in training, accuracies in [0, 1]."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from pipeline.cluster.tasks import Handle, start_if_free
from pipeline.errors import PipelineError
from pipeline.graph.step import Attempt
from pipeline.storage import Store
from pipeline.training.checkpoints.format import step_of
from pipeline.training.checkpoints.retention import MILESTONES, PINS
from pipeline.training.spec.train_spec import CheckpointScorer

DEVICES: tuple[tuple[Literal["cuda", "cpu"], Mapping[str, float]], ...] = (
    ("cuda", {"CPU": 1.0, "GPU": 1.0}),
    ("cpu", {"CPU": 1.0}),
)
"""Where a checkpoint is scored, best first, and what that takes of a node."""
PIN = f"{PINS}milestone.json"
LIMIT_S = 1800.0
"""How long scoring may take, the start of its process included."""
_ASK_EVERY_S = 1.0

log = logging.getLogger(__name__)


Start = Callable[[CheckpointScorer, str, str], Handle | None]
"""(scorer, root_uri, key) -> the task, or None while nothing is free for it."""


def start_on_free_device(scorer: CheckpointScorer, root_uri: str, key: str) -> Handle | None:
    """Start to score a checkpoint on the best device that is free."""
    for device, need in DEVICES:
        if handle := start_if_free(scorer, root_uri, key, device, need=need):
            return handle
    return None


class Milestones:
    """Scores checkpoints as they are committed. Without a scorer it does nothing."""

    def __init__(self, scorer: CheckpointScorer | None, attempt: Attempt, start: Start = start_on_free_device) -> None:
        self.attempt, self.start = attempt, start
        self.dropped = 0
        """Checkpoints that were not scored."""
        self.latest: Mapping[str, float] = {}
        """Scores of the newest checkpoint that was scored."""
        self._new: dict[str, float] = {}
        self._waiting, self._closed = "", False
        self._changed = threading.Condition()
        self._thread = (
            threading.Thread(target=self._run, args=[scorer], name="milestones", daemon=True) if scorer else None
        )
        if self._thread:
            self._thread.start()

    def committed(self, key: str) -> None:
        """Hear of a checkpoint. Returns at once."""
        with self._changed:
            self.dropped += bool(self._waiting)
            self._waiting = key
            self._changed.notify()

    def take(self) -> dict[str, float]:
        """Return what became known since the last call: `step`, scores and the number of dropped ones; empty if nothing did."""
        with self._changed:
            taken, self._new = self._new, {}
            return taken

    def close(self) -> None:
        """End the thread and what it has started; the checkpoint that is being scored is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join(timeout=10 * _ASK_EVERY_S)

    def _run(self, scorer: CheckpointScorer) -> None:
        with contextlib.suppress(PipelineError):
            self.attempt.root.delete(PIN)  # of an attempt that was killed while it scored
        while key := self._next():
            began = time.monotonic()
            try:
                scores = self._scored(scorer, key)
            except Exception as error:  # noqa: BLE001 - a training of days must not lose its curve to one bad checkpoint
                log.warning("%s: checkpoint %s is not scored: %s", self.attempt.step_name, key, error)
                scores = None
            with self._changed:
                if scores is None:
                    self.dropped += 1
                    continue
                self.latest = scores
                self._new = {"step": float(step_of(key)), **scores, "dropped": float(self.dropped)}
            record(self.attempt.root, key, scores, seconds=time.monotonic() - began)

    def _next(self) -> str:
        """Wait for a checkpoint to score; return its key, or an empty string at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            key, self._waiting = self._waiting, ""
            return "" if self._closed else key

    def _scored(self, scorer: CheckpointScorer, key: str) -> Mapping[str, float] | None:
        """Return the scores of a checkpoint, or None if it was overtaken before it could start, or if training ended."""
        root = self.attempt.root
        root.write(PIN, json.dumps({"checkpoint": key, "why": "scored"}).encode())  # retention leaves it in place
        handle: Handle | None = None
        try:
            deadline = time.monotonic() + LIMIT_S
            while not self._closed and time.monotonic() < deadline:
                if handle is None:
                    if self._waiting:
                        return None
                    handle = self.start(scorer, self.attempt.root_uri, key)
                if handle is None:
                    self._wait_for_room()
                elif handle.ready(timeout_s=_ASK_EVERY_S):
                    finished, handle = handle, None
                    scores: Mapping[str, float] = finished.result()
                    return scores
            if not self._closed:
                log.warning("%s: checkpoint %s was not scored within %g s", self.attempt.step_name, key, LIMIT_S)
            return None
        finally:
            if handle:
                handle.cancel()
            root.delete(PIN)

    def _wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout=5 * _ASK_EVERY_S)


def record(root: Store, key: str, scores: Mapping[str, float], *, seconds: float) -> None:
    """Write down the scores of a checkpoint, unless another attempt has."""
    body = {"step": step_of(key), "scores": dict(scores), "seconds": round(seconds, 3)}
    with contextlib.suppress(PipelineError):  # MLflow and the history have them too
        root.create(f"{MILESTONES}step-{step_of(key):08d}.json", json.dumps(body).encode())
