"""One loop for every Task: batches in their computed order, steps of the engine, checkpoints, agreement to stop.

It knows no Ray and no MLflow: it is handed a world, the attempt (where to write), a tracker and a supervisor, so that Ray
Train, `mae run --in-process` and a debugger call the same code. The position is one integer, `global_step`: global batches
consumed. Units: learning rates absolute, times in seconds.
Errors: what goes wrong on one worker is agreed by all at a step boundary, so that nobody is left waiting in a collective."""

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from pipeline.data.loader import Batch, Loader
from pipeline.data.order import ids_digest, plain_slice, steps_total
from pipeline.data.substitution import Substitution, check_limit
from pipeline.errors import Fenced, PipelineError
from pipeline.graph.step import Attempt, generation_key
from pipeline.tracking import Tracker
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Checkpoint, CheckpointManifest
from pipeline.training.data_meter import DATA_METRICS, DataMeter
from pipeline.training.engine import Engine, initial_state
from pipeline.training.engine_settings import EngineSettings
from pipeline.training.guard import FRESH, GuardState, Judgement, Seen, gone_back, judge
from pipeline.training.incidents import Incidents
from pipeline.training.slices import split
from pipeline.training.spec import TrainSpec
from pipeline.training.watchdog import Watchdog
from pipeline.training.world import ELSEWHERE, World

StopReason = Literal["", "asked", "fenced"]
EVALUATION_BATCH = 256

log = logging.getLogger(__name__)


class Supervisor(Protocol):
    """Who may ask the loop to stop."""

    def should_stop(self) -> StopReason:
        """Asked on rank 0 at every step boundary; must be cheap."""
        ...


@dataclass(frozen=True)
class Trained:
    """What the loop leaves behind, equal on every worker."""

    checkpoint_key: str
    """In the step's directory."""
    global_step: int
    total_steps: int
    stopped: bool
    ids_digest: int
    """Over every (epoch, sample) of the committed line."""
    loss: float
    """Mean over the last global batch."""
    scores: Mapping[str, float]


@dataclass
class _Position:
    """Where training stands. `digest` and `count` are this rank's part since the checkpoint (rank 0: and what that one held)."""

    global_step: int = 0
    digest: int = 0
    count: int = 0
    substitutions: list[Substitution] = field(default_factory=list)  # of all ranks, on every one
    loss: float = math.nan  # of the last accepted step, as is the norm
    grad_norm: float = math.nan
    guard: GuardState = FRESH
    saved_at: int = -1
    saved_key: str = ""
    history: list[dict[str, float]] = field(default_factory=list)


def train(spec: TrainSpec, attempt: Attempt, *, world: World, tracker: Tracker, supervisor: Supervisor) -> Trained:
    """Trains the task to its end, or until asked to stop; starts from the newest checkpoint there is."""
    with world.together():
        loader = spec.loader(spec.dataset.open(), "train", world)
        _warn_of_small_cache(loader, world)
    engine, position = _start(spec, attempt, world, loader)
    then: Literal["wait", "exit"] = "exit" if attempt.executor == "ray" else "wait"
    watchdog = Watchdog(attempt.store, world, limit_s=spec.placement.watchdog_s, then=then)
    engine.phase = watchdog.phase
    with closing(engine), watchdog:
        return _run(spec, attempt, world, tracker, supervisor, loader, engine, position, watchdog)


