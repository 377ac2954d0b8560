"""A tiny real dataset, tiny models, and teams of real processes, for the tests of training.

A Team is W processes that joined one gloo group and run functions together; it is kept for the session, since importing
DeepSpeed takes seconds. The dataset is made by the real snapshot and shard stages."""

import importlib
import io
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from mae_core.config import MAEConfig, ViTConfig
from pipeline import cluster
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import OrderConfig, SampleOrder, ids_digest
from pipeline.data.feed.selection import Selection
from pipeline.data.images.pictures import AugmentConfig
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.graph.receipts import claim, claims
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.stages.pretrain import pretrain
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import snapshot
from pipeline.storage import FileStore, open_store
from pipeline.training.spec.recipe import FinetuneRecipe, Recipe
from pipeline.training.spec.tasks import Built, ClassificationTask, MAETask
from pipeline.training.spec.train_spec import PretrainConfig, TrainSpec
from pipeline.training.world import enter_world

CLASSES = ("circle", "stripe", "noise")
TRAIN, TEST = 60, 23
SIDE = 16
SEED = 5


class Silent:
    """Progress that is not shown."""

    def update(self, done, total, *, unit, **fields):
        pass

    def say(self, text):
        pass


def encoder_config() -> ViTConfig:
    return ViTConfig(image_size=(SIDE, SIDE), patch_size=4, embed_dim=16, depth=2, num_heads=2)


def mae_config(**changes: Any) -> MAEConfig:
    tiny = MAEConfig(encoder=encoder_config(), decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=1)
    return replace(tiny, **changes)


def recipe(**changes: Any) -> Recipe:
    """A global batch of 13 does not divide 60 samples, and splits unevenly among 2 or 3 workers."""
    values = {"global_batch": 13, "epochs": 2, "base_lr": 0.05, "warmup_epochs": 0.5, "precision": "fp32"}
    return Recipe(**values | changes)


def finetune_recipe(**changes: Any) -> FinetuneRecipe:
    values = {"global_batch": 13, "epochs": 4, "base_lr": 0.02, "warmup_epochs": 1.0, "precision": "fp32"}
    values |= {"augment": AugmentConfig(kind="shift", shift_pixels=1)}
    return FinetuneRecipe(**values | changes)


def resources(**changes: Any) -> Resources:
    """Resources for tiny trainings."""
    chosen = {
        "use_gpu": False,
        "micro_batch": 4,
        "checkpoint_every_steps": 3,
        "keep_checkpoints": 10,
        "keep_best": 0,
        "log_every_steps": 1,
        "cache_directory": "/nonexistent",
        "cache_max_bytes": 2**20,
        "max_failures": 2,
        "max_preemptions": 0,
        "node_wait_s": 0.0,
        "collective_timeout_s": 60,
        "watchdog_s": 60.0,
    }
    return Resources(**chosen | changes)


def attempt_at(folder: Path, *, continues: str | None = None, executor="in_process", **changes: Any) -> Attempt:
    """Claim the next generation of the step whose directory this is; by default it continues where the last one stood."""
    from pipeline.training.checkpoints.format import resume_point

    root = FileStore(folder)
    continues = resume_point(root) if continues is None else continues
    return Attempt(
        root_uri=root.uri,
        generation=claim(root, continues=continues),
        continues=continues,
        step_name="step",
        fingerprint="f" * 64,
        resources=resources(**changes),
        executor=executor,
        progress=Silent(),
        options={"bad_share_stop": 0.0},
    )


