"""Where the time of steps goes: the loop's thread by phase, and the GPU by marks in its stream. Neither clock waits for anything.

A GPU's step has five marks; the kernels between two of them need not follow each other without gaps, which no mark shows.

    begin    the passes may begin, once the copy of their micro-batches in another stream has ended
    copied   the passes are about to be queued
    passed   the reads of losses and norms are; the host then waits for the GPU and for the other ranks
    judged   the optimiser is
    end

Units: seconds."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

_CAUGHT_UP = 0.02
"""A GPU that is behind its host by less than this share of the passes has been waiting for it."""
Phase = Literal["profile", "data", "agree", "compile", "forward", "backward", "check", "step", "log", "save"]
"""What the loop's thread is doing."""
Mark = Literal["begin", "copied", "passed", "judged", "end"]


class PhaseClock:
    """Enters phases of the watchdog, and adds up how long the loop's thread spends in each."""

    def __init__(self, phase: Callable[[Phase], AbstractContextManager[None]]) -> None:
        self._phase = phase
        self._seconds: dict[Phase, float] = {}

    @contextmanager
    def __call__(self, name: Phase) -> Iterator[None]:
        """Watch and time the body."""
        began = time.perf_counter()
        try:
            with self._phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def take(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last call; a phase that is under way counts in the next."""
        taken, self._seconds = self._seconds, {}
        return taken


class GpuTimes(NamedTuple):
    """What a GPU did during some steps, by its own clock. The first four add up to all the time."""

    passes_s: float = 0.0
    copies_s: float = 0.0
    optimizer_s: float = 0.0
    idle_s: float = 0.0
    """Between steps, and while the host judges one: the stream is empty but for the reads of losses and norms."""
    starved_s: float = 0.0
    """Of `passes_s`: in steps whose passes the GPU had finished when the host had just queued them."""

    @property
    def all_s(self) -> float:
        """All the time that the steps took."""
        return self.passes_s + self.copies_s + self.optimizer_s + self.idle_s

    @property
    def busy(self) -> float:
        """Share of the time in passes and optimiser, gaps between their kernels included."""
        return (self.passes_s + self.optimizer_s) / self.all_s

    @property
    def host_bound(self) -> float:
        """Share of the time in which the GPU waits for the host to queue work, with the passes of starved steps as a whole."""
        return (self.idle_s + self.starved_s) / self.all_s


class GpuClock:
    """Marks in the current stream of a GPU. On a CPU it does nothing."""

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None) -> None:
        """`event` makes an object like `torch.cuda.Event`; None: a CUDA event, or nothing without CUDA."""
        self._event = event or (_cuda_event if device.type == "cuda" else None)
        self._steps: deque[dict[Mark, tuple[Any, float]]] = deque()  # event, and when the host queued it
        self._last_end: Any = None

    def mark(self, name: Mark) -> None:
        """Put a mark behind all that has been queued."""
        if not self._event:
            return
        if name == "begin":
            if self._steps and "end" not in self._steps[-1]:
                self._steps.pop()  # a step that failed half way
            self._steps.append({})
        event = self._event()
        event.record()
        self._steps[-1][name] = event, time.perf_counter()

    def take(self) -> GpuTimes | None:
        """Return the times of the steps that the GPU has finished since the last call; None if there are none."""
        times = GpuTimes()
        # Asked, not waited for: steps that are still in the queue count in the next row.
        while self._steps and "end" in self._steps[0] and self._steps[0]["end"][0].query():
            step = self._steps.popleft()
            events = {name: event for name, (event, _) in step.items()}
            copies, passes, judging, optimizer = (a.elapsed_time(b) / 1000 for a, b in pairwise(events.values()))
            before = self._last_end.elapsed_time(events["begin"]) / 1000 if self._last_end else 0.0
            # Both clocks agree at `judged`, which the host queues when the stream is empty. So the difference between their
            # times since `passed` is how far the GPU was behind the host then.
            behind = step["judged"][1] - step["passed"][1] - judging
            starved = passes if behind < _CAUGHT_UP * passes else 0.0
            more = GpuTimes(passes, copies, optimizer, before + judging, starved)
            times = GpuTimes(*(sum(pair) for pair in zip(times, more, strict=True)))
            self._last_end = events["end"]
        return times if times.all_s else None


def _cuda_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def compile_seconds() -> float:
    """Return how long this process has spent in torch.compile so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported here: that takes seconds, and compiles nothing
    return float(dynamo.calculate_time_spent()["total_wall_time"]) if dynamo else 0.0
