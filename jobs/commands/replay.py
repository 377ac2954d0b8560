"""`mae replay`."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from jobs.options import AsJson


def replay(
    address: Annotated[
        str, typer.Argument(help="A bundle, a training step's directory or a run's store.", metavar="BUNDLE|STORE")
    ],
    step: Annotated[int | None, typer.Option(min=0, help="Number of the bad step. Default: the last one.")] = None,
    most_steps: Annotated[
        int, typer.Option(min=0, help="Most steps to compute again between the checkpoint and it.")
    ] = 1000,
    as_json: AsJson = False,
) -> None:
    """Compute a bad training step again in this process, and show which samples' losses are not finite.

    Exit code 0 when it comes out as it did then, 1 when it does not.
    """
    from dataclasses import asdict

    from pipeline.reporting.replay_report import replay_lines
    from pipeline.runs.finished.replay import find_bundle
    from pipeline.runs.finished.replay import replay as replay_bundle

    bundle = find_bundle(address, step=step)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints on standard output, which belongs to the result
        replayed = replay_bundle(bundle, most_steps=most_steps)
    if as_json:
        typer.echo(json.dumps({"bundle": bundle.uri, **asdict(replayed), "reproduced": not replayed.differences}))
    else:
        for line in replay_lines(bundle, replayed):
            typer.echo(line)
    raise typer.Exit(1 if replayed.differences else 0)
