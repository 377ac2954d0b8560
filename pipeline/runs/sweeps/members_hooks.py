"""What several runs do around the steps of their common graph: each run records its own steps in MLflow, as if it were alone.

A step that several runs share is shown, and recorded in full, by the first of them; the others link it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import RenderableType

from pipeline import tracking
from pipeline.cluster.tasks import Executor
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.runs.hooks import Display, RunHooks
from pipeline.runs.summary import RunSummary, summarise
from pipeline.runs.sweeps.graph import Member


class MembersHooks:
    """`pipeline.graph.runner.Hooks` for runs that share a graph. Opens a parent run in MLflow for each, which may fail."""

    def __init__(self, uri: str, members: Sequence[Member], display: Display) -> None:
        self.tracking_uri, self.members, self.display = uri, members, display
        self.runs: list[RunHooks] = []
        try:
            for member in members:
                self.runs.append(RunHooks(uri, member.config, display, member.steps, tags=member.tags))
        except BaseException:
            self.abandon("FAILED")
            raise
        self.owners: dict[str, list[RunHooks]] = {}
        for member, hooks in zip(members, self.runs, strict=True):
            for step in member.steps:
                self.owners.setdefault(step.title, []).append(hooks)

    def starts_on(self, executor: Executor) -> None:
        """Note where steps run."""
        for hooks in self.runs:
            hooks.executor = executor

    def begin(self, step: Step) -> str:
        """Open the step's MLflow run under the first run that it belongs to."""
        return self.owners[step.title][0].begin(step)

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Show how far a running step is."""
        self.display.update(step_name, done, total, unit, fields)

    def say(self, step_name: str, text: str) -> None:
        """Show a line that a running step has to say."""
        self.runs[0].say(step_name, text)

    def end(self, outcome: Outcome) -> None:
        """Show how a step ended, and record it for every run that it belongs to."""
        first, *others = self.owners[outcome.step.title]
        first.end(outcome)
        linked = replace(outcome, state="cached") if outcome.state == "done" else outcome
        for hooks in others:
            with _unseen(hooks):
                hooks.end(linked)

    def close(self, outcomes: Sequence[Outcome], addresses: Mapping[str, str]) -> list[RunSummary]:
        """Close the runs in MLflow, and return how each ended."""
        summaries = []
        for member, hooks in zip(self.members, self.runs, strict=True):
            own = {step.title for step in member.steps}
            ended = [outcome for outcome in outcomes if outcome.step.title in own]
            summary = summarise(member.config, ended, run_id=hooks.run_id, addresses=addresses)
            hooks.close(summary)
            summaries.append(summary)
        return summaries

    def abandon(self, status: tracking.RunStatus) -> None:
        """Close the runs that are still open after something broke off."""
        for hooks in self.runs:
            hooks.abandon(status)


class _Nowhere:
    """A display that shows nothing."""

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        pass

    def step_state(self, step_name: str, state: Any, *, detail: str = "") -> None:
        pass

    def show(self, what: RenderableType) -> None:
        pass


@contextmanager
def _unseen(hooks: RunHooks) -> Iterator[None]:
    shown, hooks.display = hooks.display, _Nowhere()
    try:
        yield
    finally:
        hooks.display = shown
