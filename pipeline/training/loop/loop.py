"""One loop for every Task: batches in their computed order, steps of the engine, checkpoints, agreement to stop.

It knows no Ray and no MLflow: it is handed a world, the attempt (where to write), a tracker and a supervisor, so that Ray
Train, `mae run --in-process` and a debugger call the same code. The position is one integer, `global_step`: global batches
consumed. Units: learning rates absolute, times in seconds.
Errors: what goes wrong on one worker is agreed by all at a step boundary, so that nobody is left waiting in a collective."""

import json
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.feed.loader import Batch, Loader
from pipeline.data.feed.order import steps_total
from pipeline.data.feed.step_feed import Feed
from pipeline.data.feed.substitution import check_limit
from pipeline.errors import Fenced, PipelineError
from pipeline.graph.step import Attempt
from pipeline.tracking import Tracker
from pipeline.training.checkpoints import format as checkpoints
from pipeline.training.checkpoints.format import Checkpoint, CheckpointManifest
from pipeline.training.checkpoints.host_copy import room_for_copy
from pipeline.training.checkpoints.position import Position, found, position_at
from pipeline.training.checkpoints.resume import beginning, forked
from pipeline.training.checkpoints.retention import Retention
from pipeline.training.checkpoints.saver import Saver, saving
from pipeline.training.engine.deepspeed_engine import Engine, initial_state
from pipeline.training.engine.micro_batches import split
from pipeline.training.guard import Judgement, Seen, gone_back, judge
from pipeline.training.health.incidents import Incidents
from pipeline.training.health.stop_reasons import REASONS, StopReason, Supervisor
from pipeline.training.health.watchdog import Watchdog
from pipeline.training.loop.scoring import evaluate
from pipeline.training.meters.profiler import Profiler
from pipeline.training.meters.telemetry import TrainingMeter, as_metrics, as_points, shown
from pipeline.training.spec.train_spec import TrainSpec, engine_settings
from pipeline.training.world import ELSEWHERE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What the loop leaves behind, equal on every worker."""

    checkpoint_key: str
    """In the step's directory."""
    global_step: int
    total_steps: int
    stopped: StopReason
    """Why it ended before the last step; empty: it did not."""
    ids_digest: int
    """Over every (epoch, sample) of the committed line."""
    loss: float
    """Mean over the last global batch."""
    scores: Mapping[str, Any]


def train(spec: TrainSpec, attempt: Attempt, *, world: World, tracker: Tracker, supervisor: Supervisor) -> Trained:
    """Trains the task to its end, or until asked to stop; starts from the newest checkpoint there is."""
    with world.together():
        loader = spec.loader(spec.dataset.open(), "train", world)
        _warn_of_small_cache(loader, world)
    engine, position = _start(spec, attempt, world, loader)
    then: Literal["wait", "exit"] = "exit" if attempt.executor == "ray" else "wait"
    total_steps = steps_total(loader.order.samples_per_epoch, spec.recipe.global_batch, spec.recipe.epochs)
    with ExitStack() as held:
        held.enter_context(closing(engine))
        watchdog = held.enter_context(Watchdog(attempt.store, world, limit_s=spec.resources.watchdog_s, then=then))
        engine.phase = watchdog.phase
        return _Training(
            spec=spec,
            attempt=attempt,
            world=world,
            tracker=tracker,
            supervisor=supervisor,
            loader=loader,
            engine=engine,
            watchdog=watchdog,
            saver=held.enter_context(saving(_saver(spec, attempt, world, engine))),
            meter=held.enter_context(closing(TrainingMeter(spec, loader, engine.module, world, position.global_step))),
            feed=held.enter_context(closing(Feed(loader, total_steps))),
            incidents=Incidents(spec, attempt, world),
            total_steps=total_steps,
            position=position,
        ).run()


def _start(spec: TrainSpec, attempt: Attempt, world: World, loader: Loader) -> tuple[Engine, Position]:
    """The engine and the position, from the newest checkpoint or from nothing."""
    with found(world, lambda: beginning(attempt, spec.start)) as checkpoint:
        with world.together():
            built = spec.task.build()
            if checkpoint:
                checkpoints.check_cursor(checkpoint, spec.cursor(loader.order))
                checkpoint.load_into(built.module)
        settings = engine_settings(spec.recipe, spec.resources, workers=world.size)
        engine = Engine(built.module, built.groups, settings, world)
        if not checkpoint:
            return engine, Position()
        with world.together():
            engine.load(checkpoint.read, optimizer_steps=checkpoint.manifest.optimizer_steps)
        position = position_at(checkpoint, global_batch=spec.recipe.global_batch, world=world)
    if checkpoint.root.uri != attempt.root.uri:
        position.saved_at = -1  # another training's: this one has saved nothing yet
    return engine, position


