"""Tables for a terminal: how a run ended, and what a run would do.

They are renderables of rich and print nothing themselves. Print them with soft_wrap=True: addresses
and details are lines of any length, which the terminal then wraps without a break in the text, so
that they can be copied."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.reporting.format import clock, count
from pipeline.reporting.summaries import PlanRow, Score, StepRow, pairs, remarks_on_scores, settings_of_scores

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


def closing_table(
    steps: Sequence[StepRow], *, scores: Sequence[Score] = (), addresses: Mapping[str, str]
) -> RenderableType:
    """Return how a run ended: its steps, its scores, and where to look.

    `addresses` is printed as it comes, such as `{"store": ..., "report": ..., "tracking": ...}`."""
    parts: list[RenderableType] = [_steps_table(steps), ""]
    if details := {step.name: step.detail for step in steps if step.detail}:
        parts += [_lines(details), ""]
    if scores:
        parts += [_scores_table(scores), ""]
    if remarks := settings_of_scores(scores) | remarks_on_scores(scores):
        parts += [_lines(remarks), ""]
    return Group(*parts, _lines(addresses))


def _steps_table(steps: Sequence[StepRow]) -> Table:
    table = plain_table(["step", "state"], numbers=["time"], rest=["fingerprint"])
    for step in steps:
        name = Text(step.name, style="bold")
        table.add_row(name, state_text(step.state), clock(step.seconds), step.fingerprint[:12])
    return table


def _lines(texts: Mapping[str, str]) -> RenderableType:
    """Return one uncut line per name: the name, then its text."""
    width = max(map(len, texts), default=0)
    lines = [Text.assemble((f"{name:<{width}}  ", "dim"), text) for name, text in texts.items()]
    for line in lines:
        line.no_wrap, line.overflow = True, "ignore"
    return Group(*lines)


def _scores_table(scores: Sequence[Score]) -> Table:
    encoders = list(dict.fromkeys(score.encoder for score in scores))
    table = plain_table(["dataset", "protocol"], numbers=[*encoders, "difference", "seeds", "test", "labels"])
    for (dataset, protocol), group in pairs(scores).items():
        cells = [_score(group.get(encoder)) for encoder in encoders]
        seeds = max(len(score.values) for score in group.values())
        held = next(iter(group.values()))  # both encoders are scored on the same images
        tested = None if held.measure else held.images  # a measure may be of training images
        sizes = ("–" if number is None else count(number) for number in (tested, held.labels))
        table.add_row(Text(dataset), Text(protocol), *cells, _difference(group), str(seeds), *sizes)
    return table


def _score(score: Score | None) -> Text:
    return Text("–") if score is None else Text(score.text, style="bold" if score.encoder == "pretrained" else "")


def _difference(group: Mapping[str, Score]) -> Text:
    if "pretrained" not in group or "random" not in group:
        return Text("")
    better = group["pretrained"].mean > group["random"].mean
    return Text(group["pretrained"].above(group["random"]), style="green" if better else "red")


def plan_table(rows: Sequence[PlanRow]) -> RenderableType:
    """Return what `mae run` would do, step by step, and why. A number that is unknown for every step has no column."""
    known_numbers = {
        "memory": ["–" if row.memory_gib is None else f"{row.memory_gib:.1f} GiB" for row in rows],
        "time": [clock(row.seconds) for row in rows],
        "cost": [row.cost or "–" for row in rows],
    }
    numbers = {name: cells for name, cells in known_numbers.items() if set(cells) != {"–"}}
    rest = [] if "cost" in numbers else ["fingerprint"]  # both do not fit into 80 columns
    table = plain_table(["step", "plan"], numbers=list(numbers), rest=rest)
    for index, row in enumerate(rows):
        cells = [column[index] for column in numbers.values()] + [row.fingerprint[:12] for _ in rest]
        table.add_row(Text(row.name, style="bold"), state_text(row.state), *cells)
    differs = {row.name: row.differs for row in rows if row.differs}
    why = [Text("\ndiffers from the nearest finished step in", style="dim"), _lines(differs)] if differs else []
    to_run = [row for row in rows if row.state == "to_run"]
    known = [row.seconds for row in to_run if row.seconds is not None]
    total = f", about {clock(sum(known))}" if known else ""
    return Group(table, *why, Text(f"\n{len(to_run)} of {len(rows)} steps to run{total}"))


def plain_table(words: Sequence[str], *, numbers: Sequence[str], rest: Sequence[str] = ()) -> Table:
    """Return an empty table in the style of all tables here; `numbers` are right-aligned, `rest` is dimmed."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name in words:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in rest:
        table.add_column(name, no_wrap=True, style="dim")
    return table


def state_text(state: str, *, words: str | None = None) -> Text:
    """Return a state with its symbol and colour; `words` replace its name."""
    symbol, style = SYMBOLS[state]
    return Text(f"{symbol} {state.replace('_', ' ') if words is None else words}", style=style)
