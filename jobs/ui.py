"""`mae ui`."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Overrides


def ui(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of a run. Default: the store in ./.mae.")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow on 127.0.0.1 with the runs of a configuration. Ctrl-C ends it."""
    from pipeline.config import RunConfig, absolute_address, load_config
    from pipeline.tracking import resolve_tracking_uri, serve

    read = load_config(config, overrides) if config else None
    store = read.store if read else absolute_address(RunConfig.model_fields["store"].default)
    serve(resolve_tracking_uri(read.tracking.uri if read else None, store_uri=store), port=port)
