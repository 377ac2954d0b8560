"""What a run does around its steps: it records them in MLflow and shows them in the terminal.

Tracking never fails a run: an error from MLflow becomes a warning."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from rich.console import RenderableType
from rich.text import Text

from pipeline import tracking
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.data.dataset.facts import DatasetFacts, SnapshotFacts
from pipeline.data.dataset.understanding import HIDDEN
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.evaluation.protocol import ScoreFacts
from pipeline.graph.receipts import Receipt
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.reporting.format import count
from pipeline.runs.beginning import beginning_of
from pipeline.runs.checking.findings import examine, finished_in, lines_of, problem_of, table_of
from pipeline.runs.recording.recorder import Recorder, failures_as_warnings
from pipeline.runs.summary import RunSummary
from pipeline.storage import open_store
from pipeline.training.facts import IncidentFacts

log = logging.getLogger(__name__)

_DAMAGE = {"empty", "unreadable", "truncated", "too_many_pixels"}
"""Reasons for quarantine that need no more words than their number."""


class Display(Protocol):
    """The terminal, as a run uses it."""

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Show how far a running step is."""
        ...

    def step_state(self, step_name: str, state: Any, *, detail: str = "") -> None:
        """Show that a step began or ended."""
        ...

    def show(self, what: RenderableType) -> None:
        """Show a table."""
        ...


