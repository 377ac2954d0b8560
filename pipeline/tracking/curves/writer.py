"""Metrics of a training run: the loop fills a queue, one thread moves it to the journal, another sends the journal to MLflow.

Metrics are named like `train/loss` and `throughput/images_per_s`: MLflow draws one chart group per prefix, over
`global_step`. Nothing here raises, so that MLflow can never fail a training run, and `Tracker.log` never waits."""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from pipeline.storage import Store
from pipeline.tracking.connection import root_cause
from pipeline.tracking.curves.journal import Journal, Point
from pipeline.tracking.curves.sender import Sender
from pipeline.tracking.mlflow_format import redact_text
from pipeline.tracking.records import now_ms

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the metrics of the training loop. Calls cost microseconds and never raise; `close` alone waits."""

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Pass the checkpoint's history, once and before the first `log`, so that a crash leaves no gap in the curve."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass the metrics of `step`."""
        ...

    def keep(self, step: int, key: str) -> None:
        """Name a file in the generation's directory, written at `step`, to be copied to MLflow."""
        ...

    def rolled_back(self, to_step: int) -> None:
        """Start a new curve in a child run of its own: training continues from `to_step`, with other values than before."""
        ...

    def close(self) -> bool:
        """Send the rest within a time limit; return whether MLflow now has everything."""
        ...


class NullTracker:
    """The tracker of ranks above 0 and of runs without tracking."""

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Do nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def keep(self, step: int, key: str) -> None:
        """Do nothing."""

    def rolled_back(self, to_step: int) -> None:
        """Do nothing."""

    def close(self) -> bool:
        """Return True: nothing is left to send."""
        return True


class JournalTracker:
    """Writes to the journal first, then to MLflow. While MLflow is away, or `run_id` is empty, the journal just grows.

    What is unsent when the tracker is closed or killed goes to MLflow with the next attempt, or with the next `mae run`,
    which finds the step done."""

    def __init__(
        self, uri: str, run_id: str, store: Store, *, every_s: float = 2.0, close_within_s: float = 30.0
    ) -> None:
        """`store`: the generation's directory."""
        self._uri, self._run_id = uri, run_id
        self._every_s, self._close_within_s = every_s, close_within_s
        self._journal = Journal(store)
        self._sender = Sender(uri, run_id, self._journal)
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # held from queue to journal, so that batches stay in order
        self._queue: list[Point] = []
        self._rollbacks = 0
        self._failures = 0
        self._deadline = math.inf
        self._closing = threading.Event()
        self._all_sent = False
        self._sender_thread = threading.Thread(target=self._send_until_closed, name="mlflow-sender", daemon=True)
        self._sender_thread.start()
        # a second thread, because a hanging server holds a call for 20 s and more, and the journal must not wait for it
        threading.Thread(target=self._write_until_closed, name="journal-writer", daemon=True).start()

    @property
    def failures(self) -> int:
        """The number of failed calls to MLflow so far; each is retried."""
        return self._failures

    def resume(self, points: Sequence[Point], *, rollbacks: int = 0) -> None:
        """Queue the history; the journal skips what it already has."""
        self._rollbacks = rollbacks
        self._enqueue(*(point._replace(rollbacks=rollbacks) for point in points))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of `step`."""
        # float(): a tensor or NumPy scalar would keep memory, and JSON takes neither
        numbers = {name: float(value) for name, value in metrics.items()}
        self._enqueue(Point(step, now_ms(), numbers, self._rollbacks))

    def keep(self, step: int, key: str) -> None:
        """Queue the file's key."""
        self._enqueue(Point(step, now_ms(), rollbacks=self._rollbacks, artifact=key))

    def rolled_back(self, to_step: int) -> None:
        """Queue the start of a new curve."""
        self._rollbacks += 1
        self._enqueue(Point(to_step, now_ms(), rollbacks=self._rollbacks))

    def close(self) -> bool:
        """Write the rest of the journal, then wait at most `close_within_s` for MLflow.

        The journal takes as long as the store's own retries may last (docs/storage.md)."""
        self._deadline = time.monotonic() + self._close_within_s
        self._flush()
        self._closing.set()
        self._sender_thread.join(self._close_within_s)
        if not self._all_sent:
            log.warning(
                "MLflow at %s does not have the whole curve yet: the rest waits in %s/journal, and the next `mae run` of "
                "this configuration sends it",
                redact_text(self._uri),
                self._journal.store.uri,
            )
        return self._all_sent

    def _enqueue(self, *points: Point) -> None:
        # the lock is held for a list's +=, no longer, since the training loop calls this
        with self._lock:
            self._queue += points

    def _write_until_closed(self) -> None:
        while not self._closing.wait(self._every_s):
            self._flush()

    def _send_until_closed(self) -> None:
        pause_s = self._every_s
        while not self._closing.wait(pause_s):  # closing ends the pause at once
            pause_s = self._every_s if self._send() else min(2 * pause_s, 15 * self._every_s)
        while not self._finish() and time.monotonic() + self._every_s < self._deadline:
            time.sleep(self._every_s)

    def _flush(self) -> None:
        """Move the queue to the journal; points that cannot be stored stay queued."""
        with self._writing:
            # only for the swap: `log` must not wait while the store is written
            with self._lock:
                batch, self._queue = self._queue, []
            try:
                if batch:
                    self._journal.append(batch)
            except Exception as cause:  # noqa: BLE001 - whatever the store raises, training goes on
                log.warning("metrics cannot be written to the journal, trying again: %s", cause)
                with self._lock:
                    # in front: newer points may have come meanwhile
                    self._queue = batch + self._queue

    def _send(self) -> bool:
        """Send the journal to its end; return False if a call failed or the deadline passed."""
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
                    "MLflow at %s does not answer (%s): training goes on, and metrics wait in the journal until it does",
                    redact_text(self._uri),
                    root_cause(cause),
                )
        return False

    def _finish(self) -> bool:
        """Send what is left; return True if there is nothing to try again."""
        self._flush()
        if not self._run_id:
            return True
        if not self._send() or self._queue:  # or points came while it was sending
            return False
        try:
            self._journal.mark_sent(self._run_id)
        except Exception as cause:  # noqa: BLE001 - the next run only has to look again
            log.warning("the journal is sent but cannot be marked as sent, so the next run checks it again: %s", cause)
        self._all_sent = True
        return True


def open_tracker(uri: str, run_id: str, store: Store) -> Tracker:
    """Return the tracker of an attempt, given MLflow's address, the step's run and the generation's directory.

    An empty address means no tracking."""
    return JournalTracker(uri, run_id, store) if uri else NullTracker()
