"""Vega-Lite specifications of a comparison, made with Altair. Each is plain JSON, drawn by the page's own copy of the runtime.

Colours of text are the page's (`currentColor`), so that one chart serves the light page and the dark one."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from pipeline.reporting.comparison.values import MILESTONES, RANDOM, Comparison, Curve, RunRow, Spread

AXES = ("images seen", "steps", "hours")
"""What curves can be drawn over. The page sets the parameter `axis` of their charts to one of these."""
_POINTS = 2000
"""Points of a curve at most: a page with twenty runs stays below a few megabytes."""
_INK, _GRID = "currentColor", "#8886"
_HEIGHT, _WIDTH = 300, 780
_BLUE = "#2b86c5"

Spec = dict[str, Any]


def charts(comparison: Comparison) -> dict[str, Spec]:
    """Return the charts by name: `loss`, `milestone_...`, `scores`, `tests`. Those without data are left out."""
    names = [row.name for row in comparison.rows]
    found: dict[str, alt.TopLevelMixin] = {}
    if comparison.curves:
        found["loss"] = _curve(
            [point for one in comparison.curves for point in _loss_points(one)], "training loss", names
        )
    for key, title in MILESTONES.items():
        if points := [point for one in comparison.curves for point in _milestone_points(one, key)]:
            found[f"milestone_{key}"] = _curve(points, title, names)
    if any(row.scores for row in comparison.rows):
        found["scores"] = _scores(comparison.rows)
    if comparison.tests:
        found["tests"] = _tests(comparison)
    return {name: chart.to_dict() for name, chart in found.items()}


def _loss_points(curve: Curve) -> list[dict[str, Any]]:
    stride = -(-len(curve.images) // _POINTS)
    rows = zip(curve.images, curve.steps, curve.hours, curve.loss, strict=True)
    return [
        {"run": curve.run, **dict(zip(AXES, at, strict=True)), "value": value} for *at, value in list(rows)[::stride]
    ]


def _milestone_points(curve: Curve, key: str) -> list[dict[str, Any]]:
    points = []
    for images, value in curve.milestones.get(key, ()):
        # the nearest row that was logged says when that was
        row = min(range(len(curve.images)), key=lambda index: abs(curve.images[index] - images))
        points.append(
            {
                "run": curve.run,
                **dict(zip(AXES, (images, curve.steps[row], curve.hours[row]), strict=True)),
                "value": value,
            }
        )
    return points


def _curve(points: Sequence[dict[str, Any]], title: str, names: Sequence[str]) -> alt.TopLevelMixin:
    axis = alt.param(name="axis", value=AXES[0])
    chosen = alt.selection_point(fields=["run"], bind="legend")
    base = (
        alt.Chart(alt.Data(values=list(points)))
        .transform_calculate(x="datum[axis]")
        .encode(
            x=alt.X("x:Q", title=None, axis=alt.Axis(format="~s")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
            color=_run_colour(names),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12)),
            tooltip=[
                "run:N",
                *(alt.Tooltip(f"{name}:Q", format=",.4~g") for name in AXES),
                alt.Tooltip("value:Q", format=".4f"),
            ],
        )
    )
    return _styled(
        (base.mark_line(strokeWidth=1.6) + base.mark_point(size=18, filled=True)).add_params(axis, chosen).interactive()
    )


def _scores(rows: Sequence[RunRow]) -> alt.TopLevelMixin:
    """Draw seeds as dots, means and standard deviations as marks with lines; the random encoder's are hollow."""
    names = [row.name for row in rows]
    data = [point for row in rows for key, score in row.scores.items() for point in _score_points(row.name, key, score)]
    chart, colour = alt.Chart(alt.Data(values=data)), _run_colour(names, legend=False)
    means, seeds = (chart.transform_filter(f"datum.kind == '{kind}'") for kind in ("mean", "seed"))
    y = alt.Y("run:N", title=None, sort=names, axis=alt.Axis(labelLimit=260))
    x = alt.X("value:Q", title="per cent, or the measure", scale=alt.Scale(zero=False))
    shapes = alt.Scale(range=["circle", "diamond", "square", "triangle-up"])
    of = ["run:N", "encoder:N"]
    drawn = alt.layer(
        means.mark_rule(strokeWidth=1.5).encode(y=y, x=alt.X("low:Q"), x2="high:Q", color=colour),
        seeds.mark_point(size=16, filled=True, opacity=0.45).encode(
            y=y, x=x, color=colour, tooltip=[*of, alt.Tooltip("value:Q", format=".2f")]
        ),
        means.mark_point(size=90, strokeWidth=1.8).encode(
            y=y,
            x=x,
            color=colour,
            shape=alt.Shape("encoder:N", legend=alt.Legend(title=None, orient="top"), scale=shapes),
            fill=alt.when(f"datum.encoder == '{RANDOM}'")
            .then(alt.value("transparent"))
            .otherwise(_run_colour(names, legend=False, channel=alt.Fill)),
            tooltip=[*of, alt.Tooltip("value:Q", title="mean", format=".2f"), alt.Tooltip("n:Q", title="seeds")],
        ),
    )
    return _rows_of(drawn, independent=True)


