"""The `mae` command.

Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped and resumable, 4 done with more quarantined
images than the warning share."""

import logging
import signal
import sys
from collections.abc import Callable
from typing import Annotated, TextIO

import typer

from jobs.commands.compare import compare
from jobs.commands.config import config
from jobs.commands.doctor import doctor
from jobs.commands.evaluate import conformance, evaluate
from jobs.commands.fork import fork
from jobs.commands.init import init
from jobs.commands.plan import plan
from jobs.commands.replay import replay
from jobs.commands.run import run
from jobs.commands.sweep import sweep
from jobs.commands.ui import ui
from jobs.groups import job, model, shards, store

app = typer.Typer(
    no_args_is_help=True,
    # for --version, which comes without a command
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (init, config, run, sweep, plan, compare, evaluate, conformance, replay, fork, ui, doctor):
    app.command()(command)
for group in (job, shards, model, store):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


@app.callback()
def version_or_command(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """From a folder or bucket of images to an evaluated Masked Autoencoder encoder."""
    if version:
        from importlib import metadata

        typer.echo(f"mae-pipeline {metadata.version('mae-pipeline')}")
        raise typer.Exit


def main() -> None:
    """Entry point of `mae`."""
    try:
        guarded(app)
    finally:
        # The interpreter takes seconds to end. A signal then, such as a second Ctrl-C, would replace the exit code.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def guarded(command: Callable[[], None]) -> None:
    """Run a command. A user's mistake ends it with one clear line; a bug keeps its traceback."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, handlers=[_ToStandardError()])
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(3)
    except Exception as error:
        # Imported late: pipeline.errors imports torch through mae_core.
        from pipeline.errors import ConfigError, DataError, PipelineError, WrongAddress

        if not isinstance(error, ConfigError | PipelineError):
            raise
        typer.echo(f"mae: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError | DataError | WrongAddress) else 1)


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time: while a live display is on, a proxy that prints above it instead of into it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Ignore what the base class sets once."""


if __name__ == "__main__":
    main()
