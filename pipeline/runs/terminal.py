"""A run at a terminal: progress while it works, then one table, a reconstruction and a verdict.

Everything is printed on standard error; standard output belongs to results."""

import io
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout

import numpy as np
from rich.console import Console
from rich.text import Text

from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.reporting.progress import ProgressDisplay
from pipeline.reporting.reconstructions import terminal_reconstruction
from pipeline.reporting.summaries import StepRow
from pipeline.reporting.terminal import closing_table
from pipeline.runs.hooks import detail_of
from pipeline.runs.run import run_pipeline
from pipeline.runs.stopping import StopSignals
from pipeline.runs.summary import RunSummary, verdict_line


def run_and_show(config: RunConfig, *, executor: Executor, signals: StopSignals | None = None) -> RunSummary:
    """Run all that is not done, and show it."""
    console = Console(stderr=True, highlight=False)
    # DeepSpeed prints on standard output, which must hold nothing but the JSON line.
    with redirect_stdout(sys.stderr), ProgressDisplay(console=console) as display:
        summary = run_pipeline(config, executor=executor, display=display, signals=signals)
    console.print()
    if sys.stderr.isatty():
        _show_reconstruction(console, summary)
    rows = [_row(outcome) for outcome in summary.outcomes]
    console.print(closing_table(rows, scores=summary.scores, addresses=summary.addresses), soft_wrap=True)
    console.print(verdict_line(config, summary), soft_wrap=True)
    return summary


class TerminalHooks:
    """The runner's hooks for steps that are shown at the terminal and not tracked in MLflow."""

    tracking_uri = ""

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display

    def begin(self, step: Step) -> str:
        """Show that a step runs. It has no MLflow run."""
        self.display.step_state(step.name, "running")
        return ""

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Show how far a step is."""
        self.display.update(step_name, done, total, unit, fields)

    def say(self, step_name: str, text: str) -> None:
        """Show a line that a running step has to say."""
        self.display.show(Text(f"{step_name}: {text}"))

    def end(self, outcome: Outcome) -> None:
        """Show how a step ended."""
        self.display.step_state(outcome.step.name, outcome.state, detail=detail_of(outcome))


def _row(outcome: Outcome) -> StepRow:
    return StepRow(
        name=outcome.step.name,
        state=outcome.state,
        fingerprint=outcome.step.fingerprint,
        seconds=outcome.seconds if outcome.state != "blocked" else None,
        generation=outcome.receipt.generation if outcome.receipt else None,
        uri=outcome.uri,
        detail=detail_of(outcome),
    )


def _show_reconstruction(console: Console, summary: RunSummary) -> None:
    """Show the first held-out image: the original, what the encoder sees, and the model's reconstruction."""
    pretrained = next((o for o in summary.outcomes if o.step.kind == "pretrain" and o.receipt), None)
    if pretrained is None or pretrained.receipt is None:
        return
    data = pretrained.receipt.as_input(pretrained.uri).store.read("reconstructions.npz")
    original, hidden, _, after = np.load(io.BytesIO(data), allow_pickle=False)["images"][0]
    console.print(terminal_reconstruction(original, hidden, after))
