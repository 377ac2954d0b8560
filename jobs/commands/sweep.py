"""`mae sweep`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.options import AsJson, Overrides

if TYPE_CHECKING:
    from pipeline.runs.sweeps.sweep import Sweep


def sweep(
    path: Annotated[
        Path, typer.Argument(help="A run's YAML file to vary with --grid, or a sweep's.", metavar="CONFIG.yaml")
    ],
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            help="Values of a field, as in --grid model.mask_ratio=0.4,0.75. Repeatable: every combination is a member.",
            metavar="KEY=V1,V2",
        ),
    ] = [],  # noqa: B006 - typer copies it
    draws: Annotated[
        int | None,
        typer.Option(
            "--random",
            min=1,
            help="Draw N members out of the grid, whose values may then be ranges: KEY=0.1..0.9 or KEY=log:1e-5..1e-3.",
            metavar="N",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides what --random draws.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Vary this configuration in place of the one that a sweep's file names."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    name: Annotated[
        str, typer.Option(help="Name of the sweep. Default: the file's name, or the fields that vary.")
    ] = "",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the members, what they share, what is cached, and the time. Run nothing."),
    ] = False,
    hardware: Annotated[
        str | None, typer.Option(help="For --dry-run: device to plan for, as in `mae plan`. Default: this machine's.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="For --dry-run: images per epoch, where the dataset has not been counted yet.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run in this process with one worker and without Ray, for a debugger.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a configuration several times with different values, and compare the results in one table and page.

    Equal steps run once, and each member is a run of its own in MLflow. Interrupted, the sweep saves and
    stops (exit code 3); the same command goes on from there.
    """
    from pipeline.runs.stopping import STOPPED, StopSignals

    with StopSignals() as signals:  # before the imports below, which take seconds
        from pipeline.runs.sweeps.sweep import SweepOptions, load_sweep
        from pipeline.runs.sweeps.terminal_sweep import run_sweep_and_show

        options = SweepOptions(config=config, overrides=overrides, grid=grid, draws=draws, seed=seed, name=name)
        try:
            with signals.during("waiting for the configurations to be read; no step has begun"):
                loaded = load_sweep(path, options, say=_say, record=not dry_run)
            if dry_run:
                _show_plan(loaded, hardware=hardware, images=images, as_json=as_json)
                return
            command = shlex.join(["mae", *sys.argv[1:]])
            executor: Literal["in_process", "ray"] = "in_process" if in_process else "ray"
            summary, addresses = run_sweep_and_show(loaded, executor=executor, command=command, signals=signals)
        except KeyboardInterrupt:
            typer.echo("mae: cut off; the same command goes on from what was saved last", err=True)
            raise typer.Exit(STOPPED) from None
        if as_json:
            typer.echo(json.dumps(summary.as_json(addresses)))
        raise typer.Exit(summary.exit_code)


def _say(line: str) -> None:
    typer.echo(f"mae: {line}", err=True)


def _show_plan(loaded: "Sweep", *, hardware: str | None, images: int | None, as_json: bool) -> None:
    from rich.console import Console

    from pipeline.planning.forecast import Assumptions
    from pipeline.reporting.sweeps.table import sweep_plan_table
    from pipeline.runs.sweeps.sweep_plan import plan_sweep

    planned = plan_sweep(loaded, Assumptions(hardware=hardware, images=images))
    if as_json:
        typer.echo(json.dumps(planned.as_json()))
        return
    Console(highlight=False).print(sweep_plan_table(planned.members, seconds=planned.seconds), soft_wrap=True)
