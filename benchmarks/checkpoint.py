"""A checkpoint written while training continues: how long the loop waits, compared with a bare copy of the same bytes in memory.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --quick
    python -m benchmarks.checkpoint --store s3://bucket/prefix

One worker with the real engine (ZeRO-1, float32) trains MAE ViT-S on random pixels with a batch of 2. (--quick:
7 wide blocks on small images, so that a step is quick and the state still exceeds 256 MiB.) A turn has four
parts: steps alone; the bare copy; the save, for which the loop waits; and steps while the file is written, each
with the saver's check at the step boundary, until the checkpoint is committed. The bare copy is the faster of
torch's and numpy's, between two buffers of the state's size that have been touched before.

Units:  wall-clock seconds; a ratio is the median over turns of save / copy. seconds: from the save to its
        commit. share_of_training: stall / (500 steps, the default interval, plus the stall). slower_beside: a
        step while the file is written / a step alone.
Goals:  stall_vs_copy <= 2 and share_of_training < 0.01.
Errors: StorageError if the store refuses."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import _data
from benchmarks import _timing as timing
from mae_core.config import MAEConfig, ViTConfig, small
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.resources import Resources
from pipeline.graph.step import Attempt
from pipeline.storage import open_store
from pipeline.training.checkpoints.format import CheckpointManifest
from pipeline.training.checkpoints.host_copy import in_memory, pinned
from pipeline.training.checkpoints.retention import Retention
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.engine.deepspeed_engine import Engine, MicroBatch
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.tasks import MAETask
from pipeline.training.world import enter_world

BATCH = 2
INTERVAL = Resources().checkpoint_every_steps


class Turn(NamedTuple):
    """Seconds."""

    copy: float
    stall: float
    until_committed: float
    step_alone: float
    step_beside: float


class Silent:
    """Progress that is not shown."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


class Training:
    """An engine that trains on random pixels, and its saver."""

    def __init__(self, model: MAEConfig, store_uri: str) -> None:
        world = enter_world(use_gpu=local_gpu_count() > 0)
        built = MAETask(model=model, weight_decay=0.05, seed=0).build()
        settings = EngineSettings(precision="fp32", zero_stage=1, micro_batch=BATCH, accumulation=1, betas=(0.9, 0.95))
        self.engine = Engine(built.module, built.groups, settings, world)
        height, width = model.encoder.image_size
        images = torch.randint(0, 256, (BATCH, height, width, 3), dtype=torch.uint8, device=world.device)
        noise = torch.rand(BATCH, model.encoder.num_patches, device=world.device)
        self.micro_batch = MicroBatch((images, noise), torch.ones(BATCH, device=world.device))
        attempt = Attempt(
            root_uri=open_store(store_uri).uri,
            generation=1,
            continues="",
            step_name="benchmark",
            fingerprint="0" * 64,
            resources=Resources(),
            executor="in_process",
            progress=Silent(),
        )
        keep = Retention(last=1, every_steps=None, best=0)
        allocate = pinned if world.device.type == "cuda" else in_memory
        self.saver = Saver(self.engine.fragments, world, attempt, keep, allocate)
        self.device, self.steps = world.device, 0
        self.bytes = sum(4 * fragment.values.numel() for fragment in self.engine.fragments())

    def step(self) -> None:
        """Do one training step."""
        self.engine.train_step([self.micro_batch], global_batch=BATCH, lr=1e-6)
        self.steps += 1

    def save(self) -> None:
        """Save as the loop does."""
        manifest = CheckpointManifest(
            global_step=self.steps,
            optimizer_steps=self.engine.optimizer_steps,
            cursor={},
            ids_digest=0,
            ids_count=self.steps * BATCH,
            parameters=self.engine.shapes(),
            world_size=1,
            zero_stage=1,
        )
        self.saver.save(manifest, [{"step": self.steps, "loss": 1.0}])

    def close(self) -> None:
        """End the saver's thread and the engine."""
        self.saver.close()
        self.engine.close()


