"""A run with everything that its steps left, from MLflow and from its store.

A run whose store cannot be read keeps its row, and a note says what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import PipelineError
from pipeline.graph.receipts import read_receipt
from pipeline.reporting.comparison.values import RunRow
from pipeline.runs.comparing.finding import Found
from pipeline.runs.comparing.history import FinishedStep, is_, score_steps
from pipeline.runs.comparing.rows import filled, finished_row
from pipeline.storage import open_store
from pipeline.tracking import TrackedRun, names, runs_by_id
from pipeline.tracking.mlflow_format import flatten_params

_OUTSIDE = ("name", "store", "tracking", "fork")
"""Sections of a configuration that say nothing of how a result came about."""


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run with all that its steps left."""

    row: RunRow
    steps: Mapping[str, FinishedStep]
    config: Mapping[str, str] = field(default_factory=dict)
    """Flat, values as JSON or text."""
    code: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def pretrained(self) -> FinishedStep | None:
        """Its pretraining, if that is finished."""
        return next((step for step in self.steps.values() if is_(step, "pretrain")), None)

    def data_digest(self, step: FinishedStep) -> str:
        """Return the digest of the dataset that a step read; empty if its receipt is gone."""
        made = next((one for one in self.steps.values() if one.receipt.fingerprint == step.inputs.get("shards")), None)
        return DatasetFacts.read(made.receipt.facts).digest if made else ""


def load(found: Found) -> LoadedRun:
    """Look up the steps of a run and read their receipts."""
    row, tracked = found.row, found.tracked
    notes: list[str] = []
    if tracked:
        tracked = runs_by_id(found.tracking_uri, [tracked.run_id]).get(tracked.run_id, tracked)
    steps = found.steps
    if steps is None:
        steps, notes = tracked_steps(tracked, found.tracking_uri) if tracked else ({}, [])
    try:
        row = filled(row, finished_row(row.name, steps))
    except PipelineError as error:
        notes.append(f"{row.name}: its results cannot be read from the store ({error})")
        steps = {}
    return LoadedRun(
        row=row, steps=steps, config=_config(tracked, steps), code=_code(tracked, steps), notes=tuple(notes)
    )


def tracked_steps(run: TrackedRun, uri: str) -> tuple[dict[str, FinishedStep], list[str]]:
    """Return the finished steps of a run in MLflow, and what could not be read."""
    children = {
        key.removeprefix(names.STEP_TAG): value for key, value in run.tags.items() if key.startswith(names.STEP_TAG)
    }
    known, steps, lost = runs_by_id(uri, list(children.values())), {}, []
    store = run.tags.get(names.STORE_TAG) or run.params.get("store", "")
    for name, run_id in children.items():
        tags = known[run_id].tags if run_id in known else {}
        place = tags.get(names.URI_TAG, "").rpartition("/")[0]
        root = place or f"{store}/{name}-{tags.get(names.FINGERPRINT_TAG, '')[:12]}"
        try:
            receipt = read_receipt(open_store(root))
        except (PipelineError, ValueError) as error:
            lost.append(f"{name} ({error})")
            continue
        if receipt:
            steps[receipt.step] = FinishedStep(open_store(root), receipt)
        elif place or (run_id in known and known[run_id].status == "FINISHED"):
            lost.append(f"{name} (no receipt at {root})")
    label = run.tags.get(names.RUN_TAG) or run.name
    notes = [f"{label}: not in its store, so left out of tests, curves and pictures: {'; '.join(lost)}"] if lost else []
    return steps, notes


def _config(tracked: TrackedRun | None, steps: Mapping[str, FinishedStep]) -> dict[str, str]:
    """Return the configuration, flat: MLflow's parameters, or what the report or else the pretraining was made from."""
    if tracked and tracked.params:
        return {key: value for key, value in tracked.params.items() if key.split(".")[0] not in _OUTSIDE}
    if report := next((step for step in steps.values() if is_(step, "report")), None):
        return flatten_params(report.receipt.identity["config"]["config"])
    pretrained = next((step for step in steps.values() if is_(step, "pretrain")), None)
    if pretrained is None:
        return {}
    config = pretrained.receipt.identity["config"]
    return flatten_params({"model": config["model"], "pretrain": config["recipe"], "seed": config["seed"]})


def _code(tracked: TrackedRun | None, steps: Mapping[str, FinishedStep]) -> dict[str, str]:
    """Return revision, versions of packages, and versions of stages."""
    found = {}
    tags = tracked.tags if tracked else {}
    if revision := tags.get(names.COMMIT_TAG) or tags.get("git.revision"):
        found["revision"] = revision
    if encoder := next((step for step in steps.values() if step.receipt.kind in {"pretrain", "import"}), None):
        found |= dict(encoder.receipt.made.get("versions", {}))
        found["python"] = str(encoder.receipt.made.get("python", ""))
    for step in steps.values():
        if step.receipt.kind in {"shard", "pretrain", "import"}:
            found[f"VERSION of {step.receipt.step}"] = str(step.receipt.identity["version"])
    for one in score_steps(steps):
        found[f"VERSION of {one.column}"] = str(one.step.receipt.identity["version"])
    return found
