"""mae run, mae plan, mae ui: configuration in, tables and pictures out."""

import io
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig, load_config
from pipeline.graph.plan import PlannedStep as GraphRow
from pipeline.graph.runner import Outcome
from pipeline.planning.estimate import (
    GIB,
    as_set,
    by_stage,
    effort,
    images_in_epoch,
    proposal,
    trainings,
    worker_layout,
)
from pipeline.planning.hardware import Hardware, here, measured, prices
from pipeline.planning.hardware import hardware as hardware_named
from pipeline.reporting.forecast import Forecast, forecast_text
from pipeline.reporting.reconstructions import terminal_reconstruction
from pipeline.reporting.summaries import PlanRow, StepRow
from pipeline.reporting.progress import ProgressDisplay
from pipeline.reporting.terminal import closing_table, plan_table
from pipeline.runs.hooks import detail_of
from pipeline.runs.refresh import refresh as refresh_sources
from pipeline.runs.run import plan_run, run_pipeline
from pipeline.runs.summary import EXIT_CODES, RunSummary
from pipeline.runs.workflow import build
from pipeline.storage import open_store
from pipeline.tracking import resolve_tracking_uri, serve

DEFAULT_STORE = ".mae/store"


def run_command(
    config_path: Path, overrides: Sequence[str], *, executor: Executor, refresh: bool = False, as_json: bool
) -> int:
    """Runs and shows; returns the exit code."""
    try:
        summary = run_and_show(_configured(config_path, overrides, refresh=refresh), executor=executor)
    except KeyboardInterrupt:
        print("mae: cut off; the same command goes on from what was saved last", file=sys.stderr)
        return EXIT_CODES["stopped"]
    if as_json:
        print(json.dumps(as_line(summary)))
    return summary.exit_code


def run_and_show(config: RunConfig, *, executor: Executor) -> RunSummary:
    """Runs with progress on standard error, closing with the tables and a reconstruction."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    console = Console(stderr=True, highlight=False)
    # standard output belongs to results: DeepSpeed prints there
    with redirect_stdout(sys.stderr), ProgressDisplay(console=console) as display:
        summary = run_pipeline(config, executor=executor, display=display)
    console.print()
    _show_reconstruction(console, summary)
    addresses = dict(summary.addresses)
    rows = [_row(outcome) for outcome in summary.outcomes]
    console.print(closing_table(rows, scores=summary.scores, addresses=addresses), soft_wrap=True)
    console.print(verdict_line(config, summary), soft_wrap=True)
    return summary


def verdict_line(config: RunConfig, summary: RunSummary) -> str:
    """What happened, and what to do about it."""
    if summary.verdict == "failed":
        return "failed: mend what the table names, and run the same command again; finished steps stay finished"
    if summary.verdict == "stopped":
        return "stopped, nothing is lost: the same command goes on from here"
    if summary.verdict == "warned":
        return (
            f"done, but {summary.bad_share:.1%} of the images are unreadable, more than data.bad_share_warn="
            f"{config.data.bad_share_warn:.1%}: quarantine.parquet in the shard step's folder names them"
        )
    return "done"


def as_line(summary: RunSummary) -> dict[str, Any]:
    """The JSON line that ends `mae run --json`."""
    scores: dict[str, Any] = {}
    for score in summary.scores:
        entry = {"mean": score.mean, "sd": score.sd, "values": list(score.values)}
        scores.setdefault(score.dataset, {}).setdefault(score.protocol, {})[score.encoder] = entry
    return {
        "run": summary.run_id,
        "verdict": summary.verdict,
        "steps": [
            {
                "name": outcome.step.name,
                "kind": outcome.step.kind,
                "fingerprint": outcome.step.fingerprint,
                "state": outcome.state,
                "uri": outcome.uri,
                "seconds": round(outcome.seconds, 3),
            }
            for outcome in summary.outcomes
        ],
        "scores": scores,
        "addresses": dict(summary.addresses),
    }


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """On what, and at what price, `mae plan` foresees."""

    hardware: str | None = None
    """Left out: this machine."""
    images: int | None = None
    """In an epoch, where nobody has counted them yet."""
    prices: Path | None = None
    tflops: float | None = None
    mfu: float | None = None


def plan_command(
    config_path: Path, overrides: Sequence[str], *, foreseen: Foreseen, refresh: bool = False, as_json: bool
) -> int:
    """Shows what a run would do, and what it would take."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    config = _configured(config_path, overrides, refresh=refresh)
    hardware = _hardware(config, foreseen)
    price = prices(foreseen.prices).get(hardware.name) if foreseen.prices else None
    rows = plan_run(config)
    waiting = [row for row in rows if row.state != "cached" and trainings([row.step])]
    forecasts = {row.step.name: _forecast(row, config, hardware, foreseen, price) for row in waiting}
    steps = list(trainings(row.step for row in waiting).values())
    proposed = proposal(steps, config.resources, hardware) if steps else None
    if as_json:
        line = {"hardware": hardware.name, "proposed": as_set(proposed) if proposed else None}
        print(json.dumps({"steps": [_plan_json(row, forecasts.get(row.step.name)) for row in rows], **line}))
        return 0
    shown = [_plan_row(row, forecasts.get(row.step.name)) for row in rows]
    console = Console(highlight=False)
    console.print(plan_table(shown), soft_wrap=True)
    if told := _told_apart(forecasts.values()):
        console.print(forecast_text(told, hardware, proposed), soft_wrap=True)
    return 0


