"""`mae fork`."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import ConfigPath, Overrides


def fork(
    config: ConfigPath,
    at: Annotated[int, typer.Option(min=1, help="Step of the checkpoint to continue from.")],
    out: Annotated[Path, typer.Option(help="The configuration to write.", metavar="FORK.yaml")],
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Write the configuration of a run that continues pretraining from a checkpoint of this one with other settings.

    Weights, optimiser moments and position come from the checkpoint; learning rate, schedule and
    epochs may change. Then run it: `mae run FORK.yaml`.
    """
    from pipeline.runs.finished.fork import fork as write_fork

    start = write_fork(config, overrides, at=at, out=out)
    typer.echo(f"{out}: continues from {start.checkpoint}. Run it: mae run {out}")
