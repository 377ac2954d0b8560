"""The journal of a training: what it measured, in the store first, whatever becomes of MLflow.

    g0007/journal/part-00000001.jsonl    one point a line: step, time, metrics; at most PART_POINTS, then the next part begins
                  sent.json              the MLflow run that has all of it; absent: something may still wait here
In a bucket nothing can be appended to, so the part at hand is written again, whole, with every batch. A part belongs to the
process that created it (put-if-absent); a later process of the same generation begins the next one.
Units: `time_ms` since 1970. Errors: StorageError; TrackingError when a part is no journal."""

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline.storage import MissingObject, Store
from pipeline.tracking.connection import TrackingError

FOLDER = "journal/"
SENT = f"{FOLDER}sent.json"
PART_POINTS = 500


class Point(NamedTuple):
    """What was measured at one step. The time travels with it: MLflow stores a repeated call with equal times once."""

    step: int
    time_ms: int
    metrics: Mapping[str, float] = {}
    rollbacks: int = 0
    """How often training had been taken back when it was measured: each opens another curve."""
    artifact: str = ""
    """Key, in the generation's directory, of a file to keep in MLflow too."""


class JournalCursor(NamedTuple):
    """Between two points of a journal: so many parts, and so many points of the next one, lie before it."""

    part: int = 0
    point: int = 0


class Journal:
    """The journal of one generation. Several threads may use it."""

    def __init__(self, store: Store) -> None:
        """`store`: the generation's directory."""
        self.store = store
        self._lock = threading.RLock()
        self._parts: list[str] | None = None
        self._own: list[Point] | None = None  # the points of the last part, when this process created it
        self._stood_at = (0, -1)

    def append(self, points: Sequence[Point]) -> None:
        """Writes points down; those below where an earlier process of this generation stood are here already."""
        with self._lock:
            self._append(points)

    def _append(self, points: Sequence[Point]) -> None:
        parts = self._open()
        new = [point for point in points if (point.rollbacks, point.step) >= self._stood_at]
        if new and self._own is None:
            self.store.delete(SENT)
        while new:
            if self._own is None or len(self._own) >= PART_POINTS:
                taken, new = new[:PART_POINTS], new[PART_POINTS:]
                self._own = self._begin(parts, taken)
                continue
            room = PART_POINTS - len(self._own)
            taken, new = new[:room], new[room:]
            grown = [*self._own, *taken]
            self.store.write(parts[-1], _text(grown))
            self._own = grown

    def after(self, place: JournalCursor) -> tuple[list[Point], JournalCursor]:
        """The points from a place to the end of their part, and the place behind them; none at the end of the journal."""
        with self._lock:
            return self._after(place)

    def _after(self, place: JournalCursor) -> tuple[list[Point], JournalCursor]:
        parts = self._open()
        while place.part < len(parts):
            points = self._points(place.part)[place.point :]
            if points:
                return points, JournalCursor(place.part, place.point + len(points))
            if place.part + 1 == len(parts):  # the last part may still grow
                break
            place = JournalCursor(place.part + 1)
        return [], place

    def waits_for(self, run_id: str) -> bool:
        """Whether this MLflow run may lack something of it; a step that never trained has no journal."""
        try:
            return bool(json.loads(self.store.read(SENT))["run"] != run_id)
        except MissingObject:
            return bool(self._open())

    def mark_sent(self, run_id: str) -> None:
        """Says that the MLflow run has all of it."""
        self.store.write(SENT, json.dumps({"run": run_id}).encode())

    def _open(self) -> list[str]:
        """Keys of the parts, in order."""
        if self._parts is None:
            parts = [info.key for info in self.store.list(f"{FOLDER}part-")]
            if parts:
                last = _points(self.store, parts[-1])[-1]
                self._stood_at = (last.rollbacks, last.step)
            self._parts = parts
        return self._parts

    def _begin(self, parts: list[str], points: Sequence[Point]) -> list[Point]:
        """The next part, created by this process and nobody else."""
        number = int(parts[-1].rpartition("-")[2].partition(".")[0]) if parts else 0
        while True:
            number += 1
            key = f"{FOLDER}part-{number:08d}.jsonl"
            created = self.store.create(key, _text(points))
            parts.append(key)
            if created:
                return list(points)

    def _points(self, part: int) -> list[Point]:
        parts = self._open()
        if self._own is not None and part == len(parts) - 1:
            return self._own
        return _points(self.store, parts[part])


def _text(points: Iterable[Point]) -> bytes:
    """A line a point; what is no number is text, which every reader of JSON takes."""
    lines = []
    for point in points:
        metrics = {key: value if math.isfinite(value) else str(value) for key, value in point.metrics.items()}
        said = {**point._asdict(), "metrics": metrics}
        lines.append(json.dumps({key: value for key, value in said.items() if value or key == "step"}) + "\n")
    return "".join(lines).encode()


def _points(store: Store, key: str) -> list[Point]:
    try:
        points = [Point(**json.loads(line)) for line in store.read(key).splitlines()]
        return [p._replace(metrics={name: float(value) for name, value in p.metrics.items()}) for p in points]
    except (ValueError, TypeError, AttributeError) as cause:
        raise TrackingError(
            f"{store.uri}/{key} is no journal ({cause}). Delete it: the curve lacks its points in MLflow then; "
            f"history.jsonl in the store has them"
        ) from cause