def same_attempt(attempt: Attempt, **changes: Any) -> Attempt:
    """Return the same generation for another try, as after a worker's death, with other resources."""
    assert claims(attempt.root)[-1] == attempt.generation
    return replace(attempt, resources=attempt.resources.model_copy(update=changes))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def picture(index: int, kind: str) -> bytes:
    """Return a PNG of 20 x 24 pixels that shows its class."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:20, :24]
    tint = rng.integers(60, 255, 3)
    if kind == "circle":
        shape = ((y - rng.integers(6, 14)) ** 2 + (x - rng.integers(8, 16)) ** 2 < 30).astype(float)
    elif kind == "stripe":
        shape = ((x + rng.integers(0, 6)) // 3 % 2).astype(float)
    else:
        shape = rng.random((20, 24))
    buffer = io.BytesIO()
    Image.fromarray((shape[..., None] * tint).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, *, classes=CLASSES) -> None:
    """Write train/ and test/, with a folder per class or, without classes, flat."""
    for split, count, offset in (("train", TRAIN, 0), ("test", TEST, 1000)):
        for index in range(count):
            kind = CLASSES[index % len(CLASSES)]
            place = folder / split / (kind if classes else "")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:03d}.png").write_bytes(picture(offset + index, kind))


def make_shards(folder: Path, source: Path) -> StageInput:
    """Run the source through the real snapshot and shard stages."""
    taken = SnapshotConfig(source=str(source), test_share=0.0, seed=0)
    listing = _finish(snapshot, taken, {}, attempt_at(folder / "snapshot"))
    cut = ShardStageConfig(source=str(source), seed=0, shard_max_bytes=2**16, min_shards=5)
    return _finish(shard, cut, {"snapshot": listing}, attempt_at(folder / "shard"))


def _finish(stage: Callable[..., Any], config: Any, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageInput:
    return as_input(stage(config, inputs, attempt), attempt)


def as_input(result: StageResult, attempt: Attempt) -> StageInput:
    """Return a stage's result as the next stage sees it."""
    return StageInput(attempt.root_uri, attempt.generation, attempt.fingerprint, result.facts, {"notes": result.notes})


def pretrain_config(**changes: Any) -> PretrainConfig:
    return PretrainConfig(model=mae_config(), recipe=recipe(**changes), seed=SEED)


def mae_spec(shards: StageInput, attempt: Attempt, **changes: Any) -> TrainSpec:
    """Return what the pretrain stage makes of the tiny config; 10 steps."""
    made = recipe(**changes)
    return TrainSpec(
        task=MAETask(model=mae_config(), weight_decay=made.weight_decay, seed=SEED),
        recipe=made,
        order=OrderConfig(seed=SEED),
        image_size=(SIDE, SIDE),
        dataset=dataset_address(shards),
        train_samples="all",
        evaluation_split="",
        resources=attempt.resources,
    )


def pretrain_here(shards: StageInput, folder: Path, model: Mapping[str, Any] = MappingProxyType({})) -> StageInput:
    """Run the real pretraining stage in this process; 10 steps. `model` changes the tiny autoencoder."""
    attempt = attempt_at(folder)
    config = replace(pretrain_config(), model=mae_config(**model))
    return as_input(pretrain(config, {"shards": shards}, attempt), attempt)


@dataclass(frozen=True, kw_only=True)
class SpoiledSpec(TrainSpec):
    """A spec whose training batches pass through a function on their way to the loop."""

    spoil: Callable[[int, int, Batch], Batch]
    """(step, rank, batch) -> what the loop gets."""

    def loader(self, manifest, split, world):
        made = super().loader(manifest, split, world)
        plain = made.from_step

        def from_step(start, stop):
            with closing(plain(start, stop)) as batches:
                for step, batch in enumerate(batches, start):
                    yield self.spoil(step, world.rank, batch)

        made.from_step = from_step
        return made


def spoiled(spec: TrainSpec, spoil: Callable[[int, int, Batch], Batch]) -> SpoiledSpec:
    """Return the spec with something wrong in its loader; `spoil` is a top-level function."""
    return SpoiledSpec(**{one.name: getattr(spec, one.name) for one in fields(spec)}, spoil=spoil)


class Napping(nn.Module):
    """A module whose forward passes take longer."""

    def __init__(self, module: nn.Module, nap_s: float) -> None:
        super().__init__()
        self.module, self.nap_s = module, nap_s

    def forward(self, *inputs):
        time.sleep(self.nap_s)
        return self.module(*inputs)


