"""`mae compare`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.runs.comparing.finding import Found

WIDTH = 1000
"""Columns that a table may have: lines are as long as they must be, and a pager such as `less -S` scrolls."""
DEFAULT_STORE = ".mae/store"
"""That of a configuration which names none."""


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run names, MLflow ids (6 digits are enough), or stores, which stand for all their runs.",
            metavar="[RUN]...",
        ),
    ] = [],  # noqa: B006 - typer copies it
    query: Annotated[
        str, typer.Option("--filter", help="All runs that MLflow finds with this search.", metavar="SEARCH")
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="All runs in MLflow.")] = False,
    lineage: Annotated[
        bool,
        typer.Option(
            "--lineage",
            help="Show what a run's scores were made from or, for a shard, an image or another file, the scores that depend on it.",
        ),
    ] = False,
    tracking: Annotated[
        str | None,
        typer.Option(
            help="Address of MLflow, or none for stores alone. Default: MLFLOW_TRACKING_URI, or mlflow.db in the store.",
            metavar="URI",
        ),
    ] = None,
    store: Annotated[
        str,
        typer.Option(help="Store whose MLflow is read, and in which --lineage looks for an image.", metavar="STORE"),
    ] = DEFAULT_STORE,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write one page with curves, tests and pictures into this folder; at most 20 runs.", metavar="DIR"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put runs side by side: what differs in configuration, data and code, scores with paired tests, speed and cost."""
    from pipeline.errors import ConfigError
    from pipeline.tracking.connection import resolve_tracking_uri

    chosen = sum((bool(runs), bool(query), every))
    if chosen != 1 or (lineage and not runs):
        raise ConfigError(
            "--lineage needs a run, a shard, an image or another file of a store"
            if lineage
            else "name runs, or write --all or --filter, one of the three"
        )
    uri = resolve_tracking_uri(tracking, store_uri=store)
    if lineage:
        return _show_lineage(runs, uri, store, as_json=as_json)
    from pipeline.runs.comparing.finding import find, find_all

    if not runs and not uri:
        raise ConfigError("--all and --filter search MLflow, and tracking is none: name stores instead")
    found = find(runs, uri) if runs else find_all(uri, query=query)
    return _show(found, out=out, as_json=as_json)


def _show(found: "Sequence[Found]", *, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from pipeline.errors import ConfigError
    from pipeline.reporting.comparison.tables import comparison_view, runs_table
    from pipeline.reporting.comparison.values import MOST_NAMED

    console = Console(highlight=False, width=WIDTH, soft_wrap=True)
    if len(found) > MOST_NAMED:
        if out:
            raise ConfigError(f"--out: {len(found)} runs do not fit on a page; name {MOST_NAMED} at most")
        rows = [one.row for one in found]
        if as_json:
            from pipeline.reporting.comparison.plain import rows_json

            typer.echo(json.dumps({"runs": rows_json(rows)}))
        else:
            console.print(runs_table(rows))
            console.print(f"\n{len(rows)} runs. Name {MOST_NAMED} at most to see their differences, tests and curves.")
        return
    from pipeline.reporting.comparison.plain import comparison_json
    from pipeline.runs.comparing.comparison import compare as compare_runs

    comparison = compare_runs(found)
    page = ""
    if out:
        from pipeline.reporting.comparison.page import render_page

        out.mkdir(parents=True, exist_ok=True)
        path = out / "index.html"
        path.write_text(render_page(comparison), encoding="utf-8")
        page = str(path.absolute())
    if as_json:
        typer.echo(json.dumps(comparison_json(comparison) | ({"page": page} if page else {})))
        return
    console.print(comparison_view(comparison))
    console.print(f"\npage  {page}" if page else "\n--out DIR writes the page with curves and pictures")


def _show_lineage(targets: "Sequence[str]", uri: str, store: str, *, as_json: bool) -> None:
    from rich.console import Console

    from pipeline.reporting.comparison.lineage import lineage_json, lineage_tree
    from pipeline.runs.lineage.tracing import trace

    for target in targets:
        for lineage in trace(target, tracking_uri=uri, store=store):
            if as_json:
                typer.echo(json.dumps(lineage_json(lineage)))
            else:
                Console(highlight=False, width=WIDTH, soft_wrap=True).print(lineage_tree(lineage))
