"""One training loop for every Task: batches in their computed order, engine steps, periodic actions, agreement to stop.

The loop knows neither Ray nor MLflow. It is handed a world, an attempt (where to write), a tracker and a stop signal, so
Ray Train, `mae run --in-process` and a debugger all call the same code. The position is one integer, `global_step`: global
batches consumed. Units: learning rates are absolute, times are in seconds.
Errors: an error on one worker is agreed on at a step boundary and ends all workers, so none is left waiting in a collective."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pipeline.cluster.resources import Resources
from pipeline.data.feed.loader import Batch, Loader
from pipeline.data.feed.order import steps_total
from pipeline.data.feed.step_feed import Feed
from pipeline.data.feed.substitution import check_limit
from pipeline.errors import Fenced, PipelineError
from pipeline.graph.step import Attempt
from pipeline.tracking import Tracker
from pipeline.training.checkpoints.host_copy import allocator_for
from pipeline.training.checkpoints.position import Position
from pipeline.training.checkpoints.retention import Retention
from pipeline.training.checkpoints.saver import Saver, saving
from pipeline.training.engine.deepspeed_engine import Pass
from pipeline.training.engine.micro_batches import Copier, Copying
from pipeline.training.guard import Judgement, StepStats, judge
from pipeline.training.health.incidents import Incidents
from pipeline.training.health.stop_reasons import REASONS, StopReason, StopSignal
from pipeline.training.health.watchdog import Watchdog
from pipeline.training.loop.actions import Moment, PeriodicAction, run_due
from pipeline.training.loop.checkpointer import Checkpointer
from pipeline.training.loop.restore import roll_back, start
from pipeline.training.loop.scoring import evaluate
from pipeline.training.loop.step_log import StepLog
from pipeline.training.meters.milestones import Milestones
from pipeline.training.meters.profiler import Profiler
from pipeline.training.meters.slowness import SpeedWatch
from pipeline.training.meters.step_clocks import GpuClock, PhaseClock
from pipeline.training.meters.telemetry import TrainingMeter, as_points
from pipeline.training.spec.engines import AnyEngine
from pipeline.training.spec.train_spec import TrainSpec, float32_products
from pipeline.training.world import ELSEWHERE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """How a call of the loop ended; equal on every worker."""

    checkpoint_key: str
    """Key of the last checkpoint in the step's directory."""
    global_step: int
    total_steps: int
    stopped: StopReason
    """Why the loop stopped before the last step or the scores, or an empty string if it did not."""
    ids_digest: int
    """Digest of every (epoch, sample) trained on, over all workers."""
    loss: float
    """Mean over the last global batch."""
    scores: Mapping[str, Any]


