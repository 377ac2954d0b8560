"""The page of a sweep: one HTML file with the panel and the table of its members, in the style of a run's page."""

from collections.abc import Mapping

from pipeline.reporting.page import template
from pipeline.reporting.sweeps.table import RowState, SweepTable, heading

_CLASSES: Mapping[RowState, str] = {
    "run": "done",
    "configured only": "waiting",
    "failed": "failed",
    "not built": "blocked",
}
"""The classes of style.css that colour a state."""


def render_sweep_page(sweep: SweepTable, *, panel: bytes, created: str, command: str) -> str:
    """Return the page as HTML. `panel`: from `panel_png`; `created`: when, as shown; `command`: what repeats the sweep."""
    states = [row.state for row in sweep.rows]
    counts = ((states.count(state), state) for state in _CLASSES)
    return template("sweep.html").render(
        sweep=sweep,
        panel=panel,
        created=created,
        command=command,
        summary=", ".join(f"{number} {state}" for number, state in counts if number),
        columns=[
            {"key": column, "name": heading(column, sweep.columns), "paper": sweep.published(column)}
            for column in sweep.columns
        ],
        classes=_CLASSES,
        reports=[row for row in sweep.rows if row.report],
    )