@dataclass(frozen=True, kw_only=True)
class NappingTask(MAETask):
    """A task whose forward passes take longer, by a time per rank."""

    naps_s: tuple[float, ...]

    def build(self) -> Built:
        built = super().build()
        return Built(Napping(built.module, self.naps_s[enter_world().rank]), built.groups)


def napping(spec: TrainSpec, *naps_s: float) -> TrainSpec:
    """Return the spec with a nap per rank in each forward pass."""
    task = {one.name: getattr(spec.task, one.name) for one in fields(spec.task)}
    return replace(spec, task=NappingTask(**task, naps_s=naps_s))


def damage(shards: StageInput, folder: Path, chosen: Sequence[tuple[str, int, int]]) -> StageInput:
    """Copy the dataset and change one byte in each of some images, given as (split, shard, index)."""
    copied = shutil.copytree(Path(shards.root_uri.removeprefix("file://")), folder)
    bad = replace(shards, root_uri=copied.as_uri())
    for split, number, index in chosen:
        selection = Selection.all(dataset_address(bad).open(), split)
        place = copied / selection.shards[number].key
        data = bytearray(place.read_bytes())
        data[int(selection.rows(number).offsets[index]) + 40] ^= 1
        place.chmod(0o644)
        place.write_bytes(data)
    return bad


def classification_spec(shards: StageInput, attempt: Attempt, **changes: Any) -> TrainSpec:
    """Return what fine-tuning makes of a tiny config with random weights."""
    made = finetune_recipe(epochs=2, **changes)
    task = ClassificationTask(
        encoder=encoder_config(),
        encoder_uri="",
        num_classes=len(CLASSES),
        weight_decay=made.weight_decay,
        layer_decay=made.layer_decay,
        drop_path=made.drop_path,
        label_smoothing=made.label_smoothing,
        mixup=made.mixup,
        cutmix=made.cutmix,
        seed=SEED,
    )
    spec = mae_spec(shards, attempt)
    return replace(spec, task=task, recipe=made, train_samples="labelled", evaluation_split="test")


# ---------------------------------------------------------------------------------------------------------------------
# The loop, stopped, and what it must have seen

TOTAL_STEPS = 10
"""2 epochs of 60 samples in batches of 13."""


@dataclass
class StopAfter:
    """Asks for a stop, for a reason, after `steps` steps."""

    steps: int
    reason: str = "asked"

    def stop_reason(self) -> Any:
        self.steps -= 1
        return self.reason if self.steps < 0 else ""


def computed_by_step(
    shards: StageInput, global_batch: int = 13, steps: int = TOTAL_STEPS
) -> list[list[tuple[int, int]]]:
    """Return the sorted (epoch, sample) of each step, by arithmetic alone."""
    selection = Selection.all(dataset_address(shards).open(), "train")
    order = SampleOrder(selection.counts, OrderConfig(seed=SEED))
    slots = [order.global_batch(step, global_batch) for step in range(steps)]
    return [sorted(zip(s.epochs.tolist(), selection.sample_ids(s).tolist(), strict=True)) for s in slots]


def digest_of(steps: list[list[tuple[int, int]]]) -> int:
    pairs = np.array([pair for step in steps for pair in step])
    return ids_digest(pairs[:, 0], pairs[:, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Processes


PATIENCE_S = 150
"""What takes a second or two on an idle machine gets this long before it counts as a hang."""


class TeamError(AssertionError):
    """A process of a team did not answer, or raised what no test expected."""


@dataclass
class Raised:
    """What a function raised in one of the processes."""

    kind: str
    message: str
    trace: str


class Team:
    """W processes in one gloo group. `run` calls a top-level function on all of them: function(*arguments) -> small values."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = str(folder / f"gloo-{uuid.uuid4().hex}")
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.run(_ready)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S) -> list[Any]:
        """Return the results by rank; an exception is an error of the test."""
        results = self.outcomes(function, *arguments, timeout_s=timeout_s)
        for rank, result in enumerate(results):
            if isinstance(result, Raised):
                raise TeamError(f"rank {rank} of {self.size}: {result.trace}")
        return results

    def outcomes(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = PATIENCE_S) -> list[Any]:
        """Return the results by rank, exceptions as `Raised`."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_s):
                self.close()
                raise TeamError(f"rank {rank} of {self.size} hangs in {function.__name__}")
            results.append(pickle.loads(pipe.recv_bytes()))
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _ready() -> None:
    """Import DeepSpeed, which takes seconds, and wait for all ranks."""
    importlib.import_module("deepspeed")
    dist.barrier()


def _serve(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "DS_ACCELERATOR": "cpu",
    }
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=2 * PATIENCE_S),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - sent to the test
            answer = Raised(type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))  # plain bytes: torch would hand over file descriptors


