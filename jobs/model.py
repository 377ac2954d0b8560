"""mae model export: a pretraining's weights for timm, Hugging Face, or as plain safetensors."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Weights of a pretraining.")


class Format(StrEnum):
    """Whom the folder is for."""

    TIMM = "timm"
    HF_VIT = "hf-vit"
    HF_VITMAE = "hf-vitmae"
    SAFETENSORS = "safetensors"


@app.callback()
def model() -> None:
    """Weights of a pretraining."""


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(
            help="YAML file of a run, its store, or the pretrain step's directory.",
            metavar="CONFIG.yaml|STORE|STEP_DIR",
        ),
    ],
    to: Annotated[Format, typer.Option("--format", help="hf-vitmae and safetensors hold the decoder, too.")],
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix.", metavar="FOLDER")],
    at: Annotated[int | None, typer.Option(help="Step of a checkpoint; left out: the finished weights.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Overrides a field of the configuration.", metavar="FIELD=VALUE")
    ] = [],  # noqa: B006 - typer copies it
) -> None:
    """Writes weights, configuration and a README that says how to load them into a folder."""
    from pipeline.config import absolute_address, load_config
    from pipeline.errors import ConfigError
    from pipeline.runs.pretrainings import export as export_weights
    from pipeline.runs.pretrainings import pretraining_at, pretraining_of
    from pipeline.storage import open_store

    if target.endswith((".yaml", ".yml")):
        found = pretraining_of(load_config(Path(target), overrides))
    elif overrides:
        raise ConfigError(f"--set changes a configuration, and {target!r} is none: leave it out")
    else:
        found = pretraining_at(target)
    store = open_store(absolute_address(out))
    for key in export_weights(store, found.weights(at), found.model, to=to.value):
        typer.echo(str(store.local_path(key) or f"{store.uri}/{key}"))