def train(
    spec: TrainSpec, attempt: Attempt, *, world: World, tracker: Tracker, stop_signal: StopSignal
) -> TrainingResult:
    """Train from the newest checkpoint, if there is one, to the end of the recipe or until asked to stop."""
    with world.fail_together():
        loader = spec.loader(spec.dataset.open(), "train", world)
        _warn_of_small_cache(loader, world)
    # The dataset is opened before any checkpoint: a position means nothing without the order it counts in.
    cursor = spec.cursor(loader.order)
    samples_per_epoch = loader.order.samples_per_epoch
    total_steps = steps_total(samples_per_epoch, spec.recipe.global_batch, spec.recipe.epochs)
    engine, position = start(spec, attempt, world, cursor)
    # Closed in reverse order: the saver finishes before the watchdog ends, and both before the engine lets its memory go.
    with ExitStack() as stack:
        stack.enter_context(float32_products(spec.recipe.precision, world.device))
        stack.enter_context(closing(engine))
        watchdog = stack.enter_context(_watchdog(spec, attempt, world))
        phases, gpu = PhaseClock(watchdog.phase), GpuClock(world.device)
        milestones = stack.enter_context(closing(_milestones(spec, attempt, world)))
        saver = stack.enter_context(saving(_saver(spec, attempt, world, engine, milestones)))
        copier = Copier(spec.task.inputs, engine.settings, world.device)
        feed = Feed(loader, total_steps, copier.begin, device=world.device)
        stack.enter_context(closing(feed))
        meter = TrainingMeter(spec, feed, engine.module, world, position.global_step, phases=phases, gpu=gpu)
        stack.enter_context(closing(meter))
        engine.phase = partial(_pass_of_engine, phases, meter)
        # One rank's trace shows where a step's time goes, waits for the others included.
        window = spec.resources.profile_steps if world.is_first else None
        profiler = Profiler(window, attempt.store, tracker, device=world.device)
        checkpointer = Checkpointer(world=world, engine=engine, saver=saver, meter=meter, cursor=cursor)
        step_log = StepLog(
            recipe=spec.recipe,
            attempt=attempt,
            world=world,
            tracker=tracker,
            meter=meter,
            total_steps=total_steps,
            samples_per_epoch=samples_per_epoch,
            milestones=milestones,
            speed=SpeedWatch(spec.resources, "cuda" if world.device.type == "cuda" else "cpu"),
        )
        return _Training(
            spec=spec,
            attempt=attempt,
            world=world,
            tracker=tracker,
            stop_signal=stop_signal,
            loader=loader,
            engine=engine,
            watchdog=watchdog,
            phase=phases,
            gpu=gpu,
            saver=saver,
            meter=meter,
            feed=feed,
            profiler=profiler,
            incidents=Incidents(spec, attempt, world),
            checkpointer=checkpointer,
            actions=periodic_actions(spec.resources, profiler, step_log, checkpointer),
            step_log=step_log,
            total_steps=total_steps,
            position=position,
        ).run()


def periodic_actions(
    resources: Resources, profiler: Profiler, step_log: StepLog, checkpointer: Checkpointer
) -> tuple[PeriodicAction, ...]:
    """List what the loop does at step boundaries, in this order: a checkpoint's history includes the row of its own step."""
    return (
        PeriodicAction(
            phase="profile", moment="before_step", act=lambda position: profiler.before_step(position.global_step)
        ),
        PeriodicAction(phase="log", every_steps=resources.log_every_steps, also_at_end=True, act=step_log.write),
        # Not `also_at_end`: `_Training.run` saves wherever the steps ended, which a stop may have decided.
        PeriodicAction(phase="save", every_steps=resources.checkpoint_every_steps, act=checkpointer.save),
    )


