"""A sweep at a terminal: progress while it works, then one table of its members and a verdict, on standard error."""

import sys
from contextlib import redirect_stdout

from rich.console import Console

from pipeline.cluster.tasks import Executor
from pipeline.reporting.progress import ProgressDisplay
from pipeline.reporting.sweeps.table import sweep_table
from pipeline.runs.run import run_members
from pipeline.runs.stopping import StopSignals
from pipeline.runs.sweeps.results import SweepSummary, sweep_verdict_line, write_page
from pipeline.runs.sweeps.sweep import Sweep
from pipeline.storage import open_store

WIDTH = 200
"""Columns that a table of many protocols may take."""


def run_sweep_and_show(
    sweep: Sweep, *, executor: Executor, command: str, signals: StopSignals | None = None
) -> tuple[SweepSummary, dict[str, str]]:
    """Run all members as one graph and show them; return how they ended, and where the results are."""
    console = Console(stderr=True, highlight=False)
    # DeepSpeed prints on standard output, which must hold nothing but the JSON line
    with redirect_stdout(sys.stderr), ProgressDisplay(console=console) as display:
        runs = run_members([one.run for one in sweep.members], executor=executor, display=display, signals=signals)
    summary = SweepSummary(sweep=sweep, runs=runs)
    addresses = write_page(summary, open_store(sweep.members[0].config.store), command=command)
    addresses["tracking"] = runs[0].addresses["tracking"]
    console.print()
    # a narrow terminal wraps its lines: a number that is cut short is a wrong one
    wide = Console(stderr=True, highlight=False, width=max(console.width, WIDTH))
    wide.print(sweep_table(summary.table), soft_wrap=True)
    console.print()
    for name, address in addresses.items():
        console.print(f"{name:<10}{address}", soft_wrap=True, markup=False)
    console.print(sweep_verdict_line(summary), soft_wrap=True, markup=False)
    return summary, addresses
