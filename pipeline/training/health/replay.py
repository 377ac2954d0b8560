"""A bad step once more, in one process: from the checkpoint before it, over the steps between, to its losses sample by sample.

The order of samples, crops and masks is arithmetic, so the very batch comes back from the store. One process computes the global
batch by accumulation: the same samples are not finite, and losses agree up to the order of sums.
Errors: DataError when the step lies too far behind the nearest checkpoint, or was of another order."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.data.feed.step_feed import Feed
from pipeline.errors import DataError
from pipeline.storage import Store
from pipeline.training.checkpoints.format import Checkpoint, check_cursor, committed, open_checkpoint, step_of
from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.engine.micro_batches import split
from pipeline.training.guard import GuardState
from pipeline.training.health.incidents import Bundle, Inputs
from pipeline.training.spec.train_spec import TrainSpec, engine_settings
from pipeline.training.world import enter_world

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Relative, between losses of a sample then and now: sums in another order, grown over the steps between."""


@dataclass(frozen=True)
class SampleLoss:
    """One sample of the step."""

    epoch: int
    sample_id: int
    then: float
    now: float

    @property
    def finite(self) -> bool:
        """Now."""
        return math.isfinite(self.now)


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    step: int
    began_at: int
    """The checkpoint's step."""
    grad_norm: float
    loss: float
    samples: tuple[SampleLoss, ...]
    """Those that are not finite first, then by falling loss."""
    differences: tuple[str, ...]
    """Between then and now; none: reproduced."""


def replay(bundle: Bundle, root: Store, spec: TrainSpec, *, most_steps: int, tell: Callable[[str], None]) -> Replayed:
    """Replays a bundle's step; `most_steps`: between the checkpoint and it."""
    spec = replace(spec, resources=spec.resources.model_copy(update={"zero_stage": 1, "offload": "none"}))
    world = enter_world()
    if world.size > 1:
        raise DataError(
            f"{bundle.uri}: replay is for one process, {world.size} were started. Run it without a launcher"
        )
    loader = spec.loader(spec.dataset.open(), "train", world)
    key = _before(root, bundle)
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
        built.module.load_state_dict(checkpoint.weights())
    settings = engine_settings(spec.recipe, spec.resources, workers=world.size)
    with closing(Engine(built.module, built.groups, settings, world)) as engine:
        _load(engine, checkpoint)
        tell(f"from {key or 'the initial weights'}, {bundle.step - began_at} steps to go")
        with closing(Feed(loader, bundle.step + 1)) as feed:
            for step in _steps(bundle.before, began_at, bundle.step):
                batch = feed.batch(step)
                micro_batches = split(spec.task.inputs(batch), engine.settings, world.device)
                loss = (
                    engine.accumulate(micro_batches, global_batch=spec.recipe.global_batch) / spec.recipe.global_batch
                )
                norm = math.sqrt(engine.squared_grad_norm())
                if step == bundle.step or step in bundle.before.skipped:
                    engine.discard()
                else:
                    engine.apply(spec.recipe.learning_rate(step, loader.order.samples_per_epoch))
            losses = engine.losses(micro_batches).tolist()
    pairs = list(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True))
    samples = [
        SampleLoss(*pair, bundle.losses.get(pair, math.nan), now) for pair, now in zip(pairs, losses, strict=True)
    ]
    inputs = {pair: tuple(t[place].numpy() for t in spec.task.inputs(batch)[1:]) for place, pair in enumerate(pairs)}
    return Replayed(
        step=bundle.step,
        began_at=began_at,
        grad_norm=norm,
        loss=loss,
        samples=tuple(sorted(samples, key=lambda one: (one.finite, -one.now if one.finite else 0.0))),
        differences=tuple(
            _differences(
                bundle,
                samples,
                inputs,
                finite=math.isfinite(loss) and math.isfinite(norm),
                tolerance=TOLERANCE[spec.recipe.precision],
            )
        ),
    )


def _before(root: Store, bundle: Bundle) -> str:
    """The newest committed checkpoint on the way to the step; empty: the beginning."""
    gaps = bundle.before.stepped_over
    usable = (key for key in committed(root) if step_of(key) <= bundle.step)
    return next((key for key in usable if not any(low < step_of(key) < high for low, high in gaps)), "")


def _steps(before: GuardState, first: int, last: int) -> list[int]:
    """Steps that were trained on from `first`, up to `last`."""
    return [step for step in range(first, last + 1) if before.past_gaps(step) == step]


def _load(engine: Engine, checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        with checkpoint:
            engine.load(checkpoint.read, optimizer_steps=checkpoint.manifest.optimizer_steps)


def _differences(
    bundle: Bundle, samples: Sequence[SampleLoss], inputs: Inputs, *, finite: bool, tolerance: float
) -> Iterator[str]:
    """What is otherwise than it was, in words."""
    now = {(one.epoch, one.sample_id) for one in samples}
    if now != bundle.losses.keys():
        yield f"{len(now ^ bundle.losses.keys())} samples are in one of the two batches alone"
        return
    equal = partial(np.array_equal, equal_nan=True)
    other = [pair for pair, given in inputs.items() if not all(map(equal, given, bundle.inputs[pair]))]
    if other:
        yield f"masks of {len(other)} samples are others"
    flipped = [one.sample_id for one in samples if one.finite != math.isfinite(one.then)]
    if flipped:
        yield f"samples {flipped[:5]} are finite in one of the two alone"
    apart = [one.sample_id for one in samples if one.finite and not math.isclose(one.now, one.then, rel_tol=tolerance)]
    if apart and not flipped:
        yield f"losses of {len(apart)} samples differ by more than {tolerance:g} (relative), such as {apart[:5]}"
    if finite != bundle.finite:
        yield f"loss and gradient norm are {'' if finite else 'not '}finite now"