@dataclass
class Teams:
    """Teams of the session, by size, started when first asked for."""

    folder: Path
    by_size: dict[int, Team]

    def __call__(self, size: int) -> Team:
        known = self.by_size.get(size)
        if known is None or not all(process.is_alive() for process in known.processes):
            self.by_size[size] = Team(size, self.folder)
        return self.by_size[size]

    def close(self) -> None:
        for team in self.by_size.values():
            team.close()


def checkpoint_state(root_uri: str, key: str) -> dict[str, torch.Tensor]:
    """Return every value of a checkpoint: "kind|parameter" -> float32."""
    from pipeline.training.checkpoints.format import open_checkpoint
    from pipeline.training.engine.deepspeed_engine import KINDS

    with open_checkpoint(open_store(root_uri), key) as checkpoint:
        return {
            f"{kind}|{name}": checkpoint.read(name, kind, 0, int(np.prod(shape)))
            for name, shape in checkpoint.manifest.parameters.items()
            for kind in KINDS
        }


# ---------------------------------------------------------------------------------------------------------------------
# Ray with killed workers


@dataclass(frozen=True)
class Disturbed:
    """Result of a pretraining on Ray whose workers were killed."""

    result: StageResult
    killed_at: list[int]
    """Newest committed step when each kill was sent."""
    killed: list[int]
    """Process ids."""
    left: list[str]
    """Command lines of our processes that outlived the cluster."""


def pretrain_on_ray(
    shards: StageInput, attempt: Attempt, config: PretrainConfig, kill_after: tuple[int, ...]
) -> Disturbed:
    """Run the real stage on a cluster of its own; kill one training worker as soon as each of these steps is committed."""
    watcher = _Killer(attempt, kill_after)
    cluster.connect(cpus=2)
    try:
        watcher.start()
        attempt = replace(attempt, progress=cluster.ProgressBoard().writer(attempt.step_name))
        result = pretrain(config, {"shards": shards}, attempt)
    finally:
        watcher.ended.set()
        watcher.join()
        cluster.disconnect()
    left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)[1]
    own = multiprocessing.resource_tracker._resource_tracker._pid
    lines = [" ".join(process.cmdline()) for process in left if process.pid != own]
    return Disturbed(result, watcher.killed_at, watcher.killed, lines)


class _Killer(threading.Thread):
    """Sends SIGKILL to training workers while the stage runs."""

    def __init__(self, attempt: Attempt, kill_after: tuple[int, ...]) -> None:
        super().__init__()
        self.attempt, self.kill_after = attempt, kill_after
        self.ended = threading.Event()
        self.killed_at: list[int] = []
        self.killed: list[int] = []

    def run(self) -> None:
        for step in self.kill_after:
            while self._committed() < step or not self._workers():
                if self.ended.wait(0.02):
                    return
            victim = self._workers()[-1]
            self.killed_at.append(self._committed())
            self.killed.append(victim.pid)
            victim.kill()
            victim.wait(10)

    def _committed(self) -> int:
        keys = (info.key for info in self.attempt.store.list("checkpoints/"))
        return max((int(key.split("/")[1][5:]) for key in keys if key.endswith("manifest.json")), default=0)

    def _workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if any(name in " ".join(process.cmdline()) for name in ("RayTrainWorker", "ray::train_alone")):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found


def in_a_process(function: Callable[..., Any], *arguments: Any, timeout_s: float = 280) -> Any:
    """Call a top-level function in a fresh process: Ray lets a process join only one cluster."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=timeout_s)
