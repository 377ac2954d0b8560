"""mae shards verify, inspect, index, audit: are shards as they were written, what is in them, were the right samples trained on?"""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Shards, and what was read from them.")


Target = Annotated[
    str,
    typer.Argument(
        help="YAML file of a run, or the directory of a shard or join step.", metavar="CONFIG.yaml|STEP_DIR"
    ),
]
Set = Annotated[list[str], typer.Option("--set", help="Overrides a field of the configuration.", metavar="FIELD=VALUE")]


@app.command()
def verify(
    target: Target,
    overrides: Set = [],  # noqa: B006 - typer copies it
    workers: Annotated[int | None, typer.Option(min=1, help="CPUs; 1 reads here, without a cluster.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a dataset on standard output.")] = False,
) -> None:
    """Reads every byte of the shards back, and names each damage with the shard, the sample and what to do about it.

    Exit code 1 when anything was found. Nothing is written.
    """
    from jobs.datasets import verify_command

    raise typer.Exit(verify_command(target, overrides, workers=workers, as_json=as_json))


@app.command()
def inspect(
    target: Target,
    overrides: Set = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="The picture.", metavar="FILE.png")] = Path("shards.png"),
    split: Annotated[str | None, typer.Option(help="One split; left out: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=400, help="Images on the sheet.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images.")] = 0,
) -> None:
    """Draws images, sizes and labels into one picture; counts, quarantine and near duplicates in a table."""
    from jobs.datasets import inspect_command

    raise typer.Exit(inspect_command(target, overrides, out=out, split=split, samples=samples, seed=seed))


@app.command()
def index(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of WebDataset tars.", metavar="TARS")],
    overrides: Set = [],  # noqa: B006
    store: Annotated[str, typer.Option(help="Where the index goes: a folder or s3://bucket/prefix.")] = ".mae/store",
    workers: Annotated[int | None, typer.Option(min=1, help="CPUs; left out or 1: here, without a cluster.")] = None,
) -> None:
    """Indexes tars of others where they lie: offsets, checksums, labels. `mae run` on them, with this store, goes on from there."""
    from jobs.datasets import index_command

    raise typer.Exit(index_command(source, overrides, store=store, workers=workers))


@app.command()
def audit(
    address: Annotated[
        str, typer.Argument(help="A run's store, or one training step's directory in it.", metavar="STORE_OR_STEP")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help="Directory of the step that made the dataset, where it is in another store.", metavar="DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line a training step.")] = False,
) -> None:
    """Compares the ids that reached the devices, as the newest checkpoint recorded them, with the order's arithmetic.

    Exit code 1 when a sample came more or less often than once an epoch, recorded substitutions excused.
    """
    from dataclasses import asdict

    from pipeline.errors import DataError
    from pipeline.graph.receipts import claims
    from pipeline.storage import open_store
    from pipeline.training.checkpoints.audit import audit as audit_step
    from pipeline.training.checkpoints.audit import dataset_at, training_steps

    store = open_store(address)
    steps = [store] if claims(store) else [store.at(name) for name in training_steps(store)]
    if not steps:
        raise DataError(
            f"{store.uri}: no training step with a committed checkpoint. Give a run's store, or a step's directory"
        )
    given = dataset_at(open_store(dataset)) if dataset else None
    results = [audit_step(step, dataset=given) for step in steps]
    for result in results:
        typer.echo(json.dumps({**asdict(result), "agrees": result.agrees}) if as_json else result.line)
    raise typer.Exit(0 if all(result.agrees for result in results) else 1)
