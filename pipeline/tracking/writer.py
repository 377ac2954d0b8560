"""Metrics while training: the loop appends to a queue; one thread writes it to the journal, another sends that to MLflow.

Names:  metrics `train/loss`, `throughput/images_per_s`, ...: MLflow draws one chart group per prefix. The x-axis is `global_step`.
Errors: none: MLflow can never hurt a training run. `Tracker.log` never raises and never waits."""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.storage import Store
from pipeline.tracking.connection import words_of
from pipeline.tracking.journal import Journal, Point
from pipeline.tracking.mlflow_format import redact_text
from pipeline.tracking.records import now_ms
from pipeline.tracking.sender import Sender

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where the training loop says what it measures; costs microseconds, never fails it."""

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Once, before the first `log`: what the checkpoint's history holds, so that no death leaves a hole in the curve."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands over what was measured at `step`."""
        ...

    def keep(self, step: int, key: str) -> None:
        """Names a file in the generation's directory, made at `step`, that MLflow is to have too."""
        ...

    def rolled_back(self, to_step: int) -> None:
        """Training goes on from `to_step` with other values than before: its curve begins anew there, in a child run of its own."""
        ...

    def close(self) -> bool:
        """Sends what is left, within a time bound; whether MLflow has all of it now."""
        ...


class NullTracker:
    """For ranks above 0 and runs without tracking."""

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Does nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def keep(self, step: int, key: str) -> None:
        """Does nothing."""

    def rolled_back(self, to_step: int) -> None:
        """Does nothing."""

    def close(self) -> bool:
        """Nothing to send, nothing unsent."""
        return True


class JournalTracker:
    """Journal first, then MLflow; while MLflow is away (or has no run for us: `run_id` empty) the journal grows and waits.

    What waits when it is closed, or killed, is sent by the next attempt, or by the next `mae run`, which finds the step done."""

    def __init__(
        self, uri: str, run_id: str, store: Store, *, every_s: float = 2.0, close_within_s: float = 30.0
    ) -> None:
        """`store`: the generation's directory."""
        self._uri, self._run_id = uri, run_id
        self._every_s, self._close_within_s = every_s, close_within_s
        self._journal = Journal(store)
        self._sender = Sender(uri, run_id, self._journal)
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # of the journal: batches stay in order
        self._queue: list[Point] = []
        self._rollbacks = 0
        self._failures = 0
        self._deadline = math.inf
        self._closing = threading.Event()
        self._all_sent = False
        self._sending = threading.Thread(target=self._keep_sending, name="mlflow-sender", daemon=True)
        self._sending.start()
        # of its own: a server that hangs holds a call for 20 s and more, and the journal must not wait for it
        threading.Thread(target=self._keep_writing, name="journal-writer", daemon=True).start()

    @property
    def failures(self) -> int:
        """Calls to MLflow that failed so far; each is tried again."""
        return self._failures

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Queues the history; the journal takes what it does not have."""
        self._rollbacks = rollbacks
        self._put(*(point._replace(rollbacks=rollbacks) for point in points))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues what was measured at `step`."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._put(Point(step, now_ms(), numbers, self._rollbacks))

    def keep(self, step: int, key: str) -> None:
        """Queues the file's name."""
        self._put(Point(step, now_ms(), rollbacks=self._rollbacks, artifact=key))

    def rolled_back(self, to_step: int) -> None:
        """Queues the beginning of another curve."""
        self._rollbacks += 1
        self._put(Point(to_step, now_ms(), rollbacks=self._rollbacks))

    def close(self) -> bool:
        """Writes the journal to its end, then waits at most `close_within_s` for MLflow."""
        self._deadline = time.monotonic() + self._close_within_s
        self._write_down()
        self._closing.set()
        self._sending.join(self._close_within_s)
        if not self._all_sent:
            log.warning(
                "tracking %s does not have the whole curve yet: it waits in %s/journal; the next `mae run` of this "
                "configuration sends it",
                redact_text(self._uri),
                self._journal.store.uri,
            )
        return self._all_sent

    def _put(self, *points: Point) -> None:
        with self._lock:
            self._queue += points

    def _keep_writing(self) -> None:
        while not self._closing.wait(self._every_s):
            self._write_down()

    def _keep_sending(self) -> None:
        pause_s = self._every_s
        while not self._closing.wait(pause_s):
            pause_s = self._every_s if self._send() else min(2 * pause_s, 15 * self._every_s)
        while not self._finish() and time.monotonic() + self._every_s < self._deadline:
            time.sleep(self._every_s)

    def _write_down(self) -> None:
        """Moves the queue into the journal; what the store does not take stays queued."""
        with self._writing:
            with self._lock:
                taken, self._queue = self._queue, []
            try:
                if taken:
                    self._journal.append(taken)
            except Exception as cause:  # noqa: BLE001 - whatever the store raises, training goes on
                log.warning("the journal cannot be written, trying again: %s", cause)
                with self._lock:
                    self._queue = taken + self._queue

    def _send(self) -> bool:
        """Sends the journal to its end; False when a call failed, or time was up."""
        if not self._run_id:
            return True
        try:
            while time.monotonic() < self._deadline:
                if not self._sender.send_next():
                    return True
        except Exception as cause:  # noqa: BLE001 - whatever MLflow raises, training goes on
            self._failures += 1
            if self._failures == 1:
                log.warning(
                    "tracking %s does not answer (%s); training goes on, metrics wait in the journal and are sent when it is back",
                    redact_text(self._uri),
                    words_of(cause),
                )
        return False

    def _finish(self) -> bool:
        """The last of it; True: there is nothing to try again."""
        self._write_down()
        if not self._run_id:
            return True
        if not self._send() or self._queue:
            return False
        try:
            self._journal.mark_sent(self._run_id)
        except Exception as cause:  # noqa: BLE001 - it only means that the next run looks again
            log.warning("%s", cause)
        self._all_sent = True
        return True


def open_tracker(uri: str, run_id: str, store: Store) -> Tracker:
    """The tracker of an attempt: MLflow's address, the step's run, the generation's directory; no address: no tracking."""
    return JournalTracker(uri, run_id, store) if uri else NullTracker()
