"""`mae ui`."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Overrides

DEMO_STORE = ".demo/store"
"""Where `make demo` writes."""


def ui(
    config: Annotated[Path | None, typer.Argument(help="The YAML file of a run. Default: the store in ./.mae.")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """Open MLflow on 127.0.0.1 with the runs of a configuration. Ctrl-C ends it."""
    from pipeline.config import RunConfig, absolute_address, load_config
    from pipeline.errors import ConfigError
    from pipeline.tracking import resolve_tracking_uri, serve

    read = load_config(config, overrides) if config else None
    own = RunConfig.model_fields["store"].default
    if not read and not Path(own).exists() and Path(DEMO_STORE).exists():
        typer.echo(f"mae: {own} does not exist, so this shows the demo's runs in {DEMO_STORE}", err=True)
        own = DEMO_STORE
    store = read.store if read else absolute_address(own)
    uri = resolve_tracking_uri(read.tracking.uri if read else None, store_uri=store)
    if not uri:
        raise ConfigError(
            f"{'tracking.uri' if read and read.tracking.uri else 'MLFLOW_TRACKING_URI'} is none, so there are no runs in MLflow to "
            "show. The store's report page has the scores and curves"
        )
    serve(uri, port=port)
