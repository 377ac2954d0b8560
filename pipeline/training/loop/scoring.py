"""Scores of a trained module, by all workers together."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
from torch import nn

from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import plain_slice
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import World

EVALUATION_BATCH = 256


def evaluate(spec: TrainSpec, module: nn.Module, world: World) -> Mapping[str, float]:
    """Of the task's evaluation split, whole, equal on every worker."""
    with world.together():
        loader = spec.loader(spec.dataset.open(), spec.evaluation_split, world)
    total = int(loader.selection.counts.sum())
    largest_slice = len(plain_slice(total, world.size - 1, world.size))
    most = math.ceil(largest_slice / EVALUATION_BATCH)
    with closing(loader.evaluation_batches(EVALUATION_BATCH)) as batches:
        return spec.task.evaluate(module, _in_step(batches, most, spec.image_size, world), world)


def _in_step(batches: Iterator[Batch], count: int, image_size: tuple[int, int], world: World) -> Iterator[Batch]:
    """As many batches on every rank: ZeRO-3 gathers weights in each forward pass. Padding has label -1 and is not counted."""
    nothing = torch.full((1,), -1)
    padding = Batch(torch.zeros(1, *image_size, 3, dtype=torch.uint8), nothing, nothing, nothing)
    for _ in range(count):
        with world.together():
            batch = next(batches, padding)
        yield batch
