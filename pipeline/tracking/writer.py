"""Metrics while training: one background thread sends them; MLflow can never hurt a training run.

Names:  metrics `train/loss`, `throughput/images_per_s`, ...: MLflow draws one chart group per prefix. The x-axis is `global_step`.
Errors: none: `Tracker.log` never raises and never waits."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pipeline.tracking.connection import client_of, words_of
from pipeline.tracking.facts import log_tags, now_ms
from pipeline.tracking.words import METRICS_PER_CALL, chunks, mlflow_key, redact_text

QUEUE_MAX_POINTS = 50_000

log = logging.getLogger(__name__)


class Point(NamedTuple):
    """What was measured at one step. The time travels with it: MLflow stores a repeated call with equal times once."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


class Unsent(NamedTuple):
    """What a closed tracker could not deliver. The journal in the store has all of it; the next attempt's replay sends it."""

    points: tuple[Point, ...] = ()
    thinned: int = 0
    """Points given up because the queue was full for too long."""
    reason: str = ""


class Tracker(Protocol):
    """Where the training loop says what it measures; costs microseconds, never fails it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands over what was measured at `step`."""
        ...

    def close(self) -> Unsent:
        """Sends what is left, within a time bound; returns what could not be sent."""
        ...


class NullTracker:
    """For ranks above 0 and runs without tracking."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> Unsent:
        """Nothing to send, nothing unsent."""
        return Unsent()


class MlflowTracker:
    """Sends metrics from one background thread in few, large calls; the training loop only appends to a queue.

    A replay after a resume leaves no duplicates: the server is asked once up to which step it has each metric, and only later
    steps are sent. When it is away the queue fills; once full, every second point is given up, so that the curve gets
    coarser and goes on. NaN and infinity, which would spoil MLflow's charts, become the tag `mae.nonfinite.<metric>`."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        every_s: float = 2.0,
        close_within_s: float = 30.0,
        queue_max_points: int = QUEUE_MAX_POINTS,
    ) -> None:
        self._uri, self._run_id = uri, run_id
        self._every_s, self._close_within_s, self._queue_max_points = every_s, close_within_s, queue_max_points
        self._lock = threading.Lock()
        self._queue: deque[Point] = deque()
        self._in_flight: list[Point] = []
        self._nonfinite: dict[str, str] = {}
        self._sent_up_to: dict[str, int] | None = None
        self._thinned = 0
        self._failures = 0
        self._reason = ""
        self._deadline = math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """Calls that failed so far; each is tried again."""
        return self._failures

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues what was measured at `step`."""
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            for key in metrics.keys() - finite.keys():
                self._nonfinite[f"mae.nonfinite.{key}"] = f"{metrics[key]} at step {step}"
            if len(self._queue) >= self._queue_max_points:
                kept = list(self._queue)[::2]
                self._thinned += len(self._queue) - len(kept)
                self._queue = deque(kept)
            self._queue.append(Point(step, now_ms(), finite))

    def close(self) -> Unsent:
        """Sends what is left for at most `close_within_s`; returns what could not be sent."""
        self._deadline = time.monotonic() + self._close_within_s
        self._closing.set()
        self._thread.join(self._close_within_s)
        with self._lock:
            return Unsent((*self._in_flight, *self._queue), self._thinned, self._reason)

    def _write(self) -> None:
        pause = self._every_s
        while not self._closing.wait(pause):
            pause = self._every_s if self._send_queued() else min(2 * pause, 15 * self._every_s)
        while not self._send_queued() and time.monotonic() + self._every_s < self._deadline:
            time.sleep(self._every_s)

    def _send_queued(self) -> bool:
        """Sends until the queue is empty; False when a call failed and what it held is back in the queue."""
        while time.monotonic() < self._deadline:
            self._take_batch()
            if not self._in_flight and not self._nonfinite:
                return True
            try:
                self._send(self._in_flight)
            except Exception as cause:  # noqa: BLE001 - whatever MLflow raises, training goes on
                self._note_failure(cause)
                with self._lock:
                    self._queue.extendleft(reversed(self._in_flight))
                    self._in_flight = []
                return False
            with self._lock:
                self._in_flight = []
        return False

    def _take_batch(self) -> None:
        """Moves points from the queue, up to 1000 metrics of them (a point with more than that goes alone)."""
        count = 0
        with self._lock:
            while self._queue and (not self._in_flight or count + len(self._queue[0].metrics) <= METRICS_PER_CALL):
                count += len(self._queue[0].metrics)
                self._in_flight.append(self._queue.popleft())

    def _send(self, points: Sequence[Point]) -> None:
        client = client_of(self._uri)
        from mlflow.entities import Metric

        if self._sent_up_to is None:
            self._sent_up_to = _last_steps(client, self._run_id)
        floor = self._sent_up_to
        new = [
            Metric(mlflow_key(key), value, point.time_ms, point.step)
            for point in points
            for key, value in point.metrics.items()
            if point.step > floor.get(mlflow_key(key), -1)
        ]
        for batch in chunks(new, METRICS_PER_CALL):
            client.log_batch(self._run_id, metrics=batch, synchronous=True)
        tags = dict(self._nonfinite)
        log_tags(client, self._run_id, tags)
        with self._lock:
            self._nonfinite = {key: text for key, text in self._nonfinite.items() if tags.get(key) != text}

    def _note_failure(self, cause: Exception) -> None:
        self._failures += 1
        self._reason = words_of(cause)
        if self._failures == 1:
            log.warning(
                "tracking %s does not answer (%s); training goes on, metrics wait and are sent when it is back",
                redact_text(self._uri),
                self._reason,
            )


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    """For each metric of a run the highest step the server has: MLflow keeps that point as the metric's latest."""
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def open_tracker(uri: str, run_id: str) -> Tracker:
    """The tracker for an attempt's address and run; both empty means no tracking."""
    return MlflowTracker(uri, run_id) if uri and run_id else NullTracker()