class RunHooks:
    """`pipeline.graph.runner.Hooks` for a real run: a parent run in MLflow with one child per step, and a display.

    Opening the parent is the one call that may fail the run, since it comes before the first step. With an empty address,
    nothing is recorded. `tags` are added to the parent's."""

    def __init__(
        self,
        uri: str,
        config: RunConfig,
        display: Display,
        steps: Sequence[Step] = (),
        *,
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.tracking_uri, self.config, self.display, self.steps = uri, config, display, steps
        self.executor: Executor = "in_process"
        self.told: set[str] = set()
        """Findings that were shown."""
        self.open_children: dict[str, str] = {}
        self.unreported: list[Outcome] = []
        """Outcomes that MLflow refused when they happened; `close` tries them again."""
        self.recorder = Recorder(uri, config, tags=tags) if uri else None

    @property
    def run_id(self) -> str:
        """Id of the parent run in MLflow; empty if nothing is recorded."""
        return self.recorder.run_id if self.recorder else ""

    def begin(self, step: Step) -> str:
        """Open the step's child run and return its id, or an empty string if MLflow refused or nothing is recorded."""
        known = beginning_of(step, open_store(self.config.store), self.executor)
        self.display.step_state(step.title, "running", detail=known.text)
        if known.images and known.seconds:
            self.display.update(step.title, known.images_done, known.images, "images", {"eta_s": known.seconds})
        if not self.recorder:
            return ""
        with failures_as_warnings(f"tracking of {step.name}"):
            # if it fails, the step has no run yet; one is opened when it ends
            self.open_children[step.name] = self.recorder.open(step)
        return self.open_children.get(step.name, "")

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Show how far a running step is."""
        self.display.update(step_name, done, total, unit, fields)

    def say(self, step_name: str, text: str) -> None:
        """Show a line that a running step has to say."""
        self.display.show(Text(f"{step_name}: {text}"))

    def end(self, outcome: Outcome) -> None:
        """Show and record how a step ended."""
        # first of all: what has ended must not be closed again by `abandon`
        self.open_children.pop(outcome.step.name, None)
        about = [listing_of(outcome), detail_of(outcome)]
        self.display.step_state(outcome.step.title, outcome.state, detail="; ".join(text for text in about if text))
        self.unreported.append(outcome)
        self._record(outcome)
        self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        """Show what a step made of the data, and what follows for the scores. Raises ConfigError or DataError for wrong data."""
        step = outcome.step
        if step.kind == "snapshot" and isinstance(outcome.error, DataError | ConfigError):
            raise outcome.error  # as for a source that is not there: nothing was made, and no table of steps says more
        if outcome.receipt is None:
            return
        if step.kind not in {"snapshot", "shard", "join"}:
            return
        if table := table_of(step, outcome.receipt.as_input(outcome.uri)):
            self.display.show(table)
        # after every step of the data: each receipt can settle more
        findings = examine(self.config, self.steps, finished_in(open_store(self.config.store)))
        for line in lines_of(findings):
            if line not in self.told:
                self.told.add(line)
                self.display.show(Text(f"note: {line}", style="yellow"))
        if problem := problem_of(findings):
            raise problem

    def _record(self, outcome: Outcome) -> None:
        """Record an outcome, and forget it once that has worked."""
        with failures_as_warnings(f"tracking of {outcome.step.name}"):
            if self.recorder:
                self.recorder.end(outcome)
            self.unreported.remove(outcome)

    def close(self, summary: RunSummary) -> None:
        """Close the parent run with what the run made. Outcomes that MLflow refused before are tried again."""
        for outcome in list(self.unreported):
            self._record(outcome)
        if self.recorder:
            with failures_as_warnings("tracking of the run"):
                self.recorder.close(summary)

    def abandon(self, status: tracking.RunStatus) -> None:
        """Close the runs that are still open after the run broke off, so that none says RUNNING forever."""
        if not self.recorder:
            return
        for run_id in self.open_children.values():
            with failures_as_warnings("tracking of the run"):
                tracking.close_run(self.tracking_uri, run_id, status)
        with failures_as_warnings("tracking of the run"):
            self.recorder.abandon(status)


def listing_of(outcome: Outcome) -> str:
    """Return what a listing that has just been made holds, or an empty string for other steps."""
    if outcome.step.kind != "snapshot" or outcome.state != "done" or outcome.receipt is None:
        return ""
    facts = SnapshotFacts.read(outcome.receipt.facts)
    found = (
        f"{count(facts.listed)} rows"
        if facts.kind == "Parquet tables"
        else f"{count(facts.listed + facts.ignored)} files"
    )
    return f"listing {outcome.step.config.source}: {found}"


def detail_of(outcome: Outcome) -> str:
    """Return one line on what the user should know of a step: its error, or a remark on its result; often empty."""
    if outcome.error is not None:
        text = str(outcome.error) or type(outcome.error).__name__
        return (
            text
            if isinstance(outcome.error, PipelineError | ConfigError)
            else f"{type(outcome.error).__name__}: {text}"
        )
    if outcome.receipt is not None:
        return _remark(outcome.receipt)
    return "an input is missing" if outcome.state == "blocked" else ""


def _remark(receipt: Receipt) -> str:
    """What the user should know of a finished step."""
    if receipt.kind == "snapshot":
        return _remark_on_listing(SnapshotFacts.read(receipt.facts))
    if receipt.kind in {"shard", "join"}:
        return _remark_on_images(DatasetFacts.read(receipt.facts))
    if receipt.kind == "evaluate":
        scores = ScoreFacts.read(receipt.facts)
        if scores.skipped:
            return f"not evaluated: {scores.skipped}"
        if scores.split:
            return f"scored on {scores.split}"
    incidents = IncidentFacts.read(receipt.facts)
    if not incidents.substituted:
        return ""
    more = len(incidents.substituted) - 3
    worst = ", ".join(source for _, source, _ in incidents.substituted[:3]) + (f" and {more} more" if more > 0 else "")
    return f"{incidents.substitutions} times another image was used in place of an unreadable one: {worst}"


def _remark_on_listing(facts: SnapshotFacts) -> str:
    if facts.understood is None:
        return ""
    seen = {ending: number for ending, number in facts.understood.passed_over.items() if ending != HIDDEN}
    endings = ", ".join(f"{number} {ending}" for ending, number in seen.items())
    remarks = [f"{sum(seen.values())} other files passed over ({endings})"] if seen else []
    return "; ".join([*remarks, *facts.understood.notes])


def _remark_on_images(facts: DatasetFacts) -> str:
    remarks = []
    if facts.quarantined:
        why = "; ".join(_remedied_reasons(facts))
        remarks.append(f"{facts.quarantined} images quarantined{f' ({why})' if why else ''}")
    if facts.repaired:
        remarks.append(f"{facts.repaired} images with harmless faults repaired")
    if facts.other_members and facts.other_reasons:
        reasons = ", ".join(f"{files} {reason}" for reason, files in facts.other_reasons.items())
        example = (facts.other_examples or {})[next(iter(facts.other_reasons))][0]
        remarks.append(f"{facts.other_members} files of tars belong to no sample ({reasons}, such as {example})")
    if (found := facts.contradicting_labels) and found.images:
        one, other = found.examples[0]
        remarks.append(
            f"{found.images} images have copies with different labels, and each label keeps one (such as {one.source} and "
            f"{other.source})"
        )
    remarks += _leak_remarks(facts)
    return "; ".join(remarks)


def _leak_remarks(facts: DatasetFacts) -> Iterator[str]:
    """Yield what is in train as well as in val or test: copies byte for byte, then near duplicates."""
    if (copies := facts.copies) and copies.across:
        one, other = copies.examples[0]
        labels = f", {copies.conflicting} with different labels" if copies.conflicting else ""
        yield (
            f"{copies.across} images are in several splits byte for byte{labels} (such as {one.source} and {other.source})"
        )
    near = facts.near_duplicates_across_splits
    if near and near.held_out:
        seen = "look like" if near.aligned is None else "seem to be copies of"
        example = f"such as {near.examples[0].held_out} and {near.examples[0].train}; " if near.examples else ""
        yield (
            f"{near.held_out} of {near.compared} images of val and test {seen} one of train ({example}mae shards inspect "
            "--leaks FILE.csv lists them: take them out of one split, or say in results that training saw them)"
        )


def _remedied_reasons(facts: DatasetFacts) -> Iterator[str]:
    """Yield each reason for quarantine that is no damage, so that something can be done about it, with an example."""
    # reversed: the first example of a reason is written last and stays
    example_of = {example.reason: example.source for example in reversed(facts.quarantine_examples)}
    for reason, images in (facts.quarantine_reasons or {}).items():
        if reason not in _DAMAGE:
            yield f"{images} {reason}" + (f", such as {example_of[reason]}" if reason in example_of else "")
