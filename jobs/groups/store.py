"""`mae store gc`."""

import json
import time
from itertools import groupby
from typing import Annotated

import typer

from jobs.options import AsJson

app = typer.Typer(no_args_is_help=True)


@app.callback()
def store() -> None:
    """Find and delete what a run's store no longer needs."""


@app.command()
def gc(
    address: Annotated[str, typer.Argument(help="A run's store: a folder or s3://bucket/prefix.", metavar="STORE")],
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed. Default: only list it.")] = False,
    older_than_hours: Annotated[
        float,
        typer.Option(
            min=0, help="Hours since it was superseded. A run that was superseded notices only after a while."
        ),
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """List, with sizes, what superseded generations left, checkpoints that were never committed,
    and features of encoders that are gone.

    Shards, receipts, results, what a running step may be writing, and what a receipt, claim or fork
    names are never among it.
    """
    from pipeline.runs.finished import garbage
    from pipeline.storage import open_store

    root = open_store(address)
    found = list(garbage.unneeded(root, before=time.time() - 3600 * older_than_hours))
    total = sum(one.bytes for one in found)
    if delete:
        garbage.delete(root, found)
    if as_json:
        typer.echo(json.dumps({"objects": [one._asdict() for one in found], "bytes": total, "deleted": delete}))
        return
    for (folder, why), group in groupby(found, key=lambda one: (one.key.rpartition("/")[0], one.why)):
        items = list(group)
        typer.echo(_line(sum(one.bytes for one in items), len(items), f"{folder}  {why}"))
    typer.echo(
        _line(total, len(found), "deleted" if delete else "to delete with --delete" if found else "nothing to delete")
    )


def _line(size: int, objects: int, words: str) -> str:
    return f"{size / 2**20:12.1f} MiB  {objects:6d} objects  {words}"
