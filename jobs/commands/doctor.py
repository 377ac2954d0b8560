"""`mae doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import AsJson

SYMBOLS = {"ok": "✓", "warning": "!", "wrong": "✗"}


def doctor(
    data: Annotated[
        bool, typer.Option("--data", help="Time image decoding, and show how many cores a GPU needs for it, by model.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option(help="JPEGs to decode. Default: generated ones.", metavar="DIR")
    ] = None,
    gpus: Annotated[list[str], typer.Option("--gpu", help="A100-40, A100, H100, H200, B200 or L40S. Repeatable.")] = [],  # noqa: B006
    tflops: Annotated[float | None, typer.Option(help="Peak of another GPU in dense bfloat16 TFLOP/s.")] = None,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training uses, in (0, 1].")] = 0.4,
    seconds: Annotated[float, typer.Option(help="Seconds to measure for, once on one core and once on all.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Check whether this machine can do what a run will ask of it: a line per check, the last one starts Ray.

    Exit code 1 when a run cannot work here. With --data, time image decoding instead.
    """
    if not data:
        raise typer.Exit(_machine(as_json))
    from pipeline.planning.decode_cores import measure_decoding
    from pipeline.reporting.decode_report import decode_text

    report = measure_decoding(images, gpus=gpus, tflops=tflops, share_of_peak=mfu, seconds=seconds)
    typer.echo(decode_text(report))
    if as_json:
        typer.echo(json.dumps(report.as_json()))


def _machine(as_json: bool) -> int:  # noqa: FBT001 - typer's flag
    """Print a line per check of this machine, as it is made, and return the exit code."""
    typer.echo("checking this machine", err=True)  # the imports below take seconds
    from dataclasses import asdict

    from pipeline.runs.checking.machine import examine_machine

    wrong = False
    for finding in examine_machine():
        wrong |= finding.state == "wrong"
        line = f"{SYMBOLS[finding.state]} {finding.name:<9} {finding.text}"
        typer.echo(json.dumps(asdict(finding)) if as_json else line)
    return 1 if wrong else 0
