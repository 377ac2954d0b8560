"""Replay a bad step in one process: from the checkpoint before it, over the steps between, to the loss of each sample.

The order of samples, crops and masks is arithmetic, so the very same batch comes back from the store. One process computes
the global batch by accumulation: the same samples are not finite, and losses agree up to the order of sums.
Errors: DataError if the step lies too many steps after the nearest checkpoint; CheckpointError if that has another order."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pipeline.cluster.device import choose_device_here
from pipeline.data.feed.loader import Batch, Loader
from pipeline.data.feed.step_feed import Feed
from pipeline.errors import DataError
from pipeline.storage import Store
from pipeline.training.checkpoints.format import Checkpoint, check_cursor, committed, open_checkpoint, step_of
from pipeline.training.engine.micro_batches import Copier
from pipeline.training.guard import GuardState
from pipeline.training.health.incidents import Bundle, Inputs
from pipeline.training.spec.engines import AnyEngine, engine_for
from pipeline.training.spec.train_spec import TrainSpec, engine_settings, float32_products
from pipeline.training.world import enter_world, leave_launcher

TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}
"""Largest relative difference between a sample's recorded and replayed loss. Sums run in another order, and the difference
grows over the steps between."""


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one sample of the step."""

    epoch: int
    sample_id: int
    then: float
    """As recorded in the bundle; NaN if the sample is not in it."""
    now: float
    """As replayed."""

    @property
    def finite(self) -> bool:
        """Whether the replayed loss is finite."""
        return math.isfinite(self.now)


@dataclass(frozen=True)
class Replayed:
    """Result of a replay. Its field names are keys of `mae replay --json`."""

    step: int
    began_at: int
    """Step of the checkpoint it started from; 0 for the initial weights."""
    grad_norm: float
    loss: float
    samples: tuple[SampleLoss, ...]
    """Samples whose loss is not finite come first, then by descending loss."""
    differences: tuple[str, ...]
    """What differs from the recorded step; empty if it was reproduced."""


def replay(bundle: Bundle, root: Store, spec: TrainSpec, *, most_steps: int, tell: Callable[[str], None]) -> Replayed:
    """Replay a bundle's step.

    `root` is the training step's directory. `most_steps` limits the steps between the checkpoint and the bundle's step.
    `tell` gets a line about where the replay starts.
    """
    # One process has nothing to shard, and no other rank to gather weights from. It may be on a smaller machine.
    use_gpu = "auto" if spec.resources.use_gpu else False
    alone = {"workers": 1, "use_gpu": use_gpu, "zero_stage": 1, "offload": "none", "decode_workers": 0}
    spec = replace(spec, resources=spec.resources.model_copy(update=alone))
    leave_launcher()  # or variables of a batch system would make it wait for workers
    world = enter_world(use_gpu=choose_device_here(spec.resources).use_gpu)
    if world.size > 1:
        raise DataError(
            f"{bundle.uri}: replay is for one process, {world.size} were started. Run it without a launcher"
        )
    loader = spec.loader(spec.dataset.open(), "train", world)
    key = _nearest_checkpoint(root, bundle)
    began_at = step_of(key) if key else 0
    if bundle.step - began_at > most_steps:
        raise DataError(
            f"{bundle.uri}: step {bundle.step} lies {bundle.step - began_at} steps behind the nearest checkpoint kept "
            f"({key or 'none'}), more than --most-steps {most_steps}. Raise that, or resources.keep_checkpoints beforehand"
        )
    built = spec.task.build()
    checkpoint = open_checkpoint(root, key) if key else None
    if checkpoint:
        check_cursor(checkpoint, spec.cursor(loader.order))
        checkpoint.load_into(built.module)
    settings = engine_settings(spec.recipe, spec.resources, workers=world.size)
    engine = engine_for(built, settings, world)
    with closing(engine), float32_products(spec.recipe.precision, world.device):
        _load(engine, checkpoint)
        tell(f"from {key or 'the initial weights'}, {bundle.step - began_at} steps to go")
        again = _train_again(engine, loader, spec, bundle, began_at)
    return _compared(bundle, spec, again, began_at)


class _Step(NamedTuple):
    """The bundle's step as it is now."""

    batch: Batch
    loss: float
    grad_norm: float
    losses: list[float]  # of the batch's samples


