"""Send the journal to MLflow, in few, large calls.

Of each metric only the steps above the highest one in MLflow are sent. A later process can therefore send a journal again
from its beginning without duplicating a point, which MLflow could not delete. That is sound because a replay after a resume
is deterministic. After a rollback (`Point.rollbacks`) the values differ, and go to a child run of their own.
NaN and infinity, which would spoil MLflow's charts, become the tag `mae.nonfinite.<metric>`.
Errors: whatever MLflow raises; only `deliver` turns it into a TrackingError."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.storage import Store
from pipeline.tracking.connection import client_of, translate_errors
from pipeline.tracking.curves.journal import Journal, JournalCursor, Point
from pipeline.tracking.mlflow_format import METRICS_PER_CALL, chunks, mlflow_key
from pipeline.tracking.names import CURVE, KIND_TAG
from pipeline.tracking.records import last_steps, log_curve, log_tags
from pipeline.tracking.runs import child_after, parents_of

LOSS, IMAGES = "train/loss", "train/images_seen"
"""Names of the training loop's metrics."""


@dataclass
class _Curve:
    """A run, with the highest step it has of each metric."""

    run_id: str
    sent_up_to: dict[str, int]


class Sender:
    """Sends a growing journal to the run of its step."""

    def __init__(self, uri: str, run_id: str, journal: Journal) -> None:
        self.uri, self.run_id, self.journal = uri, run_id, journal
        self.cursor = JournalCursor()
        self._curves: dict[int, _Curve] = {}
        self._parents: list[str] | None = None

    def send_next(self) -> bool:
        """Send the next part of the journal, or what is new in it; return False if there was nothing to send."""
        # the cursor moves only after everything was sent: a failed call is repeated from here
        points, next_cursor = self.journal.after(self.cursor)
        try:
            for rollbacks, group in groupby(points, key=lambda point: point.rollbacks):
                self._send(rollbacks, list(group))
        except Exception:
            # some points may have arrived, and a parent may be gone: ask MLflow again
            self._curves.clear()
            self._parents = None
            raise
        self.cursor = next_cursor
        return bool(points)

    def _send(self, rollbacks: int, points: Sequence[Point]) -> None:
        client = client_of(self.uri)
        from mlflow.entities import Metric

        if rollbacks not in self._curves:
            run_id = child_after(self.uri, self.run_id, rollbacks=rollbacks, to_step=points[0].step)
            self._curves[rollbacks] = _Curve(run_id, last_steps(client, run_id))
        curve = self._curves[rollbacks]
        values = [
            Metric(mlflow_key(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.metrics.items()
        ]
        finite = [value for value in values if math.isfinite(value.value)]
        for batch in chunks([v for v in finite if v.step > curve.sent_up_to.get(v.key, -1)], METRICS_PER_CALL):
            # synchronous: an asynchronous call reports its failure to nobody
            client.log_batch(curve.run_id, metrics=batch, synchronous=True)
        for value in finite:
            curve.sent_up_to[value.key] = max(value.step, curve.sent_up_to.get(value.key, -1))
        nonfinite = [value for value in values if not math.isfinite(value.value)]
        log_tags(client, curve.run_id, {f"mae.nonfinite.{v.key}": f"{v.value} at step {v.step}" for v in nonfinite})
        self._send_to_parents(client, points)
        for point in points:
            if point.artifact:
                _copy_artifact(client, curve.run_id, self.journal.store, point.artifact)

    def _send_to_parents(self, client: Any, points: Sequence[Point]) -> None:
        """Draw the curve of pretraining on the runs that the step belongs to, too, by images seen."""
        if self._parents is None:
            kind = client.get_run(self.run_id).data.tags.get(KIND_TAG)
            self._parents = parents_of(self.uri, self.run_id) if kind == "pretrain" else []
        curve = [
            (int(point.metrics[IMAGES]), point.metrics[LOSS], point.time_ms)
            for point in points
            if {IMAGES, LOSS} <= point.metrics.keys()
        ]
        for parent in self._parents if curve else ():
            log_curve(self.uri, parent, CURVE, curve)


def deliver(store: Store, uri: str, run_id: str) -> None:
    """Send what MLflow lacks of a finished generation's journal; `store` is the generation's directory.

    Errors: TrackingError, StorageError."""
    journal = Journal(store)
    with translate_errors(uri, "sending a curve"):
        sender = Sender(uri, run_id, journal)
        while sender.send_next():
            pass
    journal.mark_sent(run_id)


def _copy_artifact(client: Any, run_id: str, store: Store, key: str) -> None:
    """Copy an object of the store to the run's artifacts, under its key, unless it is already there."""
    folder, _, name = key.rpartition("/")
    if any(item.path == key for item in client.list_artifacts(run_id, folder or None)):
        return
    with tempfile.TemporaryDirectory(prefix="mae-artifact-") as scratch:
        path = Path(scratch) / name
        store.download(key, path)
        client.log_artifact(run_id, str(path), artifact_path=folder or None)
