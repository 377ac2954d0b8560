"""The plan of a run: the order of its steps, which are already done, and which changed field makes the others run.

    <store>/history/<name>/<fingerprint[:12]>.json     identity of a finished step

Planning only reads. Identities are kept so that a plan can say why a step runs again ("config.mask_ratio: 0.75 -> 0.8").
Errors: PipelineError if two different steps have one name; DataError if a receipt cannot be read."""

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
    """A step and what a run would do with it."""

    step: Step
    state: Literal["cached", "to_run", "blocked"]
    differs: tuple[str, ...]
    """Fields in which the step differs from the most similar finished step of its name; empty if there is none."""
    uri: str
    """The step's directory."""


def topological_order(steps: Sequence[Step]) -> list[Step]:
    """Return the steps and all their inputs, each once, inputs before their readers."""
    ordered: dict[str, Step] = {}

    def add(step: Step) -> None:
        if step.title in ordered:
            if ordered[step.title].fingerprint != step.fingerprint:
                raise PipelineError(f"two different steps are named {step.title}: rename one of them")
            return
        for source in step.inputs.values():
            add(source)
        ordered[step.title] = step

    for step in steps:
        add(step)
    return list(ordered.values())


def plan_graph(steps: Sequence[Step], *, store: Store, unable: Iterable[str] = ()) -> list[PlannedStep]:
    """Return what a run would do with every step. `unable` names steps that cannot run, such as one without its source."""
    rows: dict[str, PlannedStep] = {}
    for step in topological_order(steps):
        root = store.at(step.directory)
        if read_receipt(root) is not None:  # even if its inputs would have to run: a finished step is never repeated
            rows[step.title] = PlannedStep(step, "cached", (), root.uri)
            continue
        blocked = step.name in unable or any(rows[source.title].state == "blocked" for source in step.inputs.values())
        # the history is read only for steps that would run
        differs = nearest_difference(step.identity(), _earlier_identities(store, step.name))
        rows[step.title] = PlannedStep(step, "blocked" if blocked else "to_run", differs, root.uri)
    return list(rows.values())


def record_identity(store: Store, receipt: Receipt) -> None:
    """Record the identity of a finished step for later plans."""
    key = f"{HISTORY}{receipt.step}/{receipt.fingerprint[:12]}.json"
    with contextlib.suppress(StorageError):  # the step is complete either way; only a later plan explains less
        # create: an identity never changes, and another driver may be recording the same one
        store.create(key, json.dumps(receipt.identity, sort_keys=True).encode())


def _earlier_identities(store: Store, name: str) -> list[Mapping[str, Any]]:
    return [json.loads(store.read(info.key)) for info in store.list(f"{HISTORY}{name}/")]


def nearest_difference(identity: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Compare `identity` with the most similar of `earlier`. Returns lines such as `config.mask_ratio: 0.75 -> 0.8`."""
    differences = [_difference(dotted_fields(before), dotted_fields(identity)) for before in earlier]
    return min(differences, key=len, default=())


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new:
            # two fingerprints of an input would tell the user nothing; that input has a row of its own
            lines.append(f"{key}: changed" if key.startswith("inputs.") else f"{key}: {old} -> {new}")
    return tuple(lines)


def dotted_fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one, with keys joined by dots. Lists stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: canonical(value)}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(dotted_fields(item, f"{prefix}.{key}" if prefix else key))
    return flat
