"""Bring the engine to a checkpoint: at the start of a training, and when the guard rolls back.

Both are collective. Rank 0 chooses the checkpoint, every rank opens and verifies it and loads its own part.
Errors: CheckpointError when no usable checkpoint is left where one is needed, or when it belongs to another order of samples."""

import logging

from pipeline.graph.step import Attempt
from pipeline.training.checkpoints.format import Checkpoint, check_cursor, rollback_checkpoint
from pipeline.training.checkpoints.position import Position, opened_on_all_ranks, position_of
from pipeline.training.checkpoints.resume import forked_checkpoint, starting_checkpoint
from pipeline.training.engine.deepspeed_engine import initial_state
from pipeline.training.guard import Judgement, state_after_rollback
from pipeline.training.spec.engines import AnyEngine, engine_for
from pipeline.training.spec.train_spec import TrainSpec, engine_settings
from pipeline.training.world import World

log = logging.getLogger(__name__)


def start(spec: TrainSpec, attempt: Attempt, world: World, cursor: dict[str, object]) -> tuple[AnyEngine, Position]:
    """Build the engine and return it with its position: those of the newest checkpoint, or initial weights at step 0."""
    with opened_on_all_ranks(world, lambda: starting_checkpoint(attempt, spec.start)) as checkpoint:
        with world.fail_together():
            # Every rank builds the whole model, at every ZeRO stage, and draws the same weights from the same seed.
            built = spec.task.build()
            if checkpoint:
                check_cursor(checkpoint, cursor)
                # Before DeepSpeed takes the module: it makes its float32 and compute-precision copies of these weights.
                checkpoint.load_into(built.module)
        settings = engine_settings(spec.recipe, spec.resources, workers=world.size)
        engine = engine_for(built, settings, world)
        if not checkpoint:
            return engine, Position()  # initial weights: DeepSpeed's copies are those of the module already
        with world.fail_together():
            engine.load(checkpoint.read, optimizer_steps=checkpoint.manifest.optimizer_steps)
        position = position_of(checkpoint, global_batch=spec.recipe.global_batch, world=world)
    if checkpoint.root.uri != attempt.root.uri:
        position.saved_at = -1  # a fork: the checkpoint is the parent's, and this training has saved nothing yet
    return engine, position


def roll_back(spec: TrainSpec, attempt: Attempt, world: World, engine: AnyEngine, judgement: Judgement) -> Position:
    """Return weights, moments and records to before `judgement.undone`, a range of steps that is never trained on."""
    undone, skipped_ranges = judgement.undone, judgement.state_before.stepped_over

    def find() -> Checkpoint | None:
        return rollback_checkpoint(attempt, undone, skipped_ranges) or forked_checkpoint(attempt, spec.start)

    with opened_on_all_ranks(world, find) as checkpoint:
        with world.fail_together():
            # Without a checkpoint the model is built a second time: its seed draws the initial weights again.
            lookup = checkpoint.read if checkpoint else initial_state(spec.task.build().module)
            engine.load(lookup, optimizer_steps=checkpoint.manifest.optimizer_steps if checkpoint else 0)
        # The module still computes with the bad weights; a collective, so it stays outside `fail_together`.
        engine.sync_module_weights()
        position = Position()
        if checkpoint:
            position = position_of(checkpoint, global_batch=spec.recipe.global_batch, world=world)
    # With few checkpoints kept, the one found may lie inside the range: then only what follows it is undone.
    undone = (max(undone[0], position.global_step), undone[1])
    position.guard = state_after_rollback(judgement.state_before, position.guard, undone)
    position.global_step = position.guard.next_step(position.global_step)  # past the range that was just undone
    if world.is_first:
        log.warning(
            "%s: rolled back to step %d; steps %d to %d are skipped (rollback %d of at most %d)",
            attempt.step_name,
            max(position.saved_at, 0),
            undone[0],
            undone[1] - 1,
            position.guard.roll_backs,
            spec.recipe.guard.roll_backs,
        )
    return position
