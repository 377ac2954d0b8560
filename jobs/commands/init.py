"""`mae init`."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    source: Annotated[
        str, typer.Argument(help="A folder or s3:// prefix of images, WebDataset tars or Parquet tables.")
    ] = "",
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="CONFIG.yaml")] = Path("mae.yaml"),
) -> None:
    """Write a commented configuration whose run takes minutes on a laptop if the images are few.

    Images in a local folder are counted, and a few are measured, to choose sizes and epochs.
    """
    from pipeline.runs.starter import starter_config

    text = starter_config(source, file=str(out))
    try:
        # x: never overwrites, not even a file that appeared since
        with out.open("x") as file:
            file.write(text)
    except FileExistsError:
        typer.echo(f"mae: {out} exists: write another name with --out, or delete it", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"mae: {out} cannot be written ({error.strerror}): write another path with --out", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out}: read it, then `mae plan {out}` and `mae run {out}`")
