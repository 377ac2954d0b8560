"""How a sweep ended: its table, its JSON line, and its page in the store.

    STORE/sweeps/NAME/index.html    self-contained
                      panel.png
                      sweep.json    the JSON line

They are written anew each time the sweep ends."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.sweeps import PaperRow, described
from pipeline.reporting.sweeps.panel import panel_png
from pipeline.reporting.sweeps.sweep_page import render_sweep_page
from pipeline.reporting.sweeps.table import RowState, SweepRow, SweepTable
from pipeline.runs.hooks import detail_of
from pipeline.runs.summary import EXIT_CODES, RunSummary
from pipeline.runs.summary import as_json as summary_json
from pipeline.runs.sweeps.sweep import Sweep, SweepMember
from pipeline.storage import Store
from pipeline.tracking import redact
from pipeline.training.facts import PretrainFacts

FOLDER = "sweeps"
PAGE, PANEL, JSON = "index.html", "panel.png", "sweep.json"
_WORST_FIRST: Sequence[Literal["failed", "stopped", "warned", "done"]] = ("failed", "stopped", "warned", "done")


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """How a sweep ended."""

    sweep: Sweep
    runs: Sequence[RunSummary]
    """One per member, in order."""

    @property
    def verdict(self) -> Literal["failed", "stopped", "warned", "done"]:
        """The worst of the members'."""
        found = {run.verdict for run in self.runs}
        return next(verdict for verdict in _WORST_FIRST if verdict in found)

    @property
    def exit_code(self) -> int:
        """As that of `mae run`."""
        return EXIT_CODES[self.verdict]

    @property
    def table(self) -> SweepTable:
        """The published rows in their order, each with its member if there is one; other members; what is not built."""
        paper = self.sweep.paper
        members = [(one.point, self._row(one, run)) for one, run in zip(self.sweep.members, self.runs, strict=True)]
        rows = []
        for one in paper.rows if paper else ():
            beside = next((row for point, row in members if point == one.at), None)
            rows.append(beside or _published(one))
        rows += [row for _, row in members if row not in rows]
        rows += [
            SweepRow(label=one.label, state="not built", paper=one.scores, remark=one.why)
            for one in self.sweep.not_built
        ]
        return SweepTable(
            name=self.sweep.name,
            title=self.sweep.title,
            rows=rows,
            source=paper.source if paper else "",
            setting=paper.setting if paper else "",
        )

    def _row(self, member: SweepMember, run: RunSummary) -> SweepRow:
        states: Mapping[str, RowState] = {"failed": "failed", "stopped": "configured only"}
        published = self.sweep.published(member.point)
        failed = next((outcome for outcome in run.outcomes if outcome.state == "failed"), None)
        return SweepRow(
            label=member.label,
            state=states.get(run.verdict, "run"),
            point=member.point,
            loss=_loss(run),
            scores=run.scores,
            paper=published.scores if published else {},
            report=run.addresses.get("report", ""),
            remark=f"{failed.step.name}: {detail_of(failed)}" if failed else "",
        )

    def as_json(self, addresses: Mapping[str, str]) -> dict[str, Any]:
        """Return the JSON line that ends `mae sweep --json`."""
        return {
            "sweep": self.sweep.name,
            "verdict": self.verdict,
            "members": [
                {"label": row.label, "overrides": dict(member.point), "loss": row.loss, "paper": dict(row.paper)}
                | summary_json(run)
                for member, run in zip(self.sweep.members, self.runs, strict=True)
                for row in [self._row(member, run)]
            ],
            "not_built": [one.label for one in self.sweep.not_built],
            "addresses": dict(addresses),
        }


def _published(row: PaperRow) -> SweepRow:
    return SweepRow(label=described(row.at), state="configured only", point=row.at, paper=row.scores)


def _loss(run: RunSummary) -> float | None:
    receipts = (outcome.receipt for outcome in run.outcomes if outcome.step.kind == "pretrain")
    return next((PretrainFacts.read(receipt.facts).loss for receipt in receipts if receipt), None)


def write_page(summary: SweepSummary, store: Store, *, command: str) -> dict[str, str]:
    """Write page, panel and JSON into the store, and return their addresses. `command`: what repeats the sweep."""
    folder = store.at(f"{FOLDER}/{summary.sweep.name}")
    panel = panel_png(summary.table)
    created = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = render_sweep_page(summary.table, panel=panel, created=created, command=command)
    addresses = {"store": store.uri, "sweep": str(folder.local_path(PAGE) or f"{folder.uri}/{PAGE}")}
    folder.write(PAGE, page.encode())
    folder.write(PANEL, panel)
    folder.write(JSON, json.dumps(redact(summary.as_json(addresses)), indent=1).encode())
    return addresses


def sweep_verdict_line(summary: SweepSummary) -> str:
    """Return what happened, and what to do about it."""
    members, verdicts = len(summary.runs), [run.verdict for run in summary.runs]
    if summary.verdict == "failed":
        return (
            f"failed: {verdicts.count('failed')} of {members} members; the others went on. Fix what the table names and run the "
            "same command again; finished steps stay finished"
        )
    if summary.verdict == "stopped":
        ended = members - verdicts.count("stopped")
        return f"stopped with {ended} of {members} members done, nothing is lost: the same command goes on from here"
    if summary.verdict == "warned":
        return "done, but more images are unreadable than data.bad_share_warn: the reports of the members say which"
    return f"done: {members} members"
