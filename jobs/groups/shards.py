"""`mae shards verify`, `inspect`, `index`, `preview`, `keep`, `audit`.

Are the shards as they were written, what is in them, and did training read the right samples?"""

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson, ConfigPath, Overrides, config_at

if TYPE_CHECKING:
    from pipeline.data.dataset.manifest import Manifest
    from pipeline.runs.finished.datasets import FinishedDataset

app = typer.Typer(no_args_is_help=True, help="Verify, inspect and index shards; audit what was read from them.")

Target = Annotated[
    str,
    typer.Argument(
        help="The YAML file of a run, or the directory of a shard or join step.", metavar="CONFIG.yaml|STEP_DIR"
    ),
]
LOCAL_UNLESS_LARGE = (
    "CPUs to use. 1 reads in this process, without a cluster. Default: a cluster if there is much to read."
)


@app.command()
def verify(
    target: Target,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    workers: Annotated[int | None, typer.Option(min=1, help=LOCAL_UNLESS_LARGE)] = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of the shards, and name each damage with its shard, its sample and how to repair it.

    Nothing is written. Exit code 1 when any damage was found.
    """
    from rich.console import Console

    from pipeline.reporting.progress import ProgressDisplay
    from pipeline.reporting.shard_pictures import verification_table
    from pipeline.runs.executor import connected, executor_for_reading
    from pipeline.runs.finished.verification import verify as verify_dataset

    datasets = _datasets(target, overrides)
    executor = executor_for_reading(datasets, workers=workers)
    with connected(executor, workers=workers), ProgressDisplay() as display:
        found = [
            verify_dataset(one, executor=executor, progress=display.for_step(f"verify {one.receipt.step}"))
            for one in datasets
        ]
    # with --json, standard output holds nothing but JSON
    console = Console(stderr=as_json, highlight=False)
    for verification in found:
        console.print(verification_table(verification), soft_wrap=True)
    if as_json:
        for verification in found:
            typer.echo(json.dumps({"clean": verification.clean, **asdict(verification)}))
    raise typer.Exit(0 if all(verification.clean for verification in found) else 1)


@app.command()
def inspect(
    target: Target,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the picture. Default: shards-<dataset>.png, named by the dataset's digest.",
            metavar="FILE.png",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Show one split only. Default: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=400, help="Number of images on the contact sheet.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed for choosing the images.")] = 0,
    leaks: Annotated[
        Path | None,
        typer.Option(
            help="Also search again and write every pair of a held-out image and a training image that are one picture.",
            metavar="FILE.csv",
        ),
    ] = None,
) -> None:
    """Draw images, sizes and labels into one picture, and print counts, quarantine, copies and near duplicates.

    Of a run with several datasets, the one of pretraining is shown.
    """
    from rich.console import Console

    from pipeline.data.dataset.survey import survey
    from pipeline.errors import ConfigError
    from pipeline.reporting.shard_pictures import (
        others_table,
        survey_png,
        survey_table,
        terminal_sheet,
        unreadable_line,
    )

    dataset = _datasets(target, overrides)[0]
    manifest = dataset.address.open()
    if split is not None and split not in manifest.splits:
        raise ConfigError(f"--split {split!r} is none of this dataset's: write {' or '.join(manifest.splits)}")
    seen = survey(
        manifest,
        splits=[split] if split else manifest.splits,
        images=samples,
        seed=seed,
        near_duplicates=dataset.facts.near_duplicates_across_splits,
    )
    out = out or Path(f"shards-{manifest.digest[:12]}.png")  # another dataset's picture is never overwritten
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(survey_png(seen))
    console = Console(highlight=False)
    if sys.stdout.isatty() and seen.shown:
        console.print(terminal_sheet(seen.shown))
        console.print()
    console.print(survey_table(seen), soft_wrap=True)
    if others := others_table(dataset.facts):
        console.print(others, soft_wrap=True)
    if line := unreadable_line(seen):
        console.print(f"\n{line}", soft_wrap=True, markup=False)
    typer.echo(f"\ndataset  {manifest.digest[:12]}  {dataset.step_uri}\npicture  {out.absolute()}")
    if leaks:
        typer.echo(f"leaks    {leaks.absolute()}  {_write_leaks(manifest, leaks)} pairs")


@app.command()
def index(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of WebDataset tars.", metavar="TARS")],
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    store: Annotated[
        str | None,
        typer.Option(
            help="Where to write the index: a folder or s3://bucket/prefix. Default: .mae/store, as for a run."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="CPUs to use. 1, the default, reads in this process, without a cluster.")
    ] = None,
) -> None:
    """Index existing WebDataset tars without copying them: offsets, checksums, labels.

    `mae run` with the same source and store then skips straight to pretraining.
    """
    from rich.console import Console

    from pipeline.data.dataset.survey import survey
    from pipeline.reporting.progress import ProgressDisplay
    from pipeline.reporting.shard_pictures import others_table, survey_table
    from pipeline.runs.executor import connected, executor_for_indexing
    from pipeline.runs.finished.datasets import datasets_of, make_datasets
    from pipeline.runs.indexing import index_config
    from pipeline.runs.summary import EXIT_CODES
    from pipeline.runs.terminal import TerminalHooks

    config = index_config(source, overrides, store=store)
    executor = executor_for_indexing(workers=workers)
    with connected(executor, workers=workers), ProgressDisplay() as display:
        outcomes = make_datasets(config, executor=executor, hooks=TerminalHooks(display))
    states = {outcome.state for outcome in outcomes}
    if states - {"done", "cached"}:
        raise typer.Exit(EXIT_CODES["stopped" if "stopped" in states else "failed"])
    dataset = datasets_of(config)[0]
    manifest = dataset.address.open()
    console = Console(highlight=False)
    near = dataset.facts.near_duplicates_across_splits
    seen = survey(manifest, splits=manifest.splits, images=0, near_duplicates=near)
    console.print(survey_table(seen), soft_wrap=True)
    if others := others_table(dataset.facts):
        console.print(others, soft_wrap=True)
    typer.echo(f"\ndataset  {manifest.digest[:12]}  {dataset.step_uri}")


@app.command()
def preview(
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of images, tars or tables.", metavar="SOURCE")],
    overrides: Overrides = [],  # noqa: B006 - typer copies it
) -> None:
    """Show how a source would be read: splits, classes, examples, and the files that are passed over.

    Nothing is written, and no configuration is needed. At most the first 200,000 files are listed.
    """
    from rich.console import Console

    from pipeline.reporting.progress import ProgressDisplay
    from pipeline.runs.checking.findings import preview_source
    from pipeline.runs.indexing import source_config

    with ProgressDisplay() as display:
        table = preview_source(source_config(source, overrides), display.for_step("preview"))
    Console(highlight=False).print(table, soft_wrap=True)


@app.command()
def keep(config: ConfigPath, overrides: Overrides = []) -> None:  # noqa: B006 - typer copies it
    """Keep the listings that an older version made, although this one would read their sources otherwise.

    What was trained on them stays, and the same configuration goes on with it.
    """
    from pipeline.config import load_config
    from pipeline.runs.checking.findings import keep_reading
    from pipeline.runs.workflow import build
    from pipeline.storage import open_store

    read = load_config(config, overrides)
    store = open_store(read.store)
    kept = [step.name for step in build(read) if step.kind == "snapshot" and keep_reading(step, store)]
    typer.echo(f"kept: {', '.join(kept) or 'nothing, since nothing is listed yet'}")


@app.command()
def audit(
    address: Annotated[
        str, typer.Argument(help="A run's store, or the directory of one training step in it.", metavar="STORE_OR_STEP")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help="Directory of the step that made the dataset, if it is in another store.", metavar="DIR"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that training read every sample once per epoch, by the ids that the newest checkpoint recorded.

    Exit code 1 when a sample was read more or less often. Recorded substitutions and skipped steps
    are excused.
    """
    from pipeline.runs.finished.audit import audit as audit_steps

    results = audit_steps(address, dataset=dataset)
    for result in results:
        typer.echo(json.dumps({**asdict(result), "agrees": result.agrees}) if as_json else result.line)
    raise typer.Exit(0 if all(result.agrees for result in results) else 1)


def _write_leaks(manifest: "Manifest", path: Path) -> int:
    """Write all near duplicates across splits as CSV, and return their number."""
    from pipeline.data.dataset.facts import NearPair
    from pipeline.data.dataset.survey import leaks

    pairs = leaks(manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(NearPair)])
        writer.writeheader()
        writer.writerows(asdict(pair) for pair in pairs)
    return len(pairs)


def _datasets(target: str, overrides: Sequence[str]) -> "list[FinishedDataset]":
    from pipeline.runs.finished.datasets import dataset_in, datasets_of

    config = config_at(target, overrides)
    return datasets_of(config) if config else [dataset_in(target)]
