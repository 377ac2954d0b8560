"""Progress of running steps, from any worker of the cluster to the driver's terminal.

An actor beside the driver keeps the newest update of each step; the driver polls it. Updates may be lost, and a failing actor
never fails a step: progress is for the eye, results are in the store."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pipeline.cluster.connection import on_this_node


class Progress(Protocol):
    """Where a stage reports how far it is. Cheap to call often; never fails the stage."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Report `done` of `total` units. `fields` are shown beside the bar (loss=0.61, images_per_s=512)."""
        ...

    def say(self, text: str) -> None:
        """Show a line about the step, for something that is worth one."""
        ...


class Update(NamedTuple):
    """How far a step is."""

    done: int
    total: int
    unit: str
    fields: Mapping[str, float]


class Reports(NamedTuple):
    """What steps have reported since it was last asked."""

    updates: Mapping[str, Update]
    """The newest of each step."""
    lines: Sequence[tuple[str, str]]
    """(step, text), in the order in which they were said."""


class _Board:
    """The actor that keeps the newest update of every running step, and every line."""

    def __init__(self) -> None:
        self.updates: dict[str, Update] = {}
        self.lines: list[tuple[str, str]] = []

    def put(self, step: str, update: Update) -> None:
        self.updates[step] = update

    def say(self, step: str, text: str) -> None:
        self.lines.append((step, text))

    def take(self) -> Reports:
        # swapped in one go; an actor runs one call at a time, so nothing is lost in between
        reports, self.updates, self.lines = Reports(self.updates, self.lines), {}, []
        return reports


class ProgressBoard:
    """The driver's end: hands out writers for steps and takes in what they report."""

    def __init__(self) -> None:
        import ray

        # no CPU: the workers may hold them all, and the actor would wait for one
        self.actor = ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(_Board).remote()

    def writer(self, step_name: str) -> Progress:
        """Return the `Progress` to hand to the stage of a step; it can be pickled."""
        return _BoardWriter(self.actor, step_name)

    def take(self) -> Reports:
        """Return what steps have reported since the last call; nothing if the actor does not answer."""
        import ray

        try:
            # a lost actor must not hold the driver up
            return Reports(*ray.get(self.actor.take.remote(), timeout=10))
        except ray.exceptions.RayError:
            return Reports({}, [])


class _BoardWriter:
    """A stage's end: sends at most five updates per second, and the final one always."""

    def __init__(self, actor: Any, step_name: str) -> None:
        self.actor, self.step_name, self.sent_at = actor, step_name, 0.0

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        now = time.monotonic()
        if now - self.sent_at >= 0.2 or done >= total:
            self.sent_at = now
            # not awaited: the next update replaces a lost one
            self.actor.put.remote(self.step_name, Update(done, total, unit, fields))

    def say(self, text: str) -> None:
        self.actor.say.remote(self.step_name, text)
