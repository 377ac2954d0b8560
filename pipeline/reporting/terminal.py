"""What a person at a terminal sees: progress while steps run, one table when they are done, one for a plan.

Everything goes to stderr: stdout belongs to results. On a terminal each running step is one live line and a finished one stays as
plain text above; elsewhere (CI, `> log`) each running step says one line about every ten seconds.
Units: seconds; `images_per_s` over all workers; `loss` as the stage reports it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from pipeline.reporting.format import clock, count
from pipeline.reporting.summaries import PlanRow, Score, StepRow, StepState, pairs

SYMBOLS: Mapping[str, tuple[str, str]] = {
    "done": ("✓", "green"),
    "cached": ("≡", "cyan"),
    "running": ("▸", "blue"),
    "to_run": ("▸", "blue"),
    "failed": ("✗", "red"),
    "stopped": ("■", "yellow"),
    "blocked": ("·", "yellow"),
    "waiting": ("·", "dim"),
}
PLAIN_EVERY_S = 10.0
RATE_OVER_S = 30.0
WIDE = 105


class _Running:
    """How far one step is, and how fast: the rate is over the last half minute, since a resume starts above zero."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.began, self.said = name, now, now
        self.done, self.total, self.unit = 0, 0, ""
        self.fields: dict[str, float] = {}
        self.seen: deque[tuple[float, int]] = deque()

    def update(self, now: float, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        if unit != self.unit or done < self.done:
            self.seen.clear()
        self.done, self.total, self.unit, self.fields = done, total, unit, dict(fields)
        self.seen.append((now, done))
        while now - self.seen[0][0] > RATE_OVER_S and len(self.seen) > 2:
            self.seen.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second."""
        (first, before), (last, after) = (self.seen[0], self.seen[-1]) if self.seen else ((0.0, 0), (0.0, 0))
        return (after - before) / (last - first) if last > first and after > before else None

    @property
    def eta_s(self) -> float | None:
        """Seconds to go: as given, else from the rate."""
        if "eta_s" in self.fields:
            return self.fields["eta_s"]
        return (self.total - self.done) / self.rate if self.rate and self.total else None

    @property
    def percent(self) -> str:
        return f"{min(self.done / self.total, 1.0):.0%}" if self.total else ""

    @property
    def amount(self) -> str:
        return f"{count(self.done)}/{count(self.total)} {self.unit}" if self.total else ""

    @property
    def speed(self) -> str:
        given = self.fields.get("images_per_s")
        rate, unit = (given, "images") if given is not None else (self.rate, self.unit)
        return "" if rate is None else f"{count(rate) if rate >= 10 else f'{rate:.1f}'} {unit}/s"

    def extras(self, most: int | None = None) -> str:
        """The other fields by name, the first `most` of them."""
        shown = [(key, value) for key, value in self.fields.items() if key not in {"images_per_s", "eta_s"}]
        return "  ".join(f"{key} {value:.4g}" for key, value in shown[:most])

    def line(self, now: float) -> str:
        """All of it without colours, for a log."""
        eta = f"ETA {clock(self.eta_s)}" if self.eta_s is not None else ""
        parts = [self.percent, self.amount, self.speed, self.extras(), eta]
        return f"{self.name}: " + ", ".join(part for part in [*parts, f"elapsed {clock(now - self.began)}"] if part)


class ProgressDisplay:
    """Shows the steps of a run while it is entered. Any thread may call it; it costs a stage microseconds."""

    def __init__(self, *, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._now = now
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._live = Live(
            get_renderable=self._lines,
            console=self._console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
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
        """`done` of `total` units; `images_per_s` and `eta_s` in `fields` are believed, all others shown by name."""
        with self._lock:
            now = self._now()
            step = self._running.setdefault(step_name, _Running(step_name, now))
            step.update(now, done, total, unit, fields)
            if not self._console.is_terminal and now - step.said >= PLAIN_EVERY_S:
                step.said = now
                self._say(Text(step.line(now)))

    def step_state(self, step_name: str, state: StepState, *, detail: str = "") -> None:
        """A step began (`running`) or ended (any other state), with the reason where there is one."""
        with self._lock:
            now = self._now()
            if state == "running":
                self._running[step_name] = _Running(step_name, now)
                if not self._console.is_terminal:
                    self._say(Text(f"{step_name}: running"))
                return
            step = self._running.pop(step_name, None)
            took = f"  {clock(now - step.began)}" if step else ""
            about = f"  {detail}" if detail else ""
            if self._console.is_terminal:
                self._say(Text.assemble(_state(state, words=""), (step_name, "bold"), took, (about, "dim")))
            else:
                self._say(Text(f"{step_name}: {state}{took}{about}"))

    def for_step(self, step_name: str) -> "StepProgress":
        """The `Progress` that a stage is handed."""
        return StepProgress(self, step_name)

    def _say(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _lines(self) -> RenderableType:
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
                eta = f"ETA {clock(step.eta_s)}" if step.eta_s is not None else ""
                amount, extras = (step.percent, step.extras(2)) if narrow else (step.amount, step.extras())
                elapsed = "" if narrow and eta else clock(now - step.began)
                grid.add_row(Text(step.name), bar, amount, step.speed, extras, eta, elapsed)
            return grid


class StepProgress:
    """One step's view of the display; fits `pipeline.graph.step.Progress`."""

    def __init__(self, display: ProgressDisplay, step_name: str) -> None:
        self._display, self._step_name = display, step_name

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Passes it on under the step's name."""
        self._display.update(self._step_name, done, total, unit, fields)


def closing_table(
    steps: Sequence[StepRow], *, scores: Sequence[Score] = (), addresses: Mapping[str, str]
) -> RenderableType:
    """How a run ended: its steps, its scores, and where to look (`{"store": ..., "report": ..., "tracking": ...}`).

    Print it with soft_wrap=True: addresses and details are lines of any length, which the terminal breaks and a person can copy."""
    parts: list[RenderableType] = [_steps_table(steps), ""]
    if details := {step.name: step.detail for step in steps if step.detail}:
        parts += [_lines(details), ""]
    if scores:
        parts += [_scores_table(scores), ""]
    return Group(*parts, _lines(addresses))


def _steps_table(steps: Sequence[StepRow]) -> Table:
    table = plain_table(["step", "state"], numbers=["time"], rest=["fingerprint"])
    for step in steps:
        name = Text(step.name, style="bold")
        table.add_row(name, _state(step.state), clock(step.seconds), step.fingerprint[:12])
    return table


def _lines(said: Mapping[str, str]) -> RenderableType:
    """A line each: the name, and what is said of it, whole."""
    width = max(map(len, said), default=0)
    lines = [Text.assemble((f"{name:<{width}}  ", "dim"), text) for name, text in said.items()]
    for line in lines:
        line.no_wrap, line.overflow = True, "ignore"
    return Group(*lines)


def _scores_table(scores: Sequence[Score]) -> Table:
    encoders = list(dict.fromkeys(score.encoder for score in scores))
    table = plain_table(["dataset", "protocol"], numbers=[*encoders, "difference", "seeds"])
    for (dataset, protocol), group in pairs(scores).items():
        cells = [_score(group.get(encoder)) for encoder in encoders]
        seeds = max(len(score.values) for score in group.values())
        table.add_row(Text(dataset), Text(protocol), *cells, _difference(group), str(seeds))
    return table


def _score(score: Score | None) -> Text:
    return Text("–") if score is None else Text(score.text, style="bold" if score.encoder == "pretrained" else "")


def _difference(group: Mapping[str, Score]) -> Text:
    if "pretrained" not in group or "random" not in group:
        return Text("")
    points = 100 * (group["pretrained"].mean - group["random"].mean)
    return Text(f"{points:+.1f}".replace("-", "−"), style="green" if points > 0 else "red")


def plan_table(rows: Sequence[PlanRow]) -> RenderableType:
    """What `mae run` would do, step by step, and why. Numbers that nobody knows have no column. Print it with soft_wrap=True."""
    known_numbers = {
        "memory": ["–" if row.memory_gib is None else f"{row.memory_gib:.1f} GiB" for row in rows],
        "time": [clock(row.seconds) for row in rows],
        "cost": [row.cost or "–" for row in rows],
    }
    numbers = {name: cells for name, cells in known_numbers.items() if set(cells) != {"–"}}
    rest = [] if "cost" in numbers else ["fingerprint"]  # 80 columns do not hold both
    table = plain_table(["step", "plan"], numbers=list(numbers), rest=rest)
    for index, row in enumerate(rows):
        cells = [column[index] for column in numbers.values()] + [row.fingerprint[:12] for _ in rest]
        table.add_row(Text(row.name, style="bold"), _state(row.state), *cells)
    differs = {row.name: row.differs for row in rows if row.differs}
    why = [Text("\ndiffers from the nearest finished step in", style="dim"), _lines(differs)] if differs else []
    to_run = [row for row in rows if row.state == "to_run"]
    known = [row.seconds for row in to_run if row.seconds is not None]
    total = f", about {clock(sum(known))}" if known else ""
    return Group(table, *why, Text(f"\n{len(to_run)} of {len(rows)} steps to run{total}"))


def plain_table(words: Sequence[str], *, numbers: Sequence[str], rest: Sequence[str] = ()) -> Table:
    """An empty table of the house's looks; numbers stand to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in rest:
        table.add_column(name, no_wrap=True, style="dim")
    return table


def _state(state: str, *, words: str | None = None) -> Text:
    symbol, style = SYMBOLS[state]
    return Text(f"{symbol} {state.replace('_', ' ') if words is None else words}", style=style)
