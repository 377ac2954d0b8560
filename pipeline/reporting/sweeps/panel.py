"""The panel of a sweep: one plot per protocol, our points filled, published ones hollow, at the same place along the axis.

A sweep over one field of numbers has a numeric axis, logarithmic where the values span more than a factor of 10; any other has one
place per member. Units: per cent. Style and colours are those of `figures`."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pipeline.reporting.figures import BLUE, GREY, INK, STYLE, as_png
from pipeline.reporting.sweeps.table import Column, SweepRow, SweepTable, heading

ORANGE = "#d9730d"
OURS, PAPER, RANDOM = "this sweep", "paper", "random weights"
LOG_FROM = 10.0


@dataclass(frozen=True)
class _AxisOfMembers:
    """Where each row stands."""

    places: Mapping[str, float]
    """By label."""
    ticks: Mapping[float, str]
    name: str
    line: str
    """`-` where points are joined, because they stand in an order."""
    logarithmic: bool


def panel_png(sweep: SweepTable) -> bytes:
    """Return the plots, one below the other."""
    plots: list[tuple[Column | None, str]] = [
        *((column, sweep.published(column)) for column in sweep.columns if _is_accuracy(sweep, column)),
        *((None, name) for name in sweep.published_alone),
    ]
    axis = _axis_of(sweep)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 1.2 + 3.3 * max(1, len(plots))), layout="constrained")
        panels: list[Axes] = list(figure.subplots(max(1, len(plots)), 1, squeeze=False, sharex=True)[:, 0])
        for panel, (column, paper) in zip(panels, plots, strict=False):
            title = heading(column, sweep.columns) if column else paper
            panel.set_title(f"{title}: top-1 accuracy, %", pad=8)
            if column:
                _draw_ours(panel, sweep, axis, column)
            _draw_published(panel, sweep, axis, paper)
            _label_members(panel, axis)
        panels[-1].set_xlabel(axis.name)
        handles = [panel.get_legend_handles_labels() for panel in panels]
        by_label = {label: handle for pair in handles for handle, label in zip(*pair, strict=True)}
        shown = {label: by_label[label] for label in (OURS, PAPER, RANDOM) if label in by_label}
        if shown:
            figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=len(shown), columnspacing=1.6)
        return as_png(figure)


def _draw_published(panel: Axes, sweep: SweepTable, axis: _AxisOfMembers, paper: str) -> None:
    published = sorted((axis.places[row.label], row.paper[paper]) for row in sweep.rows if paper in row.paper)
    if not published:
        return
    places, values = zip(*published, strict=True)
    panel.plot(
        places, values, color=ORANGE, linestyle=axis.line, linewidth=1.2, marker="o", markersize=8,
        markerfacecolor="none", markeredgewidth=1.6, label=PAPER,
    )  # fmt: skip


def _draw_ours(panel: Axes, sweep: SweepTable, axis: _AxisOfMembers, column: Column) -> None:
    ours = [(axis.places[row.label], score) for row in sweep.rows if (score := row.score(column))]
    ours.sort(key=lambda point: point[0])
    places, means = [place for place, _ in ours], [100 * score.mean for _, score in ours]
    spreads = [100 * (score.sd or 0.0) for _, score in ours]
    panel.errorbar(
        places, means, yerr=spreads if any(spreads) else None, color=BLUE, marker="o", markersize=8, capsize=4,
        linestyle=axis.line, linewidth=1.6, label=OURS,
    )  # fmt: skip
    for place, mean in zip(places, means, strict=True):
        # beside the point: its whisker and the line of random weights run above and below
        panel.annotate(f"{mean:.1f}", (place, mean), (8, 5), textcoords="offset points", fontsize=10, color=INK)
    if random := sweep.random.get(column):
        panel.axhline(100 * random.mean, color=GREY, linestyle="--", linewidth=1.4, label=RANDOM)
    panel.margins(y=0.18)


def _is_accuracy(sweep: SweepTable, column: Column) -> bool:
    return not any(score.measure for row in sweep.rows if (score := row.score(column)))


def _axis_of(sweep: SweepTable) -> _AxisOfMembers:
    rows = sweep.rows
    open_rows = any(row.state == "configured only" for row in rows)
    ticks = [_tick(sweep, row, mark_run=open_rows) for row in rows]
    values = [next(iter(row.point.values())) for row in rows if len(row.point) == 1]
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    joined = bool(sweep.varied) and len(numbers) == len(rows) > 1
    places = numbers if joined else [float(index) for index in range(len(rows))]
    return _AxisOfMembers(
        places=dict(zip((row.label for row in rows), places, strict=True)),
        ticks=dict(zip(places, ticks, strict=True)),
        name=(sweep.varied or "member") + ("; those without “run” are configured only" if open_rows else ""),
        line="-" if joined else "",
        logarithmic=joined and min(places) > 0 and max(places) / min(places) > LOG_FROM,
    )


def _tick(sweep: SweepTable, row: SweepRow, *, mark_run: bool) -> str:
    """Return a member's label for the axis, broken into lines, with its state where that needs saying."""
    said = row.state in ("failed", "not built") or (row.state == "run" and mark_run)
    return textwrap.fill(sweep.short(row), 16) + (f"\n({row.state})" if said else "")


def _label_members(panel: Axes, axis: _AxisOfMembers) -> None:
    if axis.logarithmic:
        panel.set_xscale("log")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(list(axis.ticks), list(axis.ticks.values()))
    panel.margins(x=0.08)
