"""The one importer of ray outside training/on_ray.py: connect, run plain functions as tasks, progress, jobs.

Coordinating code reserves 0 CPUs, so that two training workers fit on two cores. In executor `in_process` nothing of
Ray is imported.
Errors: PipelineError when a cluster cannot be reached; a task's own PipelineError comes out as itself."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.cluster.connection import beside_us


class Progress(Protocol):
    """Where a stage says how far it is; cheap, may be called often, never fails the stage."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """`done` of `total` units; `fields` are shown beside the bar (loss=0.61, images_per_s=512)."""
        ...


class _Board:
    """The actor that holds the newest word of every step under way."""

    def __init__(self) -> None:
        self.words: dict[str, tuple[int, int, str, Mapping[str, float]]] = {}

    def put(self, step: str, word: tuple[int, int, str, Mapping[str, float]]) -> None:
        self.words[step] = word

    def take(self) -> dict[str, tuple[int, int, str, Mapping[str, float]]]:
        words, self.words = self.words, {}
        return words


class ProgressBoard:
    """Carries progress from wherever a stage runs to the terminal of the driver."""

    def __init__(self) -> None:
        import ray

        self.actor = ray.remote(num_cpus=0, scheduling_strategy=beside_us())(_Board).remote()

    def writer(self, step_name: str) -> Progress:
        """What the stage of this step is handed."""
        return _BoardWriter(self.actor, step_name)

    def take(self) -> dict[str, tuple[int, int, str, Mapping[str, float]]]:
        """The words since the last call: step -> (done, total, unit, fields); none when the board does not answer."""
        import ray

        try:
            return dict(ray.get(self.actor.take.remote(), timeout=10))
        except ray.exceptions.RayError:
            return {}


class _BoardWriter:
    """A stage's end of the board; at most five words a second, the last one always."""

    def __init__(self, actor: Any, step_name: str) -> None:
        self.actor, self.step_name, self.sent_at = actor, step_name, 0.0

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        now = time.monotonic()
        if now - self.sent_at >= 0.2 or done >= total:
            self.sent_at = now
            self.actor.put.remote(self.step_name, (done, total, unit, fields))
