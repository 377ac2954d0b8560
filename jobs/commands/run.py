"""`mae run`."""

import json
from typing import Annotated

import typer

from jobs.first_line import first_line
from jobs.options import AsJson, ConfigPath, Overrides, Refresh, read_config


def run(
    config: ConfigPath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run in this process with one worker and without Ray, for a debugger.")
    ] = False,
    refresh: Refresh = False,
    as_json: AsJson = False,
) -> None:
    """Run every step that is not done: snapshot, shard, pretrain, evaluate, report.

    Progress and the closing table go to standard error. Interrupted once (Ctrl-C, SIGTERM, SIGHUP),
    the run saves and stops (exit code 3); the same command goes on from there.
    """
    if line := first_line(config, overrides):
        typer.echo(line, err=True)
    from pipeline.runs.stopping import STOPPED, StopSignals

    with StopSignals() as signals:  # before the imports below, which take seconds
        from pipeline.runs.summary import as_json as summary_json
        from pipeline.runs.terminal import run_and_show

        try:
            with signals.during("waiting for the configuration to be read; no step has begun"):
                configuration = read_config(config, overrides, refresh=refresh, record=True)
            summary = run_and_show(configuration, executor="in_process" if in_process else "ray", signals=signals)
        except KeyboardInterrupt:
            typer.echo("mae: cut off; the same command goes on from what was saved last", err=True)
            raise typer.Exit(STOPPED) from None
        if as_json:
            typer.echo(json.dumps(summary_json(summary)))
        raise typer.Exit(summary.exit_code)