def _run(
    spec: TrainSpec,
    attempt: Attempt,
    world: World,
    tracker: Tracker,
    supervisor: Supervisor,
    loader: Loader,
    engine: Engine,
    position: _Position,
    watchdog: Watchdog,
) -> Trained:
    """From the position to the end, or to where all agree to stop."""
    total_steps = steps_total(loader.order.samples_per_epoch, spec.recipe.global_batch, spec.recipe.epochs)
    meter = _Meter(loader, position.global_step, spec.recipe.global_batch)
    incidents = Incidents(spec, attempt, world)
    stopped: StopReason = ""
    with closing(Feed(loader, total_steps)) as feed:
        while position.global_step < total_steps:
            watchdog.step = position.global_step
            with watchdog.phase("data"):
                batch, problem = _next(feed, position.global_step)
            with watchdog.phase("agree"):
                stopped, substituted = _agree(world, supervisor, problem, batch)
            if stopped or batch is None:
                break
            if substituted:
                _note(world, loader, position, batch)
            lr = spec.recipe.learning_rate(position.global_step, loader.order.samples_per_epoch)
            judgement = _step(spec, engine, world, batch, position, lr, total_steps, watchdog)
            if judgement.reason:
                incidents.record(engine, batch, judgement, lr)
            if judgement.verdict == "roll_back":
                position = _roll_back(spec, attempt, engine, world, judgement)
                meter = _Meter(loader, position.global_step, spec.recipe.global_batch)
                continue
            if _due(position.global_step, spec.placement.log_every_steps, total_steps):
                with watchdog.phase("log"):
                    row = meter.row(world, position, lr)
                if world.is_first:
                    position.history.append(row)
                    tracker.log(position.global_step, {_METRICS[key]: row[key] for key in row if key in _METRICS})
                    images = total_steps * spec.recipe.global_batch
                    attempt.progress.update(int(row["images"]), images, unit="images", **_shown(row))
            if position.global_step % spec.placement.checkpoint_every_steps == 0:
                with watchdog.phase("save"):
                    _save(spec, attempt, engine, world, loader, position)
    if stopped == "fenced":
        raise Fenced(f"{attempt.root_uri}: another run has claimed a higher generation; this one stops")
    if position.saved_at != position.global_step:
        _save(spec, attempt, engine, world, loader, position)
    scores = {} if stopped or not spec.evaluation_split else _evaluate(spec, engine, world)
    return Trained(
        position.saved_key,
        position.global_step,
        total_steps,
        bool(stopped),
        world.total_modulo_2_64(position.digest),
        position.loss,
        scores,
    )


_METRICS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "images": "train/images_seen",
    "images_per_s": "throughput/images_per_s",
    "skipped_steps": "train/skipped_steps",
    "stepped_over": "train/stepped_over_steps",
    **DATA_METRICS,
}
"""Names in the history and in MLflow."""


def _shown(row: Mapping[str, float]) -> dict[str, float]:
    """What of a row stands in the progress line."""
    stand_ins = {"stand-ins": row["substitutions"]} if row["substitutions"] else {}
    lost = row["skipped_steps"] + row["stepped_over"]
    stand_ins |= {"lost steps": lost} if lost else {}
    return {"loss": row["loss"], **stand_ins, "wait": round(row["data_wait"], 2), "images_per_s": row["images_per_s"]}


def _start(spec: TrainSpec, attempt: Attempt, world: World, loader: Loader) -> tuple[Engine, _Position]:
    """The engine and the position, from the newest checkpoint or from nothing."""
    with _newest(attempt, world) as checkpoint:
        with world.together():
            built = spec.task.build()
            if checkpoint:
                checkpoints.check_cursor(checkpoint, spec.cursor(loader.order))
                built.module.load_state_dict(checkpoint.weights())
        engine = Engine(built.module, built.groups, settings_for(spec, world), world)
        if not checkpoint:
            return engine, _Position()
        with world.together():
            engine.load(checkpoint.read, optimizer_steps=checkpoint.manifest.optimizer_steps)
        return engine, _position_at(checkpoint, spec, world)


def _position_at(checkpoint: Checkpoint, spec: TrainSpec, world: World) -> _Position:
    """Where a checkpoint stands."""
    manifest, history = checkpoint.manifest, checkpoint.history()
    return _Position(
        global_step=manifest.global_step,
        digest=manifest.ids_digest if world.is_first else 0,
        count=_counted(manifest, spec.recipe.global_batch) if world.is_first else 0,
        substitutions=list(manifest.substitutions),
        loss=history[-1]["loss"] if history else math.nan,
        grad_norm=history[-1]["grad_norm"] if history else math.nan,
        guard=manifest.guard,
        saved_at=manifest.global_step,
        saved_key=checkpoint.key,
        history=history,
    )


def _counted(manifest: CheckpointManifest, global_batch: int) -> int:
    """Ids that reached a device; those that nobody counted are taken for what they must have been."""
    return manifest.global_step * global_batch if manifest.ids_count is None else manifest.ids_count


def _newest(attempt: Attempt, world: World) -> AbstractContextManager[Checkpoint | None]:
    """The checkpoint to start from; None: start from nothing."""
    return _found(attempt, world, lambda: checkpoints.newest(attempt))


@contextmanager
def _found(attempt: Attempt, world: World, find: Callable[[], Checkpoint | None]) -> Iterator[Checkpoint | None]:
    """The checkpoint that rank 0 finds, opened (and verified) on every worker."""
    with ExitStack() as held:
        checkpoint = None
        with world.together():
            if world.is_first and (checkpoint := find()):
                held.enter_context(checkpoint)
        key = world.from_first(checkpoint.key if checkpoint else "")
        with world.together():
            if key and not world.is_first:
                checkpoint = held.enter_context(checkpoints.open_checkpoint(attempt.root, key))
        yield checkpoint


