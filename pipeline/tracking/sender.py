"""From the journal to MLflow: in few, large calls, and of each metric only steps above the highest one that MLflow has.

So a journal may be sent again from its beginning by whoever comes later, and no point is there twice: a replay is deterministic,
and MLflow cannot delete. After a rollback (`Point.rollbacks`) values differ from those sent: they go to a child run of their own.
NaN and infinity, which would spoil MLflow's charts, become the tag `mae.nonfinite.<metric>`.
Errors: whatever MLflow raises; `deliver` alone turns it into TrackingError."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.storage import Store
from pipeline.tracking.connection import clear_errors, client_of
from pipeline.tracking.journal import Journal, JournalCursor, Point
from pipeline.tracking.mlflow_format import METRICS_PER_CALL, chunks, mlflow_key
from pipeline.tracking.records import log_tags
from pipeline.tracking.runs import child_after


@dataclass
class _Curve:
    """A run, and up to which step it has each metric."""

    run_id: str
    sent_up_to: dict[str, int]


class Sender:
    """Sends a journal, as it grows, to the run of its step."""

    def __init__(self, uri: str, run_id: str, journal: Journal) -> None:
        self.uri, self.run_id, self.journal = uri, run_id, journal
        self.place = JournalCursor()
        self._curves: dict[int, _Curve] = {}

    def send_next(self) -> bool:
        """Sends a part of the journal, or what of it is new; False: there was nothing to send."""
        points, behind = self.journal.after(self.place)
        try:
            for rollbacks, group in groupby(points, key=lambda point: point.rollbacks):
                self._send(rollbacks, list(group))
        except Exception:
            self._curves.clear()  # nobody knows what came through: ask anew
            raise
        self.place = behind
        return bool(points)

    def _send(self, rollbacks: int, points: Sequence[Point]) -> None:
        client = client_of(self.uri)
        from mlflow.entities import Metric

        if rollbacks not in self._curves:
            run_id = child_after(self.uri, self.run_id, rollbacks=rollbacks, to_step=points[0].step)
            self._curves[rollbacks] = _Curve(run_id, _last_steps(client, run_id))
        curve = self._curves[rollbacks]
        values = [
            Metric(mlflow_key(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.metrics.items()
        ]
        finite = [value for value in values if math.isfinite(value.value)]
        for batch in chunks([v for v in finite if v.step > curve.sent_up_to.get(v.key, -1)], METRICS_PER_CALL):
            client.log_batch(curve.run_id, metrics=batch, synchronous=True)
        for value in finite:
            curve.sent_up_to[value.key] = max(value.step, curve.sent_up_to.get(value.key, -1))
        strange = [value for value in values if not math.isfinite(value.value)]
        log_tags(client, curve.run_id, {f"mae.nonfinite.{v.key}": f"{v.value} at step {v.step}" for v in strange})
        for point in points:
            if point.artifact:
                _keep(client, curve.run_id, self.journal.store, point.artifact)


def deliver(store: Store, uri: str, run_id: str) -> None:
    """Sends what MLflow lacks of a finished generation's journal; `store`: its directory. Errors: TrackingError, StorageError."""
    journal = Journal(store)
    with clear_errors(uri, "sending a curve"):
        sender = Sender(uri, run_id, journal)
        while sender.send_next():
            pass
    journal.mark_sent(run_id)


def _keep(client: Any, run_id: str, store: Store, key: str) -> None:
    """Copies an object of the store into the run's artifacts, under its key; one that is there already stays."""
    folder, _, name = key.rpartition("/")
    if any(item.path == key for item in client.list_artifacts(run_id, folder or None)):
        return
    with tempfile.TemporaryDirectory(prefix="mae-artifact-") as scratch:
        path = Path(scratch) / name
        store.download(key, path)
        client.log_artifact(run_id, str(path), artifact_path=folder or None)


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    """For each metric of a run the highest step the server has: MLflow keeps that point as the metric's latest."""
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}
