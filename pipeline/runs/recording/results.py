"""What a run did, as numbers for its parent in MLflow. Pure functions of receipts and histories.

Units: losses are those of training; hours are device-hours: the wall-clock time of training and evaluation, times the devices that
it took. Start-up, waiting, and work that was lost and done again are not in them."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.cluster.resources import Resources
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.reporting.summaries import Score
from pipeline.stages.report import ReportConfig
from pipeline.tracking import names
from pipeline.training.facts import PretrainFacts

History = Sequence[Mapping[str, float]]
"""Rows of a pretraining's history.jsonl."""


class UsedDataset(NamedTuple):
    """A dataset that a run read."""

    name: str
    digest: str
    source: str
    context: str
    """`training`, `evaluation`, or both."""
    images: Mapping[str, int]
    """Split -> images."""


def pretraining_metrics(facts: PretrainFacts, history: History) -> dict[str, float]:
    """Return losses and speed of a finished pretraining: medians, since a slow start and pauses say nothing of the speed."""
    if not history:
        return {names.FINAL_LOSS: facts.loss}
    found = {
        names.FINAL_LOSS: facts.loss,
        names.BEST_LOSS: min(row["loss"] for row in history),
        names.IMAGES_PER_S: statistics.median(row["images_per_s"] for row in history),
    }
    if used := [row["mfu"] for row in history if "mfu" in row]:
        found[names.MFU] = statistics.median(used)
    return found


def curve(history: History) -> list[tuple[int, float, int]]:
    """Return (images seen, loss, time in ms since 1970) of every row."""
    return [(int(row["images"]), row["loss"], int(1000 * row.get("time", 0))) for row in history]


def cost_metrics(
    history: History, evaluations: Sequence[Outcome], resources: Resources, *, usd_per_hour: float | None
) -> dict[str, float]:
    """Return the device-hours of a run and their price: GPU-hours if pretraining was on GPUs, else hours of CPU cores."""
    on_gpus = any("device_gib" in row for row in history)
    devices = 1.0 if on_gpus else resources.cpus_per_worker
    worker_s = sum(_worker_seconds(history, resources))
    for outcome in evaluations:
        evaluating = resources.for_evaluation(on_gpus=on_gpus)
        worker_s += _fewest(evaluating) * float(outcome.receipt.made["seconds"]) if outcome.receipt else 0.0
    hours = worker_s * devices / 3600
    found = {names.GPU_HOURS if on_gpus else names.CPU_HOURS: hours}
    if usd_per_hour is not None:
        found[names.COST_USD] = hours * usd_per_hour
    return found


def _worker_seconds(history: History, resources: Resources) -> Iterator[float]:
    """Yield the seconds that each row's images took, times the workers. Old histories do not say how many there were."""
    before = 0.0
    for row in history:
        if row["images_per_s"] > 0:
            yield (row["images"] - before) / row["images_per_s"] * row.get("workers", _fewest(resources))
        before = row["images"]


def _fewest(resources: Resources) -> int:
    return resources.workers if isinstance(resources.workers, int) else resources.workers[0]


def used_datasets(outcomes: Sequence[Outcome], *, data_name: str) -> list[UsedDataset]:
    """Return the datasets of a run whose shards are made, that of pretraining first. `data_name`: what that one is called."""
    receipts = {outcome.step.name: outcome.receipt for outcome in outcomes}
    page = next(outcome.step for outcome in outcomes if outcome.step.kind == "report")
    roles: dict[str, tuple[Step, str, list[str]]] = {}
    # weights from elsewhere were not pretrained on anything here
    if pretrained := page.inputs.get("pretrain"):
        shards = pretrained.inputs["shards"]
        roles[shards.name] = (shards, data_name, ["training"])
    for scored in page.config.scored if isinstance(page.config, ReportConfig) else ():
        shards = page.inputs[scored.input].inputs["shards"]
        _, _, contexts = roles.setdefault(shards.name, (shards, scored.dataset, []))
        if "evaluation" not in contexts:
            contexts.append("evaluation")
    found = []
    for step, name, contexts in roles.values():
        if receipt := receipts.get(step.name):
            facts = DatasetFacts.read(receipt.facts)
            images = {split: counts.served for split, counts in facts.counts.splits.items()}
            found.append(UsedDataset(name, facts.digest, str(step.config.source), " and ".join(contexts), images))
    return found


def linear_score(scores: Sequence[Score]) -> Score | None:
    """Return the pretrained encoder's score under the linear probe on the first dataset that has one."""
    return next((score for score in scores if score.protocol == "linear" and score.encoder == "pretrained"), None)