def settings_for(spec: TrainSpec, world: World) -> EngineSettings:
    """Micro-batch and accumulation follow from the global batch and the largest slice of a worker."""
    largest_slice = math.ceil(spec.recipe.global_batch / world.size)
    micro_batch = min(spec.placement.micro_batch, largest_slice)
    return EngineSettings(
        precision=spec.recipe.precision,
        zero_stage=spec.placement.zero_stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(largest_slice / micro_batch),
        betas=spec.recipe.betas,
        max_grad_norm=spec.recipe.max_grad_norm,
        offload=spec.placement.offload,
        activation_checkpointing=spec.placement.activation_checkpointing,
    )


class Feed:
    """Batches by the number of their step: one after the other as a rule, and from elsewhere after a jump."""

    def __init__(self, loader: Loader, total_steps: int) -> None:
        self.loader, self.total_steps, self.ahead = loader, total_steps, -1
        self.batches: Generator[Batch] | None = None

    def batch(self, step: int) -> Batch:
        """This rank's part of a step."""
        if self.batches is None or step != self.ahead:
            self.close()
            self.batches = self.loader.from_step(step, self.total_steps)
        self.ahead = step + 1
        return next(self.batches)

    def close(self) -> None:
        """Ends the loader's threads."""
        if self.batches:
            self.batches.close()


def _next(feed: Feed, step: int) -> tuple[Batch | None, PipelineError | None]:
    """The step's batch, or why there is none."""
    try:
        return feed.batch(step), None
    except PipelineError as error:
        return None, error


def _agree(
    world: World, supervisor: Supervisor, problem: PipelineError | None, batch: Batch | None
) -> tuple[StopReason, int]:
    """One reason to stop for all: a worker's failure, or what the supervisor tells rank 0. And all ranks' substitutions."""
    reason = supervisor.should_stop() if world.is_first else ""
    substituted = len(batch.substitutions) if batch else 0
    flags = world.total([problem is not None, reason == "asked", reason == "fenced", substituted])
    failed, asked, fenced, substitutions = flags
    if problem:
        raise problem
    if failed:
        raise PipelineError(ELSEWHERE)
    return "fenced" if fenced else "asked" if asked else "", int(substitutions)


def _note(world: World, loader: Loader, position: _Position, batch: Batch) -> None:
    """Writes down what stood in for what, on every rank; DataError on all when it has happened too often."""
    position.substitutions += [one for of_rank in world.all_of(batch.substitutions) for one in of_rank]
    check_limit(position.substitutions, loader.order.samples_per_epoch, loader.selection.manifest.root.uri)


def _step(
    spec: TrainSpec,
    engine: Engine,
    world: World,
    batch: Batch,
    position: _Position,
    lr: float,
    total_steps: int,
    watchdog: Watchdog,
) -> Judgement:
    """One global batch: moves the position, and the weights where the guard sees nothing wrong."""
    micro_batches = split(spec.task.inputs(batch), engine.settings, world.device)
    local_sum = engine.accumulate(micro_batches, global_batch=spec.recipe.global_batch)
    with watchdog.phase("check"):
        loss_sum, squared_norm = world.total([local_sum, engine.squared_grad_norm()])
    seen = Seen(position.global_step, loss_sum / spec.recipe.global_batch, math.sqrt(squared_norm))
    judgement = judge(spec.recipe.guard, position.guard, seen, total_steps)
    with watchdog.phase("step"):
        if judgement.verdict == "go":
            engine.apply(lr)
            position.loss, position.grad_norm = seen.loss, seen.grad_norm
        else:
            engine.discard()
    position.guard = judgement.state
    position.global_step = judgement.state.past_gaps(seen.step + 1)
    position.digest = (position.digest + ids_digest(batch.epochs.numpy(), batch.sample_ids.numpy())) % 2**64
    position.count += len(batch.sample_ids)
    return judgement


def _roll_back(spec: TrainSpec, attempt: Attempt, engine: Engine, world: World, judgement: Judgement) -> _Position:
    """Weights, moments and records as they were before a range of steps, which is never trained on."""
    undo, gone = judgement.undo, judgement.before.stepped_over
    with _found(attempt, world, lambda: checkpoints.before(attempt, undo, gone)) as checkpoint:
        with world.together():
            lookup = checkpoint.read if checkpoint else initial_state(spec.task.build().module)
            engine.load(lookup, optimizer_steps=checkpoint.manifest.optimizer_steps if checkpoint else 0)
        engine.spread()
        there = _position_at(checkpoint, spec, world) if checkpoint else _Position()
    undo = (max(undo[0], there.global_step), undo[1])
    there.guard = gone_back(judgement.before, there.guard, undo)
    there.global_step = there.guard.past_gaps(there.global_step)
    if world.is_first:
        log.warning(
            "%s: gone back to step %d, steps %d to %d are stepped over (roll-back %d of at most %d)",
            attempt.step_name,
            there.saved_at if checkpoint else 0,
            undo[0],
            undo[1] - 1,
            there.guard.roll_backs,
            spec.recipe.guard.roll_backs,
        )
    return there