def _saver(spec: TrainSpec, attempt: Attempt, world: World, engine: Engine) -> Saver:
    retention, room = Retention.of(spec.resources), room_for_copy(spec.resources, world.device)
    return Saver(engine.fragments, world, attempt, retention, room)


@dataclass(kw_only=True)
class _Training:
    """All that takes part, and the position that it moves."""

    spec: TrainSpec
    attempt: Attempt
    world: World
    tracker: Tracker
    supervisor: Supervisor
    loader: Loader
    engine: Engine
    watchdog: Watchdog
    saver: Saver
    meter: TrainingMeter
    feed: Feed
    incidents: Incidents
    total_steps: int
    position: Position

    def run(self) -> Trained:
        """From the position to the end, or to where all agree to stop."""
        self.tracker.resume(as_points(self.position.history), rollbacks=self.position.guard.roll_backs)
        stopped = self._steps()
        if stopped == "fenced":
            raise Fenced(f"{self.attempt.root_uri}: another run has claimed a higher generation; this one stops")
        if self.position.saved_at != self.position.global_step:
            self._save()
        self.saver.finish()
        self.meter.close()
        scores = (
            {} if stopped or not self.spec.evaluation_split else evaluate(self.spec, self.engine.module, self.world)
        )
        return Trained(
            self.position.saved_key,
            self.position.global_step,
            self.total_steps,
            stopped,
            self.world.total_modulo_2_64(self.position.digest),
            self.position.loss,
            scores,
        )

    def _steps(self) -> StopReason:
        """Step after step; why they ended."""
        resources, phase = self.spec.resources, self.watchdog.phase
        window = resources.profile_steps if self.world.is_first else None
        with closing(Profiler(window, self.attempt.store, self.tracker)) as profiler:
            while self.position.global_step < self.total_steps:
                self.watchdog.step = self.position.global_step
                profiler.before(self.position.global_step)
                with phase("data"):
                    batch, problem = self._next()
                with phase("agree"):
                    self.saver.advance()
                    stopped = self._agree(batch, problem)
                if stopped or batch is None:
                    return stopped
                if self._step(batch).verdict == "roll_back":
                    continue
                if self._due(resources.log_every_steps):
                    with phase("log"):
                        self._log()
                if self.position.global_step % resources.checkpoint_every_steps == 0:
                    with phase("save"):
                        self._save()
        return ""

    def _due(self, every: int) -> bool:
        return self.position.global_step % every == 0 or self.position.global_step == self.total_steps

    def _next(self) -> tuple[Batch | None, PipelineError | None]:
        """The next step's batch, or why there is none."""
        try:
            return self.feed.batch(self.position.global_step), None
        except PipelineError as error:
            return None, error

    def _agree(self, batch: Batch | None, problem: PipelineError | None) -> StopReason:
        """One reason to stop for all: a worker's failure, or what any rank's supervisor says. Substitutions are noted by all."""
        reason = self.supervisor.should_stop()
        substituted = len(batch.substitutions) if batch else 0
        failed, substitutions, *told = self.world.total(
            [problem is not None, substituted, *(reason == one for one in REASONS)]
        )
        if problem:
            raise problem
        if failed:
            raise PipelineError(ELSEWHERE)
        agreed: StopReason = next((one for one, ranks in zip(REASONS, told, strict=True) if ranks), "")
        if substitutions and batch and not agreed:
            self._note(batch)
        return agreed

    def _note(self, batch: Batch) -> None:
        """Writes down what stood in for what, on every rank; DataError on all when it has happened too often."""
        self.position.substitutions += [one for of_rank in self.world.all_of(batch.substitutions) for one in of_rank]
        check_limit(
            self.position.substitutions,
            self.loader.order.samples_per_epoch,
            self.loader.selection.manifest.root.uri,
        )

    def _step(self, batch: Batch) -> Judgement:
        """One global batch: moves the position, and the weights where the guard sees nothing wrong."""
        position, engine, recipe = self.position, self.engine, self.spec.recipe
        lr = recipe.learning_rate(position.global_step, self.loader.order.samples_per_epoch)
        micro_batches = split(self.spec.task.inputs(batch), engine.settings, self.world.device)
        local_sum = engine.accumulate(micro_batches, global_batch=recipe.global_batch)
        with self.watchdog.phase("check"):
            loss_sum, squared_norm = self.world.total([local_sum, engine.squared_grad_norm()])
        seen = Seen(position.global_step, loss_sum / recipe.global_batch, math.sqrt(squared_norm))
        judgement = judge(recipe.guard, position.guard, seen, self.total_steps)
        with self.watchdog.phase("step"):
            if judgement.verdict == "go":
                engine.apply(lr)
                position.loss, position.grad_norm = seen.loss, seen.grad_norm
            else:
                engine.discard()
        position.guard = judgement.state
        position.global_step = judgement.state.past_gaps(seen.step + 1)
        position.count_in(batch)
        if judgement.reason:
            self.incidents.record(engine, batch, judgement, lr)
        if judgement.verdict == "roll_back":
            self._roll_back(judgement)
        return judgement

    def _roll_back(self, judgement: Judgement) -> None:
        """Weights, moments and records as they were before a range of steps, which is never trained on."""
        undo, gone = judgement.undo, judgement.before.stepped_over
        self.saver.finish()

        def back() -> Checkpoint | None:
            return checkpoints.before(self.attempt, undo, gone) or forked(self.attempt, self.spec.start)

        with found(self.world, back) as checkpoint:
            with self.world.together():
                lookup = checkpoint.read if checkpoint else initial_state(self.spec.task.build().module)
                self.engine.load(lookup, optimizer_steps=checkpoint.manifest.optimizer_steps if checkpoint else 0)
            self.engine.spread()
            there = Position()
            if checkpoint:
                there = position_at(checkpoint, global_batch=self.spec.recipe.global_batch, world=self.world)
        undo = (max(undo[0], there.global_step), undo[1])
        there.guard = gone_back(judgement.before, there.guard, undo)
        there.global_step = there.guard.past_gaps(there.global_step)
        self.position = there
        self.meter.begin(there.global_step)
        self.tracker.rolled_back(there.global_step)
        if self.world.is_first:
            log.warning(
                "%s: gone back to step %d, steps %d to %d are stepped over (roll-back %d of at most %d)",
                self.attempt.step_name,
                max(there.saved_at, 0),
                undo[0],
                undo[1] - 1,
                there.guard.roll_backs,
                self.spec.recipe.guard.roll_backs,
            )

    def _log(self) -> None:
        """A row for the history, the tracker and the progress line."""
        position, recipe = self.position, self.spec.recipe
        lr = recipe.learning_rate(position.global_step - 1, self.loader.order.samples_per_epoch)
        row = self.meter.row(position, lr=lr)
        if self.world.is_first:
            position.history.append(row)
            self.tracker.log(position.global_step, as_metrics(row))
            images = self.total_steps * recipe.global_batch
            self.attempt.progress.update(int(row["images"]), images, unit="images", **shown(row))

    def _save(self) -> None:
        """Hands the state and the position to the saver, which writes them while training goes on."""
        position = self.position
        manifest = CheckpointManifest(
            global_step=position.global_step,
            optimizer_steps=self.engine.optimizer_steps,
            cursor=json.loads(json.dumps(self.spec.cursor(self.loader.order))),
            ids_digest=position.digest,
            ids_count=position.count,
            substitutions=tuple(position.substitutions),
            guard=position.guard,
            parameters=self.engine.shapes(),
            world_size=self.world.size,
            zero_stage=self.engine.settings.zero_stage,
        )
        with self.meter.saving():
            position.saved_key = self.saver.save(manifest, position.history)
        position.saved_at = position.global_step


def _warn_of_small_cache(loader: Loader, world: World) -> None:
    """A cache that cannot hold what is read at once fetches the same shards again and again: better known before than billed."""
    needed, there = loader.bytes_at_once(world.local_size), loader.cache.max_bytes
    if world.is_first and needed > there:
        log.warning(
            "%s: about %.1f GiB of shards are read at once on each node, resources.cache_max_bytes allows %.1f GiB: shards will be "
            "fetched more than once an epoch. Raise it, or use more nodes, or smaller shards",
            loader.cache.store.uri,
            needed / 2**30,
            there / 2**30,
        )
