"""Options that several commands share, and the configuration that they amount to.

Declared once, so that an option reads and behaves the same everywhere. Nothing heavy is imported
before a command runs: importing torch takes seconds, which `mae --help` would have to wait for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config import RunConfig

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML file.", metavar="CONFIG.yaml")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Set a field of the configuration, as in --set pretrain.epochs=100. Repeatable.",
        metavar="FIELD=VALUE",
    ),
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="List the source again and take in new images as a new part of the dataset.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, one line per result.")]


def read_config(path: Path, overrides: Sequence[str], *, refresh: bool = False, record: bool = False) -> "RunConfig":
    """Read the configuration of a run, settle which state of its data it reads, and say what is not obvious about that.

    `refresh`: look for new images. `record`: remember in the store that data have moved."""
    from pipeline.config import load_config
    from pipeline.runs.sources.state import settled_for_run

    def say(line: str) -> None:
        typer.echo(f"mae: {line}", err=True)

    return settled_for_run(load_config(path, overrides), say=say, look_for_new=refresh, record=record)


def config_at(target: str, overrides: Sequence[str]) -> "RunConfig | None":
    """Read the configuration that a target names, or return None where the target is an address in a store.

    Raises ConfigError for --set with an address, which it could not change."""
    from pipeline.config import load_config
    from pipeline.errors import ConfigError
    from pipeline.runs.sources.state import settled

    if target.endswith((".yaml", ".yml")):
        return settled(load_config(Path(target), overrides))
    if overrides:
        raise ConfigError(f"--set changes a configuration, and {target!r} is not a YAML file: leave --set out")
    return None
