"""`mae config`."""

import json
from typing import Annotated

import typer

from jobs.options import AsJson


def config(
    section: Annotated[
        str, typer.Argument(help="Show this field or section only, such as pretrain or resources.workers.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print every field of the configuration with its type, its default and its meaning."""
    from dataclasses import asdict

    from pipeline.config.reference import field_references
    from pipeline.errors import ConfigError

    fields = field_references()
    found = [one for one in fields if not section or f"{one.name}.".startswith(f"{section}.")]
    if not found:
        tops = ", ".join(one.name for one in fields if "." not in one.name)
        raise ConfigError(f"{section} is not a field: `mae config` lists all of them; the sections are {tops}")
    for one in found:
        if as_json:
            typer.echo(json.dumps(asdict(one)))
        elif one.section:
            typer.echo(f"\n{one.name}  ({one.type})\n    {one.meaning}")
        else:
            typer.echo(f"{one.name}  {one.type}  = {one.default}\n    {one.meaning}")
