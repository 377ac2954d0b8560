"""`mae plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import AsJson, ConfigPath, Overrides, Refresh, read_config


def plan(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    refresh: Refresh = False,
    hardware: Annotated[
        str | None,
        typer.Option(help="Device to plan for: A100-40, A100, H100, H200, B200, L40S or CPU. Default: this machine's."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of workers: short for --set resources.workers=N.")] = None,
    images: Annotated[
        int | None, typer.Option(help="Images per epoch, where the dataset has not been counted yet.")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="Your prices in USD per device-hour: a filled-in copy of jobs/prices.yaml.", metavar="FILE"),
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="Measured peak of one device in dense TFLOP/s.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Measured share of the peak that training uses, in (0, 1].")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is cached, what would run and why, and what it takes: memory, steps, hours, cost.

    Nothing is written. A CPU's speed is measured, which takes about a second.
    """
    from rich.console import Console

    from pipeline.planning.forecast import Assumptions
    from pipeline.reporting.forecast import forecast_text
    from pipeline.reporting.terminal import plan_table
    from pipeline.runs.plan import forecast_run

    if workers is not None:
        overrides = [*overrides, f"resources.workers={workers}"]  # last, so it wins over --set
    assumptions = Assumptions(hardware=hardware, images=images, prices=prices, tflops=tflops, mfu=mfu)
    planned = forecast_run(read_config(config, overrides, refresh=refresh), assumptions)
    if as_json:
        typer.echo(json.dumps(planned.as_json()))
        return
    console = Console(highlight=False)
    console.print(plan_table(planned.rows), soft_wrap=True)
    for table in planned.data.tables:
        console.print()
        console.print(table, soft_wrap=True)
    for line in (*planned.data.lines, *(planned.start.lines() if planned.start else ())):
        console.print(f"note: {line}", soft_wrap=True, markup=False)
    if planned.forecasts:
        console.print(forecast_text(planned.forecasts.values(), planned.hardware, planned.proposed), soft_wrap=True)
