"""Trainings in which the losses of chosen samples come out wrong."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_kit import StopAfter, attempt_at, computed_by_step, mae_config, mae_spec

from pipeline.data.feed.loader import Batch
from pipeline.graph.step import Attempt, StageInput
from pipeline.tracking import NullTracker
from pipeline.training.guard import GuardConfig
from pipeline.training.loop.loop import train
from pipeline.training.spec.tasks import Built, MAETask
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import enter_world

TOTAL_STEPS = 19
"""4 epochs of 60 samples in batches of 13."""


class Spoilt(nn.Module):
    """The inner module's losses, each times a factor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, noise: Tensor, factor: Tensor) -> Tensor:
        return self.inner(images, noise) * factor


@dataclass(frozen=True, kw_only=True)
class SpoiltTask(MAETask):
    """Masked autoencoding in which the losses of some (epoch, sample) come out wrong."""

    factors: tuple[tuple[int, int, float], ...]

    def build(self) -> Built:
        built = super().build()
        return Built(Spoilt(built.module), built.groups)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        factors = {(epoch, sample): factor for epoch, sample, factor in self.factors}
        pairs = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
        return (*super().inputs(batch), torch.tensor([factors.get(pair, 1.0) for pair in pairs]))


def train_here(spec: TrainSpec, attempt: Attempt, stop_signal: StopAfter) -> dict[str, Any]:
    return asdict(train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop_signal))


def spoilt_spec(
    shards: StageInput, attempt: Attempt, bad: Mapping[int, float], guard: GuardConfig, **recipe: Any
) -> TrainSpec:
    """Return a training in which one sample in each of some steps has its loss multiplied."""
    steps = computed_by_step(shards, steps=TOTAL_STEPS)
    factors = tuple((*steps[step][5], factor) for step, factor in bad.items())
    spec = mae_spec(shards, attempt, epochs=4, guard=guard, **recipe)
    task = SpoiltTask(model=mae_config(), weight_decay=spec.recipe.weight_decay, seed=spec.task.seed, factors=factors)
    return replace(spec, task=task)


def run(team, shards, folder: Path, bad, guard, *, stops=(), **recipe) -> tuple[dict[str, Any], Attempt]:
    """Train to the end, with a stop and a resume after each number of steps in `stops`; return the last result and attempt."""
    for stop in (*stops, 999):
        attempt = attempt_at(folder, zero_stage=recipe.get("zero_stage", 1))
        changes = {name: value for name, value in recipe.items() if name != "zero_stage"}
        spec = spoilt_spec(shards, attempt, bad, guard, **changes)
        results = team.run(train_here, spec, attempt, StopAfter(stop))
        assert results[0]["checkpoint_key"] == results[1]["checkpoint_key"]
    return results[0], attempt
