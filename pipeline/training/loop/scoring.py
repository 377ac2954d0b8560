"""Score a trained module on the task's evaluation split, with all workers together.

    predicted/rank-0000-of-0002.safetensors    what a task predicts for this rank's images, if it says so: tensors of its choice

The parts that belong together are those of the number of workers in the scores, as `predicted_by`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import plain_slice
from pipeline.data.feed.step_feed import one_ahead
from pipeline.storage import Store
from pipeline.training.health.stop_reasons import REASONS, StopReason, StopSignal
from pipeline.training.spec.train_spec import HELD_OUT, TrainSpec
from pipeline.training.world import World

EVALUATION_BATCH = 256  # scores are sums over samples, so this decides memory and speed only
_REASONS = tuple(reason for reason in REASONS if reason != "resized")
"""Restarting with more workers takes longer than scoring."""


class _StoppedEarly(Exception):
    """All workers have agreed to stop between two batches."""


def evaluate(
    spec: TrainSpec, module: nn.Module, world: World, stop_signal: StopSignal, store: Store
) -> tuple[Mapping[str, Any], StopReason]:
    """Return the scores of the whole split, or none and the reason to stop; equal on every worker. Collective.

    Those of a tenth that was held out of the training split come with them, as `held_out`. Predictions go to `store`.
    """
    scores, stopped = _scores(spec, spec.evaluation_split, module, world, stop_signal)
    if stopped or not scores:
        return scores, stopped
    if predicted := scores.pop("predicted", None):
        with world.fail_together():
            store.write(predicted_part(world.rank, world.size), save(predicted))
        scores["predicted_by"] = world.size
    if spec.holds_out:
        held_out, stopped = _scores(spec, HELD_OUT, module, world, stop_signal)
        held_out.pop("predicted", None)
        scores["held_out"] = held_out
    return ({}, stopped) if stopped else (scores, "")


def predicted_part(rank: int, workers: int) -> str:
    """Return the key of a rank's predictions, in the generation's directory."""
    return f"predicted/rank-{rank:04d}-of-{workers:04d}.safetensors"


def _scores(
    spec: TrainSpec, split: str, module: nn.Module, world: World, stop_signal: StopSignal
) -> tuple[dict[str, Any], StopReason]:
    """Return the task's own answer for a split."""
    with world.fail_together():
        loader = spec.loader(spec.dataset.open(), split, world)
    total = int(loader.selection.counts.sum())
    # `plain_slice` rounds down at each boundary, so the last rank's part is never smaller than another's.
    largest_part = len(plain_slice(total, world.size - 1, world.size))
    most_batches = math.ceil(largest_part / EVALUATION_BATCH)
    read = loader.evaluation_batches(EVALUATION_BATCH)
    with closing(one_ahead(read, lambda batch: batch, device=world.device)) as pairs:
        batches = (batch for batch, _ in pairs)
        same_count = _same_count(batches, most_batches, spec.image_size, world)
        try:
            return dict(spec.task.evaluate(module, _until_stopped(same_count, world, stop_signal), world)), ""
        except _StoppedEarly as stopped:
            return {}, stopped.args[0]


def read_predicted(store: Store, workers: int) -> dict[str, Tensor]:
    """Return the predictions of all ranks, each image of the split once."""
    parts = [load(store.read(predicted_part(rank, workers))) for rank in range(workers)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
