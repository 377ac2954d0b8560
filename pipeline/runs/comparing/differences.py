"""What differs between runs in configuration, data and code, and why their scores cannot be compared: functions of plain values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.reporting.comparison.values import Difference

ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How a score came about: all that must be equal for two of them to be compared."""

    digest: str = ""
    """Of the evaluation data."""
    images: int | None = None
    version: int | None = None
    """`VERSION` of the protocol."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The config of the step, flat, without encoder, weights and seed: split, train_labels, and the protocol's own."""


def differences(flat: Sequence[Mapping[str, str]]) -> list[Difference]:
    """Return the keys whose values are not the same everywhere. A value is JSON or plain text: `1` and `1.0` are one value."""
    keys = sorted({key for one in flat for key in one})
    rows = [(key, [one.get(key, ABSENT) for one in flat]) for key in keys]
    return [Difference(key, tuple(values)) for key, values in rows if any(_differ(values[0], one) for one in values)]


def _differ(one: str, other: str) -> bool:
    return bool(_parsed(one) != _parsed(other))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def short_differences(config: Sequence[Difference], run: int) -> str:
    """Return what sets one run apart, `mask_ratio=0.5 epochs=100`: the last word of each key, or more where words repeat."""
    words = [one.key.rpartition(".")[2] for one in config]
    named = [
        ".".join(one.key.split(".")[-2:]) if words.count(word) > 1 else word
        for one, word in zip(config, words, strict=True)
    ]
    return " ".join(f"{name}={one.values[run]}" for name, one in zip(named, config, strict=True))


def why_not_comparable(ours: Mapping[str, Scored], theirs: Mapping[str, Scored]) -> list[str]:
    """Return a line for each reason, by score: `knn/toy: train_labels 100 and 320`."""
    lines: dict[str, list[str]] = {}
    for score in sorted({*ours} & {*theirs}):
        for reason in _reasons(ours[score], theirs[score]):
            lines.setdefault(reason, []).append(score)
    return [f"{', '.join(scores)}: {reason}" for reason, scores in lines.items()]


def _reasons(ours: Scored, theirs: Scored) -> list[str]:
    found = []
    if ours.digest != theirs.digest:
        counts = f", {ours.images} and {theirs.images} images" if ours.images != theirs.images else ""
        found.append(f"other evaluation data (digest {ours.digest[:12]} and {theirs.digest[:12]}{counts})")
    elif ours.images != theirs.images:
        found.append(f"{ours.images} and {theirs.images} test images")
    if ours.version != theirs.version:
        found.append(f"version {ours.version} and {theirs.version} of the protocol")
    absent = object()
    for key in sorted({*ours.settings} | {*theirs.settings}):
        one, other = (side.settings.get(key, absent) for side in (ours, theirs))
        if one != other:
            shown = ("not set" if value is absent else "all" if value is None else value for value in (one, other))
            found.append("{} {} and {}".format(key, *shown))
    return found