def _hardware(config: RunConfig, foreseen: Foreseen) -> Hardware:
    resources = config.resources
    chosen = (
        hardware_named(foreseen.hardware)
        if foreseen.hardware
        else here(workers=resources.worker_range[0], use_gpu=resources.use_gpu)
    )
    chosen = chosen.as_measured(tflops=foreseen.tflops, mfu=foreseen.mfu)
    for precision in {training.recipe.precision for training in trainings(build(config)).values()}:
        chosen = measured(chosen, precision)
    return chosen


def _forecast(
    row: GraphRow, config: RunConfig, hardware: Hardware, foreseen: Foreseen, price: float | None
) -> Forecast:
    training, resources = trainings([row.step])[row.step.name], config.resources
    images = images_in_epoch(row.step, open_store(config.store)) or foreseen.images
    took = effort(training, resources, hardware, images=images) if images else None
    devices = 1 if hardware.kind == "cpu" else resources.worker_range[0]
    return Forecast(
        name=row.step.name,
        layout=worker_layout(training, resources, hardware),
        stages=by_stage(training, resources, hardware),
        effort=took,
        cost=took.cost(devices=devices, price=price) if took and price is not None else None,
    )


def _told_apart(forecasts: Iterable[Forecast]) -> list[Forecast]:
    """One of those that differ in name alone: encoders and seeds of a protocol."""
    first: dict[Any, Forecast] = {}
    for one in forecasts:
        first.setdefault((one.layout.settings, one.layout.footprint, one.effort), one)
    return list(first.values())


def _plan_json(row: GraphRow, forecast: Forecast | None) -> dict[str, Any]:
    return {
        "name": row.step.name,
        "kind": row.step.kind,
        "fingerprint": row.step.fingerprint,
        "state": row.state,
        "differs": list(row.differs),
        "uri": row.uri,
        "memory_gib": round(forecast.layout.footprint.total / GIB, 3) if forecast else None,
        "seconds": forecast.seconds if forecast else None,
        "cost": forecast.cost if forecast else None,
    }


def _plan_row(row: GraphRow, forecast: Forecast | None) -> PlanRow:
    return PlanRow(
        name=row.step.name,
        state=row.state,
        fingerprint=row.step.fingerprint,
        differs=_why(row.differs),
        memory_gib=forecast.layout.footprint.total / GIB if forecast else None,
        seconds=forecast.seconds if forecast else None,
        cost=forecast.cost_words if forecast else "",
    )


def _configured(config_path: Path, overrides: Sequence[str], *, refresh: bool) -> RunConfig:
    config = load_config(config_path, overrides)
    if not refresh:
        return config
    refreshed = refresh_sources(config, open_store(config.store))
    print(f"mae: {refreshed.said}", file=sys.stderr)
    return refreshed.config


def _why(differs: Sequence[str]) -> str:
    """A step's own fields; that its inputs are made anew is said only where nothing else is."""
    own = [line for line in differs if not line.startswith("inputs.")]
    return "; ".join(own or differs)


def ui_command(config_path: Path | None, overrides: Sequence[str], *, port: int) -> int:
    """Serves MLflow until interrupted."""
    config = load_config(config_path, overrides) if config_path else None
    store = config.store if config else str(Path(DEFAULT_STORE).absolute())
    serve(resolve_tracking_uri(config.tracking.uri if config else None, store_uri=store), port=port)
    return 0


def _row(outcome: Outcome) -> StepRow:
    return StepRow(
        name=outcome.step.name,
        state=outcome.state,
        fingerprint=outcome.step.fingerprint,
        seconds=outcome.seconds if outcome.state != "blocked" else None,
        generation=outcome.receipt.generation if outcome.receipt else None,
        uri=outcome.uri,
        detail=detail_of(outcome),
    )


def _show_reconstruction(console: Console, summary: RunSummary) -> None:
    """The first held-out image: original, what the encoder sees, the model's guess."""
    if not sys.stderr.isatty():
        return
    pretrained = next((o for o in summary.outcomes if o.step.kind == "pretrain" and o.receipt), None)
    if pretrained is None or pretrained.receipt is None:
        return
    import numpy as np

    data = pretrained.receipt.as_input(pretrained.uri).store.read("reconstructions.npz")
    original, hidden, _, after = np.load(io.BytesIO(data), allow_pickle=False)["images"][0]
    console.print(terminal_reconstruction(original, hidden, after))