def _train_again(engine: AnyEngine, loader: Loader, spec: TrainSpec, bundle: Bundle, began_at: int) -> _Step:
    """Train up to the bundle's step, and take its losses with the weights that it met."""
    device, global_batch = engine.world.device, spec.recipe.global_batch
    copier = Copier(spec.task.inputs, engine.settings, device)
    with closing(
        Feed(loader, bundle.step + 1, copier.begin, device=device)
    ) as feed:  # reads no further than the step itself
        for step in _trained_steps(bundle.state_before, began_at, bundle.step):
            batch, copying = feed.batch(step)
            micro_batches = copying.ready()
            engine.accumulate(micro_batches, global_batch=global_batch)
            loss_sum, squared_norm = engine.measured()
            norm = math.sqrt(squared_norm)
            # The step itself is not applied: its losses are taken again below, with the weights that it met.
            if step == bundle.step or step in bundle.state_before.skipped:
                engine.discard()
            else:
                engine.apply(spec.recipe.learning_rate(step, loader.order.samples_per_epoch), grad_norm=norm)
        # After the loop, `batch` and `micro_batches` are those of the step itself.
        return _Step(batch, loss_sum / global_batch, norm, engine.losses(micro_batches).tolist())


def _compared(bundle: Bundle, spec: TrainSpec, again: _Step, began_at: int) -> Replayed:
    """Compare a step with its record, sample by sample."""
    pairs = list(zip(again.batch.epochs.tolist(), again.batch.sample_ids.tolist(), strict=True))
    samples = [
        SampleLoss(*pair, bundle.losses.get(pair, math.nan), now) for pair, now in zip(pairs, again.losses, strict=True)
    ]
    # the first input is the images, which a bundle does not hold
    noise = spec.task.inputs(again.batch)[1:]
    inputs = {pair: tuple(tensor[index].numpy() for tensor in noise) for index, pair in enumerate(pairs)}
    finite = math.isfinite(again.loss) and math.isfinite(again.grad_norm)
    found = _differences(bundle, samples, inputs, finite=finite, tolerance=TOLERANCE[spec.recipe.precision])
    return Replayed(
        step=bundle.step,
        began_at=began_at,
        grad_norm=again.grad_norm,
        loss=again.loss,
        samples=tuple(sorted(samples, key=lambda one: (one.finite, -one.now if one.finite else 0.0))),
        differences=tuple(found),
    )


def _nearest_checkpoint(root: Store, bundle: Bundle) -> str:
    """Return the newest committed checkpoint on the way to the step, or an empty string for the initial weights.

    A checkpoint inside a skipped range belongs to a line that was given up.
    """
    skipped_ranges = bundle.state_before.stepped_over
    usable = (key for key in committed(root) if step_of(key) <= bundle.step)
    return next((key for key in usable if not any(low < step_of(key) < high for low, high in skipped_ranges)), "")


def _trained_steps(state: GuardState, first: int, last: int) -> list[int]:
    """Return the steps from `first` to `last`, inclusive, that lie in no skipped range."""
    return [step for step in range(first, last + 1) if state.next_step(step) == step]


def _load(engine: AnyEngine, checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        with checkpoint:
            engine.load(checkpoint.read, optimizer_steps=checkpoint.manifest.optimizer_steps)


def _differences(
    bundle: Bundle, samples: Sequence[SampleLoss], inputs: Inputs, *, finite: bool, tolerance: float
) -> Iterator[str]:
    """Yield what differs from the recorded step, in words."""
    now = {(one.epoch, one.sample_id) for one in samples}
    if now != bundle.losses.keys():
        yield f"{len(now ^ bundle.losses.keys())} samples are in only one of the two batches"
        return
    equal = partial(np.array_equal, equal_nan=True)
    other = [pair for pair, given in inputs.items() if not all(map(equal, given, bundle.inputs[pair]))]
    if other:
        yield f"masks of {len(other)} samples differ"
    flipped = [one.sample_id for one in samples if one.finite != math.isfinite(one.then)]
    if flipped:
        yield f"samples {flipped[:5]} are finite in only one of the two"
    apart = [one.sample_id for one in samples if one.finite and not math.isclose(one.now, one.then, rel_tol=tolerance)]
    if apart and not flipped:
        yield f"losses of {len(apart)} samples differ by more than {tolerance:g} (relative), such as {apart[:5]}"
    if finite != bundle.finite:
        yield f"loss and gradient norm are {'' if finite else 'not '}finite now"
