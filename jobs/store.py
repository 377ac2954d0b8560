"""mae store gc: what in a store nobody needs any more, and away with it."""

import json
import time
from itertools import groupby
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="A run's store.")


@app.callback()
def store() -> None:
    """A run's store."""


@app.command()
def gc(
    address: Annotated[str, typer.Argument(help="A run's store: a folder or s3://bucket/prefix.", metavar="STORE")],
    delete: Annotated[bool, typer.Option("--delete", help="Removes what is listed; left out: lists alone.")] = False,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Since it was superseded: a run may not have noticed yet.")
    ] = 24.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Lists what superseded generations left and what was never committed, with sizes; no receipt, claim or fork names it.

    Shards, receipts, results and what a run may be writing are never among it.
    """
    from pipeline.runs import garbage
    from pipeline.storage import open_store

    root = open_store(address)
    found = list(garbage.unneeded(root, before=time.time() - 3600 * older_than_hours))
    total = sum(one.bytes for one in found)
    if delete:
        garbage.delete(root, found)
    if as_json:
        typer.echo(json.dumps({"objects": [one._asdict() for one in found], "bytes": total, "deleted": delete}))
        return
    for (folder, why), group in groupby(found, key=lambda one: ("/".join(one.key.split("/")[:-1]), one.why)):
        items = list(group)
        size = sum(one.bytes for one in items) / 2**20
        typer.echo(f"{size:12.1f} MiB  {len(items):6d} objects  {folder}  {why}")
    said = "deleted" if delete else "to delete with --delete" if found else "nothing to delete"
    typer.echo(f"{total / 2**20:12.1f} MiB  {len(found):6d} objects  {said}")