@dataclass(kw_only=True)
class _Training:
    """Everything that takes part in a training, and the position that moves."""

    spec: TrainSpec
    attempt: Attempt
    world: World
    tracker: Tracker
    stop_signal: StopSignal
    loader: Loader
    engine: AnyEngine
    watchdog: Watchdog
    phase: PhaseClock
    gpu: GpuClock
    saver: Saver
    meter: TrainingMeter
    feed: Feed[Copying]
    profiler: Profiler
    incidents: Incidents
    checkpointer: Checkpointer
    actions: Sequence[PeriodicAction]
    step_log: StepLog
    total_steps: int
    position: Position

    def run(self) -> TrainingResult:
        """Take the steps that are left, save, and score the result. A stop during the scoring leaves it to the next run."""
        self.tracker.resume(as_points(self.position.history), rollbacks=self.position.guard.roll_backs)
        self.step_log.begin(self.position)
        with closing(self.profiler):
            stopped = self._steps()  # leaving the block ends a profile that the last step left open
        self.feed.close()  # frees memory and cores for the evaluation's feed
        self._check_not_fenced(stopped)
        # After a stop, or at an end that the interval misses. Training that resumes at its end saves nothing again.
        if self.position.saved_at != self.position.global_step:
            self.checkpointer.save(self.position)
        self.saver.finish()
        self.meter.close()  # takes its clock off the module before evaluation runs it
        scores: Mapping[str, Any] = {}
        # A training that stopped will go on, so its score would be that of a random moment.
        if self.spec.evaluation_split and not stopped:
            self.engine.use_averages()  # the checkpoint has been written, and this training moves no weight again
            module, store = self.engine.module, self.attempt.store
            scores, stopped = evaluate(self.spec, module, self.world, self.stop_signal, store)
            self._check_not_fenced(stopped)
        return TrainingResult(
            self.position.saved_key,
            self.position.global_step,
            self.total_steps,
            stopped,
            # Each rank's digest covers its own samples; their sum is the same however they were split over ranks.
            self.world.total_modulo_2_64(self.position.digest),
            self.position.loss,
            scores,
        )

    def _check_not_fenced(self, stopped: StopReason) -> None:
        """Raise Fenced if a newer generation owns the step, so that this one writes nothing more."""
        if stopped == "fenced":
            raise Fenced(f"{self.attempt.root_uri}: another run has claimed a higher generation; this one stops")

    def _steps(self) -> StopReason:
        """Take step after step; return why they stopped early, or an empty string if they did not."""
        phase = self.phase
        while self.position.global_step < self.total_steps:
            self.watchdog.step = self.position.global_step
            self._run_due("before_step")
            # Before `agree`: a rank without a batch says so there, before the others enter a pass that waits for it.
            with phase("data"):
                prepared, problem = self._next()
            with phase("agree"):
                # A pending save needs its collective at the same point on all ranks; this one comes anyway.
                self.saver.advance()
                stopped = self._agree(prepared and prepared[0], problem)
            if stopped or prepared is None:  # `_agree` has raised if there is no batch; the test tells the type checker
                return stopped
            judgement = self._step(*prepared)
            if judgement.verdict == "roll_back":
                self._roll_back(judgement)
            else:
                self._run_due("after_step")
        return ""

    def _run_due(self, moment: Moment) -> None:
        run_due(self.actions, moment, self.position, total_steps=self.total_steps, phase=self.phase)

    def _next(self) -> tuple[tuple[Batch, Copying] | None, PipelineError | None]:
        """Return this rank's part of the next global batch, on its way to the device, or the error that prevents it."""
        try:
            return self.feed.batch(self.position.global_step), None
        except PipelineError as error:  # anything else is a bug: it ends this worker at once, and Ray Train its group
            return None, error

    def _agree(self, batch: Batch | None, problem: PipelineError | None) -> StopReason:
        """Agree with all workers whether to go on: return one reason to stop for all, or raise on all if one has failed.

        One reduction carries failures, stop reasons and the number of substitutions, so a healthy step pays for one only.
        """
        reason = self.stop_signal.stop_reason()
        substituted = len(batch.substitutions) if batch else 0
        failed, substitutions, *ranks_by_reason = self.world.total(
            [problem is not None, substituted, *(reason == one for one in REASONS)]
        )
        # The rank that met the error raises it in its own words; `launch` prefers that message to ELSEWHERE.
        if problem:
            raise problem
        if failed:
            raise PipelineError(ELSEWHERE)
        agreed: StopReason = next((one for one, ranks in zip(REASONS, ranks_by_reason, strict=True) if ranks), "")
        # A batch at which training stops is never trained on: the resumed run reads it again and counts it then.
        if substitutions and batch and not agreed:
            self._record_substitutions(batch)
        return agreed

    def _record_substitutions(self, batch: Batch) -> None:
        """Record on every rank which samples were substituted; DataError on all ranks when there were too many."""
        # Pickles objects, which is slow, but only the rare steps that substitute come here.
        self.position.substitutions += [
            one for of_rank in self.world.all_gather(batch.substitutions) for one in of_rank
        ]
        check_limit(
            self.position.substitutions,
            self.loader.order.samples_per_epoch,
            self.loader.selection.manifest.root.uri,
        )

    def _step(self, batch: Batch, copying: Copying) -> Judgement:
        """Take one global batch: move the position, and the weights too unless the guard objects."""
        position, engine, recipe, phase = self.position, self.engine, self.spec.recipe, self.phase
        lr = recipe.learning_rate(position.global_step, self.loader.order.samples_per_epoch)
        # The step's first touch of this stream. The feed has begun to copy the batch in another, usually during the step before.
        self.gpu.mark("begin")
        micro_batches = copying.ready()
        self.gpu.mark("copied")
        engine.accumulate(micro_batches, global_batch=recipe.global_batch)
        self.gpu.mark("passed")
        with phase("check"):  # here the thread waits until the GPU has caught up
            measured = engine.measured()
        # Reduced before the optimiser moves, so that every rank judges the same two numbers and decides alike. A phase of its
        # own, so that the rank whose GPU hangs is told from those that wait for it.
        with phase("agree"):
            loss_sum, squared_norm = self.world.total(measured)
        # Padding weighs 0, so the sum over B real samples divided by B is the exact global mean.
        stats = StepStats(position.global_step, loss_sum / recipe.global_batch, math.sqrt(squared_norm))
        judgement = judge(recipe.guard, position.guard, stats, self.total_steps)
        self.gpu.mark("judged")
        with phase("step"):
            if judgement.verdict == "go":
                engine.apply(lr, grad_norm=stats.grad_norm)
                position.loss, position.grad_norm = stats.loss, stats.grad_norm  # rows stay finite: accepted steps only
            else:
                engine.discard()
        self.gpu.mark("end")
        # The position moves even if the weights do not: skipped samples count as seen and are not drawn again.
        position.guard = judgement.state_after
        position.global_step = judgement.state_after.next_step(stats.step + 1)  # jumps a skipped range ahead
        position.count_in(batch)
        if judgement.reason:
            # Last, since it raises when the guard gives up; the weights are still those that the bad step met.
            self.incidents.record(engine, batch, judgement, lr)
        return judgement

    def _roll_back(self, judgement: Judgement) -> None:
        """Jump back to a checkpoint from before the bad steps."""
        self.saver.finish()  # the save under way may be the very checkpoint to go back to
        self.position = roll_back(self.spec, self.attempt, self.world, self.engine, judgement)
        self.meter.begin(self.position.global_step)  # or the next row's rate would span a negative number of steps
        self.tracker.rolled_back(self.position.global_step)  # MLflow cannot take back points: a child run follows


