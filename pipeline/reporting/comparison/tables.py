"""A comparison at the terminal. Print it with soft_wrap=True: long lines are then wrapped without a break in the text."""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.reporting.comparison.values import PRETRAINED, RANDOM, Comparison, Difference, RunRow, score_columns
from pipeline.reporting.format import count
from pipeline.reporting.terminal import plain_table

SCORES_SHOWN = 3
"""Score columns of the table; the page and --json have all."""
UNKNOWN = "–"
DIFFERS_CHARS = 80
SCORES_NOTE = """
scores: per cent, mean ± standard deviation over seeds (seeds)
hours: GPU-hours or hours of CPU cores, of pretraining and evaluations; h: hours of pretraining, where no more is known
per point: what the run took for each point of {score} above the random encoder"""


def runs_table(rows: Sequence[RunRow], *, scores: Sequence[str] = ()) -> Table:
    """Return one row per run. A column that no run has is left out; scores are per cent, mean ± sd (seeds)."""
    scores = scores or score_columns(rows)[:SCORES_SHOWN]
    columns: dict[str, Callable[[RunRow], str]] = {
        "id": lambda row: row.run_id[:6],
        "data": lambda row: row.data,
        "size": lambda row: row.size,
        "differs": lambda row: (
            row.differs if len(row.differs) <= DIFFERS_CHARS else f"{row.differs[: DIFFERS_CHARS - 2]} …"
        ),
        "loss": lambda row: _number(row.final_loss, ".4f"),
        **{name.replace("/", " "): _score(name) for name in scores},
        "images/s": lambda row: UNKNOWN if row.images_per_s is None else count(row.images_per_s),
        "MFU": lambda row: _number(row.mfu, ".1%"),
        "hours": lambda row: amount(row.compute),
        "cost": lambda row: amount(None if row.usd is None else (row.usd, "USD")),
    }
    if priced := priced_score(rows):
        columns["per point"] = lambda row: amount(row.per_point(priced))
    cells = {name: [shown(row) for row in rows] for name, shown in columns.items()}
    kept = {name: column for name, column in cells.items() if set(column) - {"", UNKNOWN}}
    words = [name for name in kept if name in {"id", "data", "size", "differs"}]
    table = plain_table(["run", *words], numbers=[name for name in kept if name not in words])
    for index, row in enumerate(rows):
        table.add_row(Text(row.name, style="bold"), *(Text(column[index]) for column in kept.values()))
    return table


def priced_score(rows: Sequence[RunRow]) -> str:
    """Return the score of whose points the table gives the cost: the first that pretraining has raised; empty if none."""
    return next((name for name in score_columns(rows) if any(row.per_point(name) for row in rows)), "")


def amount(value: tuple[float, str] | None) -> str:
    """Return `0.35 GPU-h` or `$1.20`, with three significant digits."""
    if value is None:
        return UNKNOWN
    number, unit = value
    shown = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return f"${shown}" if unit == "USD" else f"{shown} {unit}"


def comparison_view(comparison: Comparison) -> RenderableType:
    """Return the table of named runs, then all that differs between them and what follows from it."""
    rows, names = comparison.rows, [row.name for row in comparison.rows]
    scores = score_columns(rows)
    parts: list[RenderableType] = [runs_table(rows, scores=scores[:SCORES_SHOWN])]
    if scores:
        parts += [
            Text(SCORES_NOTE.format(score=(priced_score(rows) or "a score").replace("/", " ")), style="dim"),
            Text(""),
            _scores_table(rows, scores),
        ]
    if len(rows) > 1:
        for title, found in (
            ("configuration", comparison.config),
            ("data", comparison.data),
            ("code", comparison.code),
        ):
            parts += [Text(""), _differences(title, found, names)]
    if comparison.machine:
        parts += [Text(""), _differences("resources, which change no result", comparison.machine, names)]
    if comparison.tests:
        parts += [Text(""), _tests(comparison)]
    parts += [Text(f"warning: {line}", style="yellow") for line in comparison.warnings]
    parts += [Text(f"note: {line}", style="dim") for line in comparison.notes]
    return Group(*parts)


def _scores_table(rows: Sequence[RunRow], scores: Iterable[str]) -> Table:
    table = plain_table(["score", "encoder"], numbers=[row.name for row in rows])
    for name in scores:
        encoders = dict.fromkeys(
            key.rpartition("/")[2] for row in rows for key in row.scores if key.startswith(f"{name}/")
        )
        for encoder in sorted(encoders, key=lambda one: (one == RANDOM, one)):
            cells = [row.scores.get(f"{name}/{encoder}") for row in rows]
            shown = (UNKNOWN if cell is None else cell.text for cell in cells)
            table.add_row(Text(name.replace("/", " ")), Text(encoder), *shown)
    return table


def _differences(title: str, found: Sequence[Difference], names: Sequence[str]) -> RenderableType:
    if not found:
        return Text(f"{title}: no difference", style="dim")
    table = plain_table([title, *names], numbers=[])
    for one in found:
        table.add_row(Text(one.key), *(Text(value) for value in one.values))
    return table


def _tests(comparison: Comparison) -> RenderableType:
    table = plain_table(
        ["paired test", "score"],
        numbers=["images", "seeds", "difference", "95 % interval", "only it", "only first", "p", "p (Holm)"],
    )
    for one in comparison.tests:
        table.add_row(
            Text(f"{one.run} − {one.against}"),
            Text(one.score.replace("/", " ")),
            count(one.images),
            str(one.seeds),
            f"{one.difference:+.1f}",
            f"{one.low:+.1f} to {one.high:+.1f}",
            f"{one.only_run:.4g}",
            f"{one.only_against:.4g}",
            p_text(one.p),
            Text(p_text(one.p_holm), style="bold" if one.p_holm < 0.05 else ""),
        )
    return Group(table, Text(TEST_NOTE.format(tests=len(comparison.tests)), style="dim"))


TEST_NOTE = (
    "p: the chance of a difference at least as large, if both classifiers were equally accurate on images like these. The interval "
    "is that of the difference on such images. Neither says how a pretraining with another seed would have done. "
    "Holm: adjusted for the {tests} tests here. Differences are percentage points."
)


def p_text(p: float) -> str:
    """Return a p-value with two significant digits, `< 0.001` below that."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _score(name: str) -> Callable[[RunRow], str]:
    def shown(row: RunRow) -> str:
        found = row.scores.get(f"{name}/{PRETRAINED}") or next(
            (score for key, score in row.scores.items() if key.startswith(f"{name}/")), None
        )
        return UNKNOWN if found is None else found.text

    return shown


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)
