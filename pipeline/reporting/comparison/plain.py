"""A comparison as JSON values, for `mae compare --json`. Keys stay."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.reporting.comparison.values import Comparison, Difference, RunRow, score_columns


def rows_json(rows: Sequence[RunRow]) -> list[dict[str, Any]]:
    """Return the table. Numbers that are not finite, such as the loss of a run that diverged, are null."""
    return [_finite(_row(row)) for row in rows]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return all of it but curves and pictures, which the page has."""
    return {
        "runs": rows_json(comparison.rows),
        "differences": {
            "config": _differences(comparison.config),
            "resources": _differences(comparison.machine),
            "data": _differences(comparison.data),
            "code": _differences(comparison.code),
        },
        "warnings": list(comparison.warnings),
        "notes": list(comparison.notes),
        "tests": [asdict(one) for one in comparison.tests],
    }


def _row(row: RunRow) -> dict[str, Any]:
    per_point = {name: cost for name in score_columns([row]) if (cost := row.per_point(name))}
    return asdict(row) | {
        "scores": {key: asdict(score) for key, score in row.scores.items()},
        "per_point": {name: {"value": value, "unit": unit} for name, (value, unit) in per_point.items()},
    }


def _differences(found: Sequence[Difference]) -> dict[str, list[Any]]:
    return {one.key: [_value(text) for text in one.values] for one in found}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
