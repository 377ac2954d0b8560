"""`mae model`: look at weights, take in those of others, and write ours for others."""

import json
from enum import StrEnum
from typing import Annotated, Any

import typer

from jobs.options import AsJson, Overrides, config_at

app = typer.Typer(no_args_is_help=True)

Weights = Annotated[
    str,
    typer.Argument(
        help="A weight file or a folder with one (official MAE, timm, Hugging Face, ours), the directory of a finished step, or "
        "s3://bucket/prefix.",
        metavar="WEIGHTS",
    ),
]
Prefix = Annotated[
    str | None, typer.Option(help="Which of several models in one file, as in teacher.backbone.", metavar="PATH")
]


class Format(StrEnum):
    """The library that the folder is for."""

    TIMM = "timm"
    HF_VIT = "hf-vit"
    HF_VITMAE = "hf-vitmae"
    SAFETENSORS = "safetensors"
    ONNX = "onnx"


class Layout(StrEnum):
    """Whose tensor names a file has."""

    OFFICIAL_MAE = "official_mae"
    TIMM = "timm"
    HF_VIT = "hf_vit"
    HF_VITMAE = "hf_vitmae"


class Target(StrEnum):
    """What the decoder of imported weights predicts."""

    RAW = "raw"
    NORMALISED = "normalised"


@app.callback()
def model() -> None:
    """Look at weights, import those of others, and export those of a run."""


@app.command()
def inspect(
    weights: Weights,
    prefix: Prefix = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where neither shapes nor the file tell.")
    ] = None,
    decoder_num_heads: Annotated[int | None, typer.Option(help="The same, of the decoder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what weights are: layout, kind, configuration, what was assumed and left out, size, type and norm."""
    from pipeline.config import absolute_address
    from pipeline.weights import inspect_weights, weights_at

    address = absolute_address(weights)
    options = {"num_heads": num_heads, "decoder_num_heads": decoder_num_heads}
    with weights_at(address) as path:
        found = inspect_weights(path, source=address, prefix=prefix, **_given(options))
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    for line in found.lines():
        typer.echo(line)


@app.command(name="import")
def import_(
    weights: Weights,
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix.", metavar="DIR")],
    prefix: Prefix = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Whose tensor names these are. Default: told by the names.")
    ] = None,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Leave a decoder out.")] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels of the images that they were trained with.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, for a width that no named size has.")] = None,
    decoder_num_heads: Annotated[int | None, typer.Option(help="The same, of the decoder.")] = None,
    layer_norm_eps: Annotated[float | None, typer.Option(help="Epsilon of every LayerNorm.")] = None,
    pixel_mean: Annotated[str | None, typer.Option(help="Mean of the channels in 0..1.", metavar="R,G,B")] = None,
    pixel_std: Annotated[str | None, typer.Option(help="Standard deviations in 0..1.", metavar="R,G,B")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Share of hidden patches in their pretraining.")] = None,
    target: Annotated[Target | None, typer.Option(help="What their decoder predicts.")] = None,
) -> None:
    """Convert weights into our own format: encoder.safetensors, model.safetensors if there is a decoder, and config.json.

    The options are for fields that shapes do not determine and the file does not state. import.json
    says what was assumed and what was left out. Prints the paths of the files.
    """
    from pipeline.config import absolute_address
    from pipeline.errors import ConfigError
    from pipeline.storage import open_store
    from pipeline.weights import convert_weights, weights_at

    address, store = absolute_address(weights), open_store(absolute_address(out))
    if existing := next(store.list(), None):
        raise ConfigError(f"--out {store.uri} is not empty (it holds {existing.key}): name a new folder")
    options = {
        "layout": layout and layout.value,
        "image_size": image_size and (image_size, image_size),
        "num_heads": num_heads,
        "decoder_num_heads": decoder_num_heads,
        "layer_norm_eps": layer_norm_eps,
        "pixel_mean": pixel_mean and _numbers("--pixel-mean", pixel_mean),
        "pixel_std": pixel_std and _numbers("--pixel-std", pixel_std),
        "mask_ratio": mask_ratio,
        "target": target and target.value,
    }
    with weights_at(address) as path:
        files = convert_weights(
            path, store, source=address, prefix=prefix, encoder_only=encoder_only, **_given(options)
        )
    for key in files:
        typer.echo(str(store.local_path(key) or f"{store.uri}/{key}"))


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(
            help="The YAML file of a run, its store, or the directory of its pretrain step or of a fine-tuning.",
            metavar="CONFIG.yaml|STORE|STEP_DIR",
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(
            "--format",
            help="timm, hf-vit and onnx get the encoder or classifier; hf-vitmae and safetensors the decoder too.",
        ),
    ],
    out: Annotated[str, typer.Option(help="A new folder, or s3://bucket/prefix.", metavar="FOLDER")],
    at: Annotated[int | None, typer.Option(help="Step of a checkpoint. Default: the finished weights.")] = None,
    step: Annotated[
        str | None,
        typer.Option(
            help="Name of a step that fine-tuned a classifier. Default: the pretraining.",
            metavar="finetune-data-pretrained-s0",
        ),
    ] = None,
    data_terms: Annotated[
        str | None, typer.Option(help="Licence or terms of the data, for the model card.", metavar="TEXT")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Write weights, their configuration and a model card that says how to load them and where they come from.

    Prints the paths of the files.
    """
    from pipeline.config import absolute_address
    from pipeline.runs.finished.exports import export as export_weights
    from pipeline.runs.finished.exports import source_at, source_of
    from pipeline.storage import open_store

    config = config_at(target, overrides)
    source = source_of(config, step) if config else source_at(target, step)
    store = open_store(absolute_address(out))
    made = export_weights(store, source, at=at, to=to.value, name=config.name if config else "", terms=data_terms)
    for line in made.notes:
        typer.echo(line, err=True)
    for key in made.files:
        typer.echo(str(store.local_path(key) or f"{store.uri}/{key}"))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from pipeline.errors import ConfigError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as cause:
        raise ConfigError(f"{option} {text}: write one number per channel, as in 0.5,0.5,0.5") from cause