def _save(spec: TrainSpec, attempt: Attempt, engine: Engine, world: World, loader: Loader, position: _Position) -> None:
    """Writes every rank's fragments; rank 0 commits when all are there."""
    folder = checkpoints.folder_of(position.global_step)
    store = attempt.store
    with world.together():
        mine = checkpoints.write_fragments(store, folder, engine.fragments(), rank=world.rank, world_size=world.size)
    files, digests, counts = zip(*world.all_of((mine, position.digest, position.count)), strict=True)
    with world.together():
        if world.is_first:
            history = checkpoints.write_history(store, folder, position.history)
            manifest = CheckpointManifest(
                global_step=position.global_step,
                optimizer_steps=engine.optimizer_steps,
                cursor=json.loads(json.dumps(spec.cursor(loader.order))),
                ids_digest=sum(digests) % 2**64,
                ids_count=sum(counts),
                substitutions=tuple(position.substitutions),
                guard=position.guard,
                parameters=engine.shapes(),
                world_size=world.size,
                zero_stage=engine.settings.zero_stage,
                files=(*files, history),
            )
            checkpoints.commit(store, folder, manifest)
            checkpoints.prune(store, keep=spec.placement.keep_checkpoints)
    position.saved_at = position.global_step
    position.saved_key = f"{generation_key(attempt.generation)}/{folder}"


def _evaluate(spec: TrainSpec, engine: Engine, world: World) -> Mapping[str, float]:
    """Scores of the trained module on the evaluation split, over all workers."""
    with world.together():
        loader = spec.loader(spec.dataset.open(), spec.evaluation_split, world)
    total = int(loader.selection.counts.sum())
    largest_slice = len(plain_slice(total, world.size - 1, world.size))
    most = math.ceil(largest_slice / EVALUATION_BATCH)
    with closing(loader.evaluation_batches(EVALUATION_BATCH)) as batches:
        return spec.task.evaluate(engine.module, _in_step(batches, most, spec.image_size, world), world)


def _in_step(batches: Iterator[Batch], count: int, image_size: tuple[int, int], world: World) -> Iterator[Batch]:
    """As many batches on every rank: ZeRO-3 gathers weights in each forward pass. Padding has label -1 and is not counted."""
    nothing = torch.full((1,), -1)
    padding = Batch(torch.zeros(1, *image_size, 3, dtype=torch.uint8), nothing, nothing, nothing)
    for _ in range(count):
        with world.together():
            batch = next(batches, padding)
        yield batch


def _due(global_step: int, every: int, total_steps: int) -> bool:
    return global_step % every == 0 or global_step == total_steps


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


class _Meter:
    """Images a second, and how the data came, between two rows of the history."""

    def __init__(self, loader: Loader, global_step: int, global_batch: int) -> None:
        self.step, self.global_batch, self.samples = global_step, global_batch, loader.order.samples_per_epoch
        self.data = DataMeter(loader)
        self.time = time.monotonic()

    def row(self, world: World, position: _Position, lr: float) -> dict[str, float]:
        """What to log at this step; all ranks ask for it, since the data's numbers are sums over them."""
        now = time.monotonic()
        elapsed, steps = max(now - self.time, 1e-9), position.global_step - self.step
        images = position.global_step * self.global_batch
        data = self.data.row(
            world,
            elapsed=elapsed,
            steps=steps,
            images=images,
            images_here=steps * self.global_batch,
            substitutions=position.substitutions,
            passed_over=[(a * self.global_batch, b * self.global_batch) for a, b in position.guard.stepped_over],
        )
        self.step, self.time = position.global_step, now
        return {
            "step": position.global_step,
            "images": images,
            "epoch": images / self.samples,
            "loss": position.loss,
            "lr": lr,
            "grad_norm": position.grad_norm,
            "images_per_s": steps * self.global_batch / elapsed,
            "skipped_steps": len(position.guard.skipped),
            "stepped_over": position.guard.missed(position.global_step),
            **data,
        }