@contextmanager
def _pass_of_engine(phases: PhaseClock, meter: TrainingMeter, name: Pass) -> Iterator[None]:
    """Watch and time a pass. One that compiles does not tell how fast a rank is."""
    with phases(name), meter.forward.paused() if name == "compile" else nullcontext():
        yield


def _watchdog(spec: TrainSpec, attempt: Attempt, world: World) -> Watchdog:
    """Return a watchdog that ends the worker only where it would be restarted."""
    # Nothing restarts a process outside Ray, so ending it would only lose its memory to inspection.
    on_timeout: Literal["wait", "exit"] = "exit" if attempt.executor == "ray" else "wait"
    return Watchdog(attempt.store, world, limit_s=spec.resources.watchdog_s, on_timeout=on_timeout)


def _milestones(spec: TrainSpec, attempt: Attempt, world: World) -> Milestones:
    """Return what scores checkpoints along the way; outside Ray there is nobody to do it but the loop itself."""
    return Milestones(spec.milestones if world.is_first and attempt.executor == "ray" else None, attempt)


def _saver(spec: TrainSpec, attempt: Attempt, world: World, engine: AnyEngine, milestones: Milestones) -> Saver:
    retention, allocate = Retention.of(spec.resources), allocator_for(spec.resources, world.device)
    return Saver(engine.fragments, world, attempt, retention, allocate, on_commit=milestones.committed)


def _warn_of_small_cache(loader: Loader, world: World) -> None:
    """Warn when the node's cache is smaller than what is read at once: the same shards would be fetched over and over."""
    needed, available = loader.bytes_at_once(world.local_size), loader.cache.max_bytes
    if world.is_first and needed > available:
        log.warning(
            "%s: about %.1f GiB of shards are read at once on each node, resources.cache_max_bytes allows %.1f GiB: shards will be "
            "fetched more than once per epoch. Raise it, or use more nodes or smaller shards",
            loader.cache.store.uri,
            needed / 2**30,
            available / 2**30,
        )
