"""The journal of a training run: its metrics, written to the store before they go to MLflow.

    g0007/journal/part-00000001.jsonl    one point per line (step, time, metrics), at most PART_POINTS lines per part
                  sent.json              names the MLflow run that has the whole journal; absent while points may be unsent
Buckets do not support appending, so each batch rewrites the current part as a whole; small parts bound that cost. A part
belongs to the process that created it (put-if-absent); a later process of the same generation starts the next part.
Units: `time_ms` in milliseconds since 1970. Errors: StorageError; TrackingError for a damaged part."""

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pipeline.errors import TrackingError
from pipeline.storage import MissingObject, Store

FOLDER = "journal/"
SENT = f"{FOLDER}sent.json"
PART_POINTS = 500


class Point(NamedTuple):
    """The metrics of one step.

    The time is part of the point, because MLflow drops a repeated point only if its time is the same too."""

    step: int
    time_ms: int
    metrics: Mapping[str, float] = {}
    rollbacks: int = 0
    """Rollbacks before this point was measured; each one starts a new curve."""
    artifact: str = ""
    """Key, within the generation's directory, of a file to copy to MLflow."""


class JournalCursor(NamedTuple):
    """A position between two points of a journal: `part` whole parts, and `point` points of the next one, precede it."""

    part: int = 0
    point: int = 0


class Journal:
    """The journal of one generation. Threads may share it."""

    def __init__(self, store: Store) -> None:
        """`store` is the generation's directory."""
        self.store = store
        # the writer appends while the sender reads
        self._lock = threading.RLock()
        self._parts: list[str] | None = None
        self._own_points: list[Point] | None = None  # of the last part, if this process created it
        self._written_to = (0, -1)  # (rollbacks, step) of the last point that earlier processes wrote

    def append(self, points: Sequence[Point]) -> None:
        """Append points, except those that an earlier process of this generation has already written."""
        with self._lock:
            self._append(points)

    def _append(self, points: Sequence[Point]) -> None:
        parts = self._open()
        # >=: metrics and a file may share a step, and MLflow drops a point that it already has
        new = [point for point in points if (point.rollbacks, point.step) >= self._written_to]
        if new and self._own_points is None:  # the first points of this process: MLflow no longer has everything
            self.store.delete(SENT)
        while new:
            if self._own_points is None or len(self._own_points) >= PART_POINTS:
                batch, new = new[:PART_POINTS], new[PART_POINTS:]
                self._own_points = self._begin(parts, batch)
                continue
            room = PART_POINTS - len(self._own_points)
            batch, new = new[:room], new[room:]
            grown = [*self._own_points, *batch]
            self.store.write(parts[-1], _encode(grown))
            # only now: if the write fails, the tracker offers the same points again
            self._own_points = grown

    def after(self, cursor: JournalCursor) -> tuple[list[Point], JournalCursor]:
        """Return the points from a cursor to the end of its part, and the cursor behind them; no points at the journal's end."""
        with self._lock:
            return self._after(cursor)

    def _after(self, cursor: JournalCursor) -> tuple[list[Point], JournalCursor]:
        parts = self._open()
        while cursor.part < len(parts):
            points = self._part_points(cursor.part)[cursor.point :]
            if points:
                return points, JournalCursor(cursor.part, cursor.point + len(points))
            if cursor.part + 1 == len(parts):  # the last part may still grow
                break
            # an earlier part is final: this process or another has begun the next one
            cursor = JournalCursor(cursor.part + 1)
        return [], cursor

    def has_unsent(self, run_id: str) -> bool:
        """Return whether this MLflow run may lack points of the journal; a step that never trained has no journal."""
        try:
            return bool(json.loads(self.store.read(SENT))["run"] != run_id)
        except MissingObject:
            return bool(self._open())

    def mark_sent(self, run_id: str) -> None:
        """Record that this MLflow run has the whole journal."""
        self.store.write(SENT, json.dumps({"run": run_id}).encode())

    def _open(self) -> list[str]:
        """Return the keys of the parts, in order."""
        if self._parts is None:
            parts = [info.key for info in self.store.list(f"{FOLDER}part-")]
            if parts:
                # the last line is enough, as points come in order
                last = _read_part(self.store, parts[-1])[-1]
                self._written_to = (last.rollbacks, last.step)
            self._parts = parts
        return self._parts

    def _begin(self, parts: list[str], points: Sequence[Point]) -> list[Point]:
        """Create the next part, one that belongs to this process alone.

        Never waits: each iteration skips a part that another process has created."""
        number = int(parts[-1].rpartition("-")[2].partition(".")[0]) if parts else 0
        while True:
            number += 1
            # created with its points: a part that existed while still empty would have no last line to read
            key = f"{FOLDER}part-{number:08d}.jsonl"
            created = self.store.create(key, _encode(points))
            parts.append(key)
            if created:
                return list(points)

    def _part_points(self, part: int) -> list[Point]:
        parts = self._open()
        if self._own_points is not None and part == len(parts) - 1:
            return self._own_points
        return _read_part(self.store, parts[part])


def _encode(points: Iterable[Point]) -> bytes:
    """Return one JSON line per point. NaN and infinity become strings, since JSON has no such numbers."""
    lines = []
    for point in points:
        metrics = {key: value if math.isfinite(value) else str(value) for key, value in point.metrics.items()}
        record = {**point._asdict(), "metrics": metrics}
        # fields that are empty or zero are left out; Point's defaults bring them back
        lines.append(json.dumps({key: value for key, value in record.items() if value or key == "step"}) + "\n")
    return "".join(lines).encode()


def _read_part(store: Store, key: str) -> list[Point]:
    try:
        points = [Point(**json.loads(line)) for line in store.read(key).splitlines()]
        # float() also reads "nan" and "inf" back
        return [p._replace(metrics={name: float(value) for name, value in p.metrics.items()}) for p in points]
    except (ValueError, TypeError, AttributeError) as cause:
        raise TrackingError(
            f"{store.uri}/{key} is damaged ({cause}). Delete it: MLflow's curve will lack its points, "
            "but history.jsonl in the store has them"
        ) from cause
