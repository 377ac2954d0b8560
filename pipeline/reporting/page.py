"""The page of a run: one HTML file that needs nothing else and can be opened from a folder, mailed or printed.

It has no scripts, no remote fonts and no links; pictures are embedded. All text is escaped, because
class names and paths come from the data. Secrets in the configuration are hidden here too, since the
file travels further than the store."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import yaml

from pipeline.reporting.format import clock, count
from pipeline.reporting.summaries import Score, StepRow, pairs, remarks_on_scores, settings_of_scores
from pipeline.tracking import redact, redact_text


@dataclass(frozen=True, kw_only=True)
class Card:
    """One headline number."""

    label: str
    """What it counts, such as `images served`."""
    value: str
    """The number with its unit, as shown."""
    note: str = ""
    """One line below it, such as `of 1 797 listed`."""


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """What became of the images of one source: listed = stored + quarantined, stored = served + duplicates."""

    name: str
    source: str
    """Where the images came from."""
    listed: int
    """Files that the snapshot names."""
    stored: int
    """Samples written into shards."""
    served: int
    """Samples that training reads."""
    duplicates: int
    """Stored but not served: their bytes equal another sample's."""
    quarantined: int
    """Not stored: unreadable, or refused by the policy for images."""
    reasons: tuple[tuple[str, str], ...] = ()
    """The first quarantined samples, (key, reason)."""
    splits: tuple[str, ...] = ()
    """One line per split: its images, labels and classes."""
    digest: str = ""
    """The manifest's digest: the dataset's identity."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that the page shows, as plain values. Empty sections are left out."""

    title: str
    """The run's name."""
    summary: str
    """One line: model, data, epochs, result."""
    created: str
    """When the report was written, as shown."""
    scores: Sequence[Score] = ()
    """Every protocol, dataset and encoder; the headline cards and the table come from these."""
    cards: Sequence[Card] = ()
    """Further headline numbers, shown after the scores."""
    reconstructions_png: bytes | None = None
    """From `reconstruction_grid_png`."""
    reconstructions_note: str = ""
    """One line above the grid, such as `8 held-out images, mask ratio 0.75`."""
    curves_png: bytes | None = None
    """From `curve_png`."""
    scores_png: bytes | None = None
    """From `scores_png`."""
    datasets: Sequence[DatasetCard] = ()
    """The pretraining dataset first, then those of the evaluation."""
    steps: Sequence[StepRow] = ()
    """In the order of the graph."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration; secrets are hidden before it is drawn."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages, git revision, stage versions."""
    hardware: Mapping[str, str] = field(default_factory=dict)
    """CPU, GPU, memory, workers, ZeRO stage."""
    command: str = ""
    """The command that repeats the run, on one or several lines."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Where results are: store, tracking, encoder."""


@dataclass(frozen=True)
class _ScoreCard:
    score: Score
    random: Score | None

    @property
    def difference(self) -> str:
        return self.score.above(self.random) if self.random else ""


def render_page(report: ReportData) -> str:
    """Return the page as HTML."""
    config = yaml.safe_dump(redact(report.config), sort_keys=False, allow_unicode=True) if report.config else ""
    groups = pairs(report.scores)
    remarks = settings_of_scores(report.scores) | remarks_on_scores(report.scores)
    headline = [_ScoreCard(g["pretrained"], g.get("random")) for g in groups.values() if "pretrained" in g]
    return template("page.html").render(report=report, headline=headline, groups=groups, remarks=remarks, config=config)


def template(name: str) -> jinja2.Template:
    """Return a template of this package, with the filters `clock`, `count`, `picture` and `hidden`."""
    loader = jinja2.PackageLoader("pipeline.reporting", package_path="")
    # StrictUndefined: a misspelt field fails instead of leaving a gap in the page
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clock": clock, "count": count, "picture": _picture, "hidden": redact_text}
    return environment.get_template(name)


def _picture(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
