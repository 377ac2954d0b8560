"""Progress of the steps that are running.

Everything goes to standard error, because standard output belongs to results. On a terminal every
running step is one live line, and a finished one stays above it as plain text. Elsewhere (CI, a
log file) each running step prints a line about every ten seconds.
Units: seconds; `images_per_s` over all workers; `loss` as the stage reports it.
Why not rich.progress: docs/decisions/016-progress-bars.md."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from pipeline.reporting.format import clock, count
from pipeline.reporting.summaries import StepState
from pipeline.reporting.terminal import state_text

PLAIN_EVERY_S = 10.0
RATE_OVER_S = 30.0
WIDE = 105
"""Terminal columns from which a live line has room for every field."""


class _RunningStep:
    """How far a step is, and how fast.

    The rate covers the last half minute, because a resumed step does not start at zero."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.began, self.printed_at = name, now, now
        self.done, self.total, self.unit = 0, 0, ""
        self.fields: dict[str, float] = {}
        self.samples: deque[tuple[float, int]] = deque()

    def update(self, now: float, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        if unit != self.unit or done < self.done:  # another phase, or a restart from an earlier checkpoint
            self.samples.clear()
        self.done, self.total, self.unit, self.fields = done, total, unit, dict(fields)
        if "eta_s" in fields:  # foreseen before any work: the time until the next update says nothing about the rate
            return
        self.samples.append((now, done))
        # Two samples stay however old they are, so that a step with an update per minute has a rate too.
        while now - self.samples[0][0] > RATE_OVER_S and len(self.samples) > 2:
            self.samples.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second."""
        (first, before), (last, after) = (self.samples[0], self.samples[-1]) if self.samples else ((0.0, 0), (0.0, 0))
        return (after - before) / (last - first) if last > first and after > before else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left: what the stage says, else what the rate gives."""
        if "eta_s" in self.fields:
            return self.fields["eta_s"]
        return (self.total - self.done) / self.rate if self.rate and self.total else None

    @property
    def percent(self) -> str:
        return f"{min(self.done / self.total, 1.0):.0%}" if self.total else ""

    @property
    def amount(self) -> str:
        if self.total:
            return f"{count(self.done)}/{count(self.total)} {self.unit}"
        return f"{count(self.done)} {self.unit}" if self.done else ""

    @property
    def speed(self) -> str:
        given = self.fields.get("images_per_s")
        rate, unit = (given, "images") if given is not None else (self.rate, self.unit)
        return "" if rate is None else f"{count(rate) if rate >= 10 else f'{rate:.1f}'} {unit}/s"

    @property
    def eta(self) -> str:
        return "" if self.eta_s is None else f"ETA {clock(self.eta_s)}"

    def extras(self, most: int | None = None) -> str:
        """Return the other fields by name, the first `most` of them."""
        shown = [(key, value) for key, value in self.fields.items() if key not in {"images_per_s", "eta_s"}]
        return "  ".join(f"{key} {value:.4g}" for key, value in shown[:most])

    def line(self, now: float) -> str:
        """Return everything without colours, for a log."""
        parts = [self.percent, self.amount, self.speed, self.extras(), self.eta, f"elapsed {clock(now - self.began)}"]
        return f"{self.name}: " + ", ".join(part for part in parts if part)


class ProgressDisplay:
    """Shows the steps of a run while it is entered. Any thread may call it; a call costs microseconds."""

    def __init__(self, *, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._now = now
        self._running: dict[str, _RunningStep] = {}
        # reentrant: printing while the live display is on draws `_lines` in the same thread
        self._lock = threading.RLock()
        self._live = Live(
            get_renderable=self._lines,
            console=self._console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,  # belongs to results
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Record that `done` of `total` units are done (a total of 0 is unknown).

        `images_per_s` and `eta_s` in `fields` replace the measured rate and the time left; all
        others are shown by name."""
        with self._lock:
            now = self._now()
            step = self._running.setdefault(step_name, _RunningStep(step_name, now))
            step.update(now, done, total, unit, fields)
            if not self._console.is_terminal and now - step.printed_at >= PLAIN_EVERY_S:
                step.printed_at = now
                self._print(Text(step.line(now)))

    def step_state(self, step_name: str, state: StepState, *, detail: str = "") -> None:
        """Record that a step began (`running`) or ended (any other state), with the reason where there is one."""
        with self._lock:
            now = self._now()
            if state == "running":
                self._running[step_name] = _RunningStep(step_name, now)
                about = f"  {detail}" if detail else ""
                if not self._console.is_terminal:
                    self._print(Text(f"{step_name}: running{about}"))
                elif detail:
                    self._print(Text(f"{step_name}:{about}", style="dim"))
                return
            step = self._running.pop(step_name, None)
            took = f"  {clock(now - step.began)}" if step else ""
            about = f"  {detail}" if detail else ""
            if self._console.is_terminal:
                self._print(Text.assemble(state_text(state, words=""), (step_name, "bold"), took, (about, "dim")))
            else:
                self._print(Text(f"{step_name}: {state}{took}{about}"))

    def show(self, what: RenderableType) -> None:
        """Print a table above the live lines."""
        with self._lock:
            self._console.print(what, soft_wrap=True)

    def for_step(self, step_name: str) -> "StepProgress":
        """Return the `Progress` that a stage is handed."""
        return StepProgress(self, step_name)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _lines(self) -> RenderableType:
        """Draw the running steps. The width is asked each time, since a window may be resized."""
        with self._lock:
            now = self._now()
            narrow = self._console.width < WIDE
            grid = Table.grid(
                Column(no_wrap=True, style="bold", max_width=19 if narrow else None),
                Column(ratio=1, min_width=6 if narrow else 8),
                *(Column(justify="right", no_wrap=True) for _ in range(4)),
                Column(justify="right", no_wrap=True, style="dim"),
                padding=(0, 1),
                expand=True,
            )
            for step in self._running.values():
                bar = ProgressBar(
                    total=step.total or None,
                    completed=step.done,
                    pulse=not step.total,
                    complete_style="blue",
                    animation_time=now,
                )
                amount, extras = (
                    (step.percent or step.amount, step.extras(2)) if narrow else (step.amount, step.extras())
                )
                elapsed = "" if narrow and step.eta else clock(now - step.began)
                grid.add_row(Text(step.name), bar, amount, step.speed, extras, step.eta, elapsed)
            return grid


class StepProgress:
    """One step's view of the display; fits `pipeline.graph.step.Progress`."""

    def __init__(self, display: ProgressDisplay, step_name: str) -> None:
        self._display, self._step_name = display, step_name

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Pass an update on under the step's name."""
        self._display.update(self._step_name, done, total, unit, fields)

    def say(self, text: str) -> None:
        """Print a line above the live lines, under the step's name."""
        self._display.show(Text(f"{self._step_name}: {text}"))
