"""What a run would do, without doing it: the order of the steps, what is done, and which field made the rest differ.

    <store>/history/<name>/<fingerprint[:12]>.json     identity of a finished step

Errors: PipelineError when two different steps bear one name; DataError when a receipt cannot be read."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import PipelineError, StorageError
from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.graph.step import Step, canonical
from pipeline.storage import Store

HISTORY = "history/"


@dataclass(frozen=True)
class PlannedStep:
    """What a run would do with a step."""

    step: Step
    state: Literal["cached", "to_run", "blocked"]
    differs: tuple[str, ...]
    """Fields in which the step differs from the most similar one done before; empty: none was, or nothing differs."""
    uri: str


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps with every input before what reads it; each name once."""
    ordered: dict[str, Step] = {}

    def add(step: Step) -> None:
        if step.name in ordered:
            if ordered[step.name].fingerprint != step.fingerprint:
                raise PipelineError(f"two different steps are named {step.name}: give one of them another name")
            return
        for source in step.inputs.values():
            add(source)
        ordered[step.name] = step

    for step in steps:
        add(step)
    return list(ordered.values())


def plan_graph(steps: Sequence[Step], *, store: Store, unable: Iterable[str] = ()) -> list[PlannedStep]:
    """What a run would do; writes nothing. `unable`: names of steps that could not run (their source is absent)."""
    rows: dict[str, PlannedStep] = {}
    for step in in_order(steps):
        root = store.at(step.directory)
        if read_receipt(root) is not None:
            rows[step.name] = PlannedStep(step, "cached", (), root.uri)
            continue
        stuck = step.name in unable or any(rows[source.name].state == "blocked" for source in step.inputs.values())
        differs = nearest_difference(step.identity(), _history(store, step.name))
        rows[step.name] = PlannedStep(step, "blocked" if stuck else "to_run", differs, root.uri)
    return list(rows.values())


def remember(store: Store, receipt: Receipt) -> None:
    """Notes a finished step's identity for later plans; only they suffer when the store refuses."""
    key = f"{HISTORY}{receipt.step}/{receipt.fingerprint[:12]}.json"
    with contextlib.suppress(StorageError):
        store.create(key, json.dumps(receipt.identity, sort_keys=True).encode())


def _history(store: Store, name: str) -> list[Mapping[str, Any]]:
    return [json.loads(store.read(info.key)) for info in store.list(f"{HISTORY}{name}/")]


def nearest_difference(identity: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """How `identity` differs from the one of `earlier` that differs least: lines `config.mask_ratio: 0.75 -> 0.8`."""
    differences = [_difference(dotted_fields(before), dotted_fields(identity)) for before in earlier]
    return min(differences, key=len, default=())


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new:
            lines.append(f"{key}: made anew" if key.startswith("inputs.") else f"{key}: {old} -> {new}")
    return tuple(lines)


def dotted_fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: canonical(value)}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(dotted_fields(item, f"{prefix}.{key}" if prefix else key))
    return flat