class BareCopy:
    """Two buffers of `size` bytes that have been touched; on CUDA the first is on the device and the second is pinned."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.source = torch.ones(size // 4, device=device)
        self.target = torch.empty(size // 4, pin_memory=device.type == "cuda").fill_(0)

    def seconds(self) -> float:
        """Return the seconds of the fastest way to copy."""
        ways: list[Callable[[], object]] = [lambda: self.target.copy_(self.source)]
        if self.device.type == "cpu":
            ways.append(lambda: np.copyto(self.target.numpy(), self.source.numpy()))
        return min(timing.seconds_of(way, times=2, device=self.device) for way in ways)


def turn(training: Training, bare: BareCopy, *, steps: int) -> Turn:
    """Do one turn: steps alone, a bare copy, a save, and steps while it is written."""
    alone = timing.seconds_of(training.step, times=steps, device=training.device)
    copy = bare.seconds()
    began = time.perf_counter()
    training.save()
    stall = time.perf_counter() - began
    beside = []
    while training.saver.busy:
        beside.append(timing.seconds_of(training.step, times=1, device=training.device))
        looked = time.perf_counter()
        training.saver.advance()
        stall += time.perf_counter() - looked
    return Turn(copy, stall, time.perf_counter() - began, alone, median(beside))


def quick_config() -> MAEConfig:
    """Return a model with 26 million parameters and 16 patches."""
    encoder = ViTConfig(image_size=(64, 64), patch_size=16, embed_dim=512, depth=7, num_heads=8)
    return MAEConfig(encoder=encoder, decoder_depth=1)


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    model = quick_config() if options.quick else MAEConfig(encoder=small())
    turns = options.turns or (5 if options.quick else 11)
    with tempfile.TemporaryDirectory(prefix="mae-benchmark-") as folder:
        store_uri = options.store or str(Path(folder) / "store")
        with closing(Training(model, store_uri)) as training:
            bare = BareCopy(training.bytes, training.device)
            training.step()
            turn(training, bare, steps=1)
            found = [turn(training, bare, steps=2) for _ in range(turns)]
            device = timing.device_name(training.device)
    ratio = _data.spread([one.stall / one.copy for one in found])
    stall, alone = median(one.stall for one in found), median(one.step_alone for one in found)
    slower = _data.spread([one.step_beside / one.step_alone for one in found])
    share = stall / (INTERVAL * alone + stall)
    seconds = median(one.until_committed for one in found)
    held = training.bytes / 2**20
    print(
        f"{device}, torch {torch.__version__}: {held:.0f} MiB per rank, {turns} turns, store {store_uri.partition(':')[0]}"
    )
    print(
        timing.table(
            ("", "seconds", "ratio (quartiles)"),
            [
                ("bare copy", f"{median(one.copy for one in found):.4f}", "1"),
                ("the loop waits", f"{stall:.4f}", _data.shown(ratio)),
                ("saved and committed after", f"{seconds:.2f}", ""),
                ("a step alone", f"{alone:.3f}", "1"),
                ("a step while it is written", f"{median(one.step_beside for one in found):.3f}", _data.shown(slower)),
            ],
        )
    )
    print(f"of training time, a save every {INTERVAL} steps: {100 * share:.4f} %")
    return {
        "benchmark": "checkpoint",
        "device": device,
        "stall_vs_copy": round(ratio.median, 3),
        "stall_vs_copy_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
        "bytes": training.bytes,
        "seconds": round(seconds, 3),
        "stall_seconds": round(stall, 4),
        "copy_seconds": round(median(one.copy for one in found), 4),
        "share_of_training": round(share, 7),
        "slower_beside": round(slower.median, 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("checkpoint", "How long the loop waits for a checkpoint. No images are read.")
    parser.add_argument("--store", help="a folder or s3://bucket/prefix; default: a temporary folder")
    parser.add_argument("--turns", type=int, help="saves to measure")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
