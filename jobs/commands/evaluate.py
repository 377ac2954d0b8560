"""`mae evaluate` and `mae conformance`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import AsJson, Overrides

Weights = Annotated[
    Path,
    typer.Argument(
        help="A file of torch.save or safetensors, or a folder of timm, Hugging Face, DeepSpeed or this project.",
        metavar="WEIGHTS",
    ),
]
Store = Annotated[str, typer.Option(help="Where everything is written. Default: .mae/store.", metavar="STORE")]
Prefix = Annotated[
    str | None, typer.Option(help="Which of several models in the file: model_ema, teacher.backbone.", metavar="PATH")
]
NumHeads = Annotated[int | None, typer.Option(help="Attention heads, where the file does not say.")]
ImageSize = Annotated[
    str | None, typer.Option(help="Pixels of the images to encode: 224 or 224x448. Positions are resized.")
]
LayerNormEps = Annotated[float | None, typer.Option(help="Added to the variance in every LayerNorm.")]
PixelMean = Annotated[str | None, typer.Option(help="Of each channel on the scale 0..1: 0.485,0.456,0.406.")]
PixelStd = Annotated[str | None, typer.Option(help="Of each channel on the scale 0..1: 0.229,0.224,0.225.")]
InProcess = Annotated[bool, typer.Option("--in-process", help="Run in this process with one worker and without Ray.")]


def evaluate(
    weights: Weights,
    data: Annotated[
        str,
        typer.Option(
            help="A folder or s3:// prefix of labelled images, WebDataset tars or Parquet tables.", metavar="DIR"
        ),
    ],
    protocols: Annotated[
        str, typer.Option(help="Such as knn,linear,finetune, or all. Default: knn,ridge,linear,rankme.")
    ] = "",
    store: Store = "",
    prefix: Prefix = None,
    num_heads: NumHeads = None,
    image_size: ImageSize = None,
    layer_norm_eps: LayerNormEps = None,
    pixel_mean: PixelMean = None,
    pixel_std: PixelStd = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    in_process: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate weights from elsewhere, beside the same architecture with random weights.

    What was understood of the weights is printed first. Exit codes are those of `mae run`.
    """
    from pipeline.runs.stopping import STOPPED, StopSignals

    with StopSignals() as signals:  # before the imports below, which take seconds
        from pipeline.runs.foreign.evaluation import evaluation_of
        from pipeline.runs.sources.state import settled_for_run
        from pipeline.runs.summary import as_json as summary_json
        from pipeline.runs.terminal import run_and_show
        from pipeline.weights import understood

        try:
            with signals.during("waiting for the weights to be read; no step has begun"):
                given, config = evaluation_of(
                    weights,
                    data,
                    protocols=protocols,
                    store=store,
                    prefix=prefix,
                    options={
                        "num_heads": num_heads,
                        "image_size": image_size,
                        "layer_norm_eps": layer_norm_eps,
                        "pixel_mean": pixel_mean,
                        "pixel_std": pixel_std,
                    },
                    overrides=overrides,
                )
                for line in understood(given):
                    typer.echo(line, err=True)
                config = settled_for_run(config, say=lambda line: typer.echo(f"mae: {line}", err=True), record=True)
            summary = run_and_show(config, executor="in_process" if in_process else "ray", signals=signals)
        except KeyboardInterrupt:
            typer.echo("mae: cut off; the same command goes on from what was saved last", err=True)
            raise typer.Exit(STOPPED) from None
        if as_json:
            typer.echo(
                json.dumps(
                    {**summary_json(summary), "weights": given.facts.as_json() | {"assumed": given.report.assumed}}
                )
            )
        raise typer.Exit(summary.exit_code)


def conformance(
    weights: Weights,
    imagenet: Annotated[
        str, typer.Option(help="ImageNet with train/ and val/; val/ alone for a classifier.", metavar="DIR")
    ] = "",
    store: Store = "",
    prefix: Prefix = None,
    num_heads: NumHeads = None,
    layer_norm_eps: LayerNormEps = None,
    pixel_mean: PixelMean = None,
    pixel_std: PixelStd = None,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    in_process: InProcess = False,
    as_json: AsJson = False,
) -> None:
    """Check weights: that all of them are read, that features equal those of timm and Hugging Face, that scores are as published.

    Exit code 0 if no check failed, 1 if one did. What could not be checked is said.
    """
    from pipeline.runs.foreign.conformance import checks_without_images, published_score
    from pipeline.runs.foreign.evaluation import stated_fields

    options = {
        "num_heads": num_heads,
        "layer_norm_eps": layer_norm_eps,
        "pixel_mean": pixel_mean,
        "pixel_std": pixel_std,
    }
    given, checks = checks_without_images(weights, stated_fields(options, overrides), prefix=prefix)
    if given:
        checks.append(
            published_score(
                weights,
                given,
                imagenet,
                store=store,
                prefix=prefix,
                options=options,
                overrides=overrides,
                executor="in_process" if in_process else "ray",
            )
        )
    if as_json:
        typer.echo(json.dumps({"weights": str(weights), "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            typer.echo(f"{check.state:<12} {check.name:<20} {check.detail}")
    raise typer.Exit(int(any(check.state == "failed" for check in checks)))
