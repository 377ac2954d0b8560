"""The members of a sweep beside each other, with published figures where there are some, and the tables of a terminal.

Units: scores are fractions as in `Score`; published figures are per cent, as papers print them; seconds of wall-clock time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.reporting.format import clock
from pipeline.reporting.summaries import PlanState, Score
from pipeline.reporting.terminal import plain_table

RowState = Literal["run", "configured only", "failed", "not built"]
SYMBOLS: Mapping[RowState, tuple[str, str]] = {
    "run": ("✓", "green"),
    "configured only": ("·", "dim"),
    "failed": ("✗", "red"),
    "not built": ("–", "dim"),
}
Column = tuple[str, str]
"""(dataset, protocol) of a score."""


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A member of a sweep, or a published row that no member can have."""

    label: str
    state: RowState
    point: Mapping[str, Any] = field(default_factory=dict)
    """What it sets, by dotted field."""
    loss: float | None = None
    """At the end of pretraining."""
    scores: Sequence[Score] = ()
    paper: Mapping[str, float] = field(default_factory=dict)
    """Published accuracy by protocol, per cent."""
    report: str = ""
    """Address of its own page."""
    remark: str = ""
    """Why it failed or is not built."""

    def score(self, column: Column, encoder: str = "pretrained") -> Score | None:
        """Return its score in a column."""
        return next((s for s in self.scores if (s.dataset, s.protocol) == column and s.encoder == encoder), None)


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """A sweep and how far it is."""

    name: str
    title: str
    rows: Sequence[SweepRow]
    source: str = ""
    """Where the published figures are from."""
    setting: str = ""
    """What they were measured with."""

    @property
    def varied(self) -> str:
        """The one field that the members' labels name, `mask_ratio`; an empty string where there are several, or other labels."""
        fields = {row.label.partition("=")[0] for row in self.rows if row.point}
        alone = len(fields) == 1 and all(len(row.point) == 1 and "=" in row.label for row in self.rows if row.point)
        return fields.pop() if alone else ""

    def short(self, row: SweepRow) -> str:
        """Return a row's label, or the value alone where the heading names the field."""
        return row.label.removeprefix(f"{self.varied}=") if self.varied else row.label

    @property
    def columns(self) -> list[Column]:
        """What was scored, in order of first appearance."""
        return list(dict.fromkeys((s.dataset, s.protocol) for row in self.rows for s in row.scores))

    @property
    def random(self) -> dict[Column, Score]:
        """Scores of the random encoder that all members share; those that differ between members are left out."""
        found: dict[Column, list[Score | None]] = {
            column: [row.score(column, "random") for row in self.rows if row.scores] for column in self.columns
        }
        return {
            column: scores[0]
            for column, scores in found.items()
            if scores[0] is not None and all(score == scores[0] for score in scores)
        }

    def published(self, column: Column) -> str:
        """Return the protocol of the paper that a column can be held against, or an empty string."""
        told = {protocol for row in self.rows for protocol in row.paper}
        return next((name for name in (column[1], COMPARED_WITH.get(column[1], "")) if name in told), "")

    @property
    def published_alone(self) -> list[str]:
        """Published protocols that stand beside no column, because nothing was scored with them yet."""
        beside = {self.published(column) for column in self.columns}
        return [name for name in dict.fromkeys(name for row in self.rows for name in row.paper) if name not in beside]


COMPARED_WITH: Mapping[str, str] = {"linear_online": "linear"}
"""Our protocol -> what the paper calls it, where the words differ."""


def heading(column: Column, columns: Sequence[Column]) -> str:
    """Return a column's name: the protocol, and the dataset where there are several."""
    return column[1] if len({dataset for dataset, _ in columns}) == 1 else f"{column[1]} {column[0]}"


def sweep_table(sweep: SweepTable) -> RenderableType:
    """Return the members, what they scored, and the published figures beside it. Print it with soft_wrap=True."""
    columns, alone = sweep.columns, sweep.published_alone
    names: list[str] = []
    for column in columns:
        names += [heading(column, columns), *(["paper"] if sweep.published(column) else [])]
    table = plain_table(
        [sweep.varied or "member", "state"], numbers=["loss", *names, *(f"paper: {name}" for name in alone)]
    )
    for row in sweep.rows:
        cells = ["–" if row.loss is None else f"{row.loss:.4f}"]
        for column in columns:
            score, published = row.score(column), sweep.published(column)
            cells += [
                "–" if score is None else score.text,
                *([_percent(row.paper.get(published))] if published else []),
            ]
        cells += [_percent(row.paper.get(name)) for name in alone]
        table.add_row(Text(sweep.short(row), style="bold"), _state(row.state), *cells)
    if sweep.random:
        cells = [""]
        for column in columns:
            score = sweep.random.get(column)
            cells += [score.text if score else "", *([""] if sweep.published(column) else [])]
        table.add_row(Text("random", style="dim"), "", *cells, *("" for _ in alone))
    remarks = [Text(f"{row.label}: {row.state}, {row.remark}") for row in sweep.rows if row.remark]
    paper = (
        [Text(f"paper: {'; '.join(filter(None, (sweep.source, sweep.setting)))}", style="dim")] if sweep.source else []
    )
    return Group(table, *([Text("")] if remarks or paper else []), *remarks, *paper)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _state(state: RowState) -> Text:
    symbol, style = SYMBOLS[state]
    return Text(f"{symbol} {state}", style=style)


@dataclass(frozen=True, kw_only=True)
class PlannedMember:
    """What a sweep would do for a member."""

    label: str
    states: Sequence[tuple[str, PlanState]]
    """(fingerprint, state) of its steps."""
    seconds: float | None
    """Of its trainings that would run; None if that is unknown."""


def sweep_plan_table(members: Sequence[PlannedMember], *, seconds: float | None) -> RenderableType:
    """Return what a sweep would do, member by member. A step that several members share is counted with each of them.

    `seconds`: of all trainings, each once."""
    owners = [fingerprint for one in members for fingerprint, _ in one.states]
    table = plain_table(["member"], numbers=["to run", "of which shared", "cached", "blocked", "time"])
    for one in members:
        to_run = [fingerprint for fingerprint, state in one.states if state == "to_run"]
        shared = sum(owners.count(fingerprint) > 1 for fingerprint in to_run)
        states = [state for _, state in one.states]
        numbers = [len(to_run), shared, states.count("cached"), states.count("blocked")]
        table.add_row(Text(one.label, style="bold"), *map(str, numbers), clock(one.seconds))
    steps = {fingerprint: state for one in members for fingerprint, state in one.states}
    waiting = sum(state == "to_run" for state in steps.values())
    took = "" if seconds is None else f", about {clock(seconds)} of training one after the other"
    text = f"\n{len(members)} members, {len(steps)} different steps, {waiting} of them to run{took}"
    return Group(table, Text(text))
