"""Score a trained module on the task's evaluation split, with all workers together."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing

import torch
from safetensors.torch import save
from torch import nn

from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import plain_slice
from pipeline.data.feed.step_feed import one_ahead
from pipeline.storage import Store
from pipeline.training.health.stop_reasons import REASONS, StopReason, StopSignal
from pipeline.training.spec.tasks import Predicted
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import World

PREDICTED = "predicted.safetensors"
"""In the generation's directory: the columns of a `Predicted`, each image of the split once."""
EVALUATION_BATCH = 256  # scores are sums over samples, so this decides memory and speed only
_REASONS = tuple(reason for reason in REASONS if reason != "resized")
"""Restarting with more workers takes longer than scoring."""


class _StoppedEarly(Exception):
    """All workers have agreed to stop between two batches."""


def evaluate(
    spec: TrainSpec, module: nn.Module, world: World, stop_signal: StopSignal, store: Store
) -> tuple[Mapping[str, float], StopReason]:
    """Return the scores of the whole split, or none and the reason to stop; equal on every worker. Collective.

    The first worker writes PREDICTED to the store, if there are predictions.
    """
    with world.fail_together():
        loader = spec.loader(spec.dataset.open(), spec.evaluation_split, world)
    total = int(loader.selection.counts.sum())
    # `plain_slice` rounds down at each boundary, so the last rank's part is never smaller than another's.
    largest_part = len(plain_slice(total, world.size - 1, world.size))
    most_batches = math.ceil(largest_part / EVALUATION_BATCH)
    read = loader.evaluation_batches(EVALUATION_BATCH)
    with closing(one_ahead(read, lambda batch: batch, device=world.device)) as pairs:
        batches = (batch for batch, _ in pairs)
        same_count = _same_count(batches, most_batches, spec.image_size, world)
        try:
            scores, predicted = spec.task.evaluate(module, _until_stopped(same_count, world, stop_signal), world)
        except _StoppedEarly as stopped:
            return {}, stopped.args[0]
    if predicted:
        _write(predicted, world, store)
    return scores, ""


def _write(predicted: Predicted, world: World, store: Store) -> None:
    """Write what all workers predicted, 56 bytes per image, in order of rank. Collective."""
    parts = world.all_gather(predicted)
    if world.is_first:
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        store.write(PREDICTED, save(dict(zip(Predicted._fields, columns, strict=True))))


def _until_stopped(batches: Iterator[Batch], world: World, stop_signal: StopSignal) -> Iterator[Batch]:
    """Pass batches on; raise on every rank as soon as one has a reason to stop."""
    for batch in batches:
        reason = stop_signal.stop_reason()
        ranks_by_reason = world.total([reason == one for one in _REASONS])
        if agreed := [one for one, ranks in zip(_REASONS, ranks_by_reason, strict=True) if ranks]:
            raise _StoppedEarly(agreed[0])
        yield batch


def _same_count(batches: Iterator[Batch], count: int, image_size: tuple[int, int], world: World) -> Iterator[Batch]:
    """Yield `count` batches on every rank, padded at the end, because ZeRO-3 gathers weights in each forward pass.

    Padding has label -1 and is not counted.
    """
    nothing = torch.full((1,), -1)  # label, sample id and epoch of padding
    padding = Batch(torch.zeros(1, *image_size, 3, dtype=torch.uint8), nothing, nothing, nothing)
    for _ in range(count):
        with world.fail_together():
            batch = next(batches, padding)  # an unreadable sample on one rank must not leave the others in a gather
        yield batch
