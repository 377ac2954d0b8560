"""A run's row of the table as the receipts in its store tell it.

Errors: DataError for receipts or a history that cannot be read."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import PurePosixPath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mae_core.config import ViTConfig, size_name
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.protocol import ScoreFacts
from pipeline.reporting.comparison.values import RunRow, Spread
from pipeline.runs.comparing.history import FinishedStep, is_, made_at, score_steps
from pipeline.runs.recording.naming import data_label, differs_label
from pipeline.runs.recording.results import pretraining_metrics
from pipeline.tracking import names
from pipeline.training.facts import PretrainFacts

HISTORY_FILE = "history.jsonl"
"""Of a pretraining: one row per logged step."""


def finished_row(name: str, steps: Mapping[str, FinishedStep]) -> RunRow:
    """Return the row of a run as its receipts tell it."""
    pretrained = next((step for step in steps.values() if is_(step, "pretrain")), None)
    row = RunRow(name=name, status="finished" if any(is_(step, "report") for step in steps.values()) else "")
    if steps:
        newest = max(steps.values(), key=made_at)
        row = replace(row, started=made_at(newest), store=newest.root.uri.rpartition("/")[0])
    row = replace(row, scores=scores_of(steps))
    if pretrained is None:
        return _with_import(row, steps)
    rows = logged(pretrained)
    metrics = pretraining_metrics(PretrainFacts.read(pretrained.receipt.facts), rows)
    encoder = pretrained.receipt.identity["config"]["model"]["encoder"]
    data, differs = _described(steps)
    return replace(
        row,
        data=data or _source_name(steps),
        size=size_name(TypeAdapter(ViTConfig).validate_python(encoder)),
        differs=differs,
        final_loss=metrics[names.FINAL_LOSS],
        best_loss=metrics.get(names.BEST_LOSS),
        images_per_s=metrics.get(names.IMAGES_PER_S),
        mfu=metrics.get(names.MFU),
        hours=hours_by_row(rows)[-1] if rows else None,
    )


def filled(row: RunRow, more: RunRow) -> RunRow:
    """Return a row with what only the other one knows."""
    added = {
        field.name: getattr(more, field.name)
        for field in fields(row)
        if getattr(row, field.name) is None or getattr(row, field.name) == ""
    }
    # receipts have the values of every seed, MLflow has not
    return replace(row, scores={**row.scores, **more.scores}, **added)


def scores_of(steps: Mapping[str, FinishedStep]) -> dict[str, Spread]:
    """Return the scores of a run's evaluations over their seeds. Those that were skipped have none."""
    values: dict[str, list[float]] = {}
    for one in score_steps(steps):
        value = ScoreFacts.read(one.step.receipt.facts).score
        if value is not None:
            values.setdefault(one.score, []).append(value)
    return {
        score: Spread(
            mean=statistics.fmean(seeds),
            sd=statistics.stdev(seeds) if len(seeds) > 1 else None,
            n=len(seeds),
            values=tuple(seeds),
        )
        for score, seeds in values.items()
    }


def logged(pretrained: FinishedStep) -> list[dict[str, Any]]:
    """Return the rows that a pretraining logged, one per logged step."""
    return [json.loads(line) for line in pretrained.files.read(HISTORY_FILE).splitlines()]


def hours_by_row(rows: Sequence[Mapping[str, float]], *, devices: Sequence[float] | None = None) -> list[float]:
    """Return the hours of training up to each row, without pauses between attempts; times `devices`, one number per row."""
    hours, images, passed = [], 0.0, 0.0
    for row, count in zip(rows, devices or [1.0] * len(rows), strict=True):
        if row["images_per_s"] > 0:
            passed += max(0.0, row["images"] - images) / row["images_per_s"] / 3600 * count
        images = row["images"]
        hours.append(passed)
    return hours


def _with_import(row: RunRow, steps: Mapping[str, FinishedStep]) -> RunRow:
    """Return the row with what is known of weights from elsewhere."""
    step = next((step for step in steps.values() if is_(step, "import")), None)
    if step is None:
        return row
    encoder = TypeAdapter(ViTConfig).validate_python(step.receipt.identity["config"]["encoder"])
    file = str(step.receipt.made.get("notes", {}).get("file", ""))
    return replace(
        row,
        data=_described(steps)[0] or _source_name(steps),
        size=size_name(encoder),
        differs=PurePosixPath(file).name,
    )


def _described(steps: Mapping[str, FinishedStep]) -> tuple[str, str]:
    """Return name of the data and what differs from the defaults, by the configuration that the report was made from."""
    report = next((step for step in steps.values() if is_(step, "report")), None)
    if report is None:
        return "", ""
    try:
        config = RunConfig.model_validate(report.receipt.identity["config"]["config"])
    except (ValidationError, ConfigError):  # of a version with other fields
        return "", ""
    return data_label(config), differs_label(config)


def _source_name(steps: Mapping[str, FinishedStep]) -> str:
    datasets = (step for step in steps.values() if step.receipt.kind in {"shard", "join"})
    return next((PurePosixPath(str(step.receipt.identity["config"]["source"])).name for step in datasets), "")