def _score_points(run: str, key: str, score: Spread) -> list[dict[str, Any]]:
    name, _, encoder = key.rpartition("/")
    scale, sd = 1 if score.mean > 1 else 100, score.sd or 0.0
    of = {"run": run, "score": name.replace("/", " "), "encoder": encoder}
    mean = {
        "value": scale * score.mean,
        "low": scale * (score.mean - sd),
        "high": scale * (score.mean + sd),
        "n": score.n,
    }
    return [{**of, "kind": "mean", **mean}, *({**of, "kind": "seed", "value": scale * value} for value in score.values)]


def _tests(comparison: Comparison) -> alt.TopLevelMixin:
    kept = ("difference", "low", "high", "p", "p_holm")
    rows = [
        {
            "pair": f"{one.run} − {one.against}",
            "score": one.score.replace("/", " "),
            **{key: getattr(one, key) for key in kept},
        }
        for one in comparison.tests
    ]
    chart, y = alt.Chart(alt.Data(values=rows)), alt.Y("pair:N", title=None, sort=None, axis=alt.Axis(labelLimit=360))
    tooltip = ["pair:N", *(alt.Tooltip(f"{name}:Q", format=".3~g") for name in kept)]
    title = "difference in percentage points, with its 95 % interval"
    drawn = alt.layer(
        chart.mark_rule(strokeDash=[3, 3], color=_INK, opacity=0.5).encode(x=alt.datum(0)),
        chart.mark_rule(strokeWidth=1.6, color=_BLUE).encode(y=y, x=alt.X("low:Q"), x2="high:Q", tooltip=tooltip),
        chart.mark_point(size=70, filled=True, color=_BLUE, opacity=1).encode(
            y=y, x=alt.X("difference:Q", title=title), tooltip=tooltip
        ),
    )
    return _rows_of(drawn, independent=False)


def _rows_of(drawn: Any, *, independent: bool) -> alt.TopLevelMixin:
    """Return one row of a chart per score; with `independent`, each has an axis of its own."""
    header = alt.Header(
        labelAngle=0, labelAlign="left", labelAnchor="start", labelOrient="top", labelFontWeight="bold", labelColor=_INK
    )
    rows = drawn.properties(width=_WIDTH, height=alt.Step(22)).facet(row=alt.Row("score:N", title=None, header=header))
    return _styled(rows.resolve_scale(x="independent") if independent else rows)


def _run_colour(names: Sequence[str], *, legend: bool = True, channel: Any = alt.Color) -> Any:
    scheme = "tableau10" if len(names) <= 10 else "tableau20"
    shown = alt.Legend(title=None, orient="top", columns=3, labelLimit=300, symbolType="stroke") if legend else None
    return channel("run:N", scale=alt.Scale(domain=list(names), scheme=scheme), legend=shown, sort=None)


def _styled(chart: Any) -> alt.TopLevelMixin:
    if isinstance(chart, alt.LayerChart):
        chart = chart.properties(width="container", height=_HEIGHT)
    styled: alt.TopLevelMixin = (
        chart.configure(background="transparent", font="system-ui, sans-serif")
        .configure_axis(
            labelColor=_INK, titleColor=_INK, domainColor=_GRID, tickColor=_GRID, gridColor=_GRID, gridOpacity=0.5
        )
        .configure_legend(labelColor=_INK)
        .configure_view(stroke=None)
    )
    return styled
