"""`mae model export`."""

from enum import StrEnum
from typing import Annotated

import typer

from jobs.options import Overrides, config_at

app = typer.Typer(no_args_is_help=True)


class Format(StrEnum):
    """The library that the folder is for."""

    TIMM = "timm"
    HF_VIT = "hf-vit"
    HF_VITMAE = "hf-vitmae"
    SAFETENSORS = "safetensors"


@app.callback()
def model() -> None:
    """Export the weights of a pretraining."""


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(
            help="The YAML file of a run, its store, or the directory of its pretrain step.",
            metavar="CONFIG.yaml|STORE|STEP_DIR",
        ),
    ],
    to: Annotated[
        Format,
        typer.Option("--format", help="timm and hf-vit get the encoder; hf-vitmae and safetensors the decoder too."),
    ],
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix.", metavar="FOLDER")],
    at: Annotated[int | None, typer.Option(help="Step of a checkpoint. Default: the finished weights.")] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Write weights, their configuration and a README that says how to load them into a new folder.

    Prints the paths of the files.
    """
    from pipeline.config import absolute_address
    from pipeline.runs.finished.pretrainings import export as export_weights
    from pipeline.runs.finished.pretrainings import pretraining_at, pretraining_of
    from pipeline.storage import open_store

    config = config_at(target, overrides)
    pretraining = pretraining_of(config) if config else pretraining_at(target)
    store = open_store(absolute_address(out))
    for key in export_weights(store, pretraining.weights(at), pretraining.model, to=to.value):
        typer.echo(str(store.local_path(key) or f"{store.uri}/{key}"))
