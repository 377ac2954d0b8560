"""Memory of a training worker, measured and as `mae plan` predicts it: ZeRO stages, precisions, recomputation.

    python -m benchmarks.footprint                    # ViT-B with its decoder, 112 M parameters, 1 and 2 workers
    python -m benchmarks.footprint --quick            # three of the layouts

Every layout trains for two optimiser steps in real processes, through pipeline.training.engine.

Units:  peak bytes of anonymous resident memory (on a GPU: of CUDA's allocator), above what the process held
        with everything imported and the process group joined; GiB in the table. With several workers, the
        largest of them.
Errors: OSError outside Linux; PipelineError if a worker fails.
Source: man 5 proc (RssAnon)."""

import argparse
import json
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch

from benchmarks import _timing as timing
from mae_core import SIZES, MAEConfig
from pipeline.cluster.device import local_gpu_count
from pipeline.planning.footprint import autoencoder_size, footprint
from pipeline.training.engine.deepspeed_engine import Engine, MicroBatch
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.tasks import MAETask
from pipeline.training.world import World, enter_world

_GIB = 2**30
_SAMPLED_EVERY_S = 0.01
_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Precision, ZeRO stage, workers and batches of one measurement."""

    precision: Literal["bf16", "fp32"]
    zero_stage: Literal[1, 2, 3]
    workers: int = 1
    micro_batch: int = 2
    accumulation: int = 1
    activation_checkpointing: bool = False
    gradient_precision: Literal["bf16", "fp32"] | None = None

    def settings(self) -> EngineSettings:
        """Return the settings for the engine."""
        return EngineSettings(
            precision=self.precision,
            zero_stage=self.zero_stage,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            betas=(0.9, 0.95),
            activation_checkpointing=self.activation_checkpointing,
            gradient_precision=self.gradient_precision,
        )

    @property
    def name(self) -> str:
        """The layout in words, for the table."""
        recomputed = ", blocks recomputed" if self.activation_checkpointing else ""
        summed = f" summed in {self.gradient_precision}" if self.gradient_precision else ""
        batches = f"{self.workers} x {self.accumulation} x {self.micro_batch}"
        return f"{self.precision}{summed}, ZeRO-{self.zero_stage}, {batches}{recomputed}"


LAYOUTS = (
    Layout(precision="fp32", zero_stage=1),
    Layout(precision="fp32", zero_stage=2, workers=2),
    Layout(precision="fp32", zero_stage=3, workers=2),
    Layout(precision="fp32", zero_stage=1, workers=2, micro_batch=16),
    Layout(precision="fp32", zero_stage=1, workers=2, micro_batch=16, activation_checkpointing=True),
    Layout(precision="fp32", zero_stage=2, workers=2, accumulation=2),
    Layout(precision="bf16", zero_stage=1),
    Layout(precision="bf16", zero_stage=2, workers=2, micro_batch=1),
    Layout(precision="bf16", zero_stage=3, workers=2, micro_batch=1),
    Layout(precision="fp32", zero_stage=1, micro_batch=16),
    Layout(precision="fp32", zero_stage=1, workers=2, micro_batch=8, accumulation=2),
    Layout(precision="fp32", zero_stage=2, workers=2, micro_batch=24, activation_checkpointing=True),
    Layout(precision="fp32", zero_stage=3, workers=2, micro_batch=16),
    Layout(precision="bf16", zero_stage=1, micro_batch=4),
    Layout(precision="bf16", zero_stage=1, gradient_precision="fp32"),
    Layout(precision="bf16", zero_stage=2, workers=2, accumulation=2, gradient_precision="fp32"),
    Layout(precision="bf16", zero_stage=3, workers=2, gradient_precision="fp32"),
)
QUICK = (0, 1, 2)


def measured_bytes(layout: Layout, model: MAEConfig) -> int:
    """Train, and return the peak rise in bytes of the largest worker."""
    port = _free_port()
    with ProcessPoolExecutor(layout.workers, get_context("spawn")) as pool:
        workers = [pool.submit(_worker, rank, port, layout, model) for rank in range(layout.workers)]
        return max(worker.result() for worker in workers)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _worker(rank: int, port: int, layout: Layout, model: MAEConfig) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout.workers)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // layout.workers))
    world = enter_world(use_gpu=local_gpu_count() > 0)
    import deepspeed  # noqa: F401 - belongs to what every worker holds before it trains

    memory = _Memory(world)
    _train(world, layout, model)
    return memory.rise()


def _train(world: World, layout: Layout, model: MAEConfig) -> None:
    task = MAETask(model=model, weight_decay=0.05, seed=0)
    engine = Engine(*task.build(), layout.settings(), world)
    generator = torch.Generator().manual_seed(world.rank)
    batch = layout.micro_batch
    for _ in range(_STEPS):
        pixels = torch.randint(0, 256, (batch, *model.encoder.image_size, 3), dtype=torch.uint8, generator=generator)
        noise = torch.rand(batch, model.encoder.num_patches, generator=generator)
        one = MicroBatch((pixels.to(world.device), noise.to(world.device)), torch.ones(batch, device=world.device))
        images = batch * layout.accumulation * world.size
        engine.train_step([one] * layout.accumulation, global_batch=images, lr=1e-4)


class _Memory:
    """Watches the peak memory of this process, in a thread."""

    def __init__(self, world: World) -> None:
        self.device, self.peak, self.done = world.device, 0, threading.Event()
        self.before = self._now()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def rise(self) -> int:
        """Stop watching, and return the rise of the peak in bytes."""
        self.done.set()
        self.watcher.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        return self.peak - self.before

    def _watch(self) -> None:
        while not self.done.wait(_SAMPLED_EVERY_S):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def predicted_bytes(layout: Layout, model: MAEConfig) -> int:
    """Return the bytes that `mae plan` predicts for this device."""
    settings = layout.settings()
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    return footprint(autoencoder_size(model, settings), settings, workers=layout.workers, device=device).total


def measure(layouts: Sequence[Layout], model: MAEConfig) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    rows, line = [], []
    for layout in layouts:
        real, said = measured_bytes(layout, model), predicted_bytes(layout, model)
        rows.append((layout.name, f"{real / _GIB:.2f}", f"{said / _GIB:.2f}", f"{100 * (said / real - 1):+.1f} %"))
        line.append(asdict(layout) | {"held_gib": round(real / _GIB, 3), "foreseen_gib": round(said / _GIB, 3)})
    print(timing.table(("precision, stage, workers x micro-batches x images", "held", "foreseen", "off by"), rows))
    worst = max(abs(float(row["foreseen_gib"]) / float(row["held_gib"]) - 1) for row in line)
    return {"benchmark": "footprint", "worst_off_by": round(worst, 3), "layouts": line}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.footprint", description="Memory, predicted and measured."
    )
    parser.add_argument("--quick", action="store_true", help="three layouts")
    parser.add_argument("--model", choices=sorted(SIZES), default="base")
    options = parser.parse_args(arguments)
    layouts = [LAYOUTS[index] for index in QUICK] if options.quick else LAYOUTS
    print(json.dumps(measure(layouts, MAEConfig(encoder=SIZES[options.model]()))))


if __name__ == "__main__":
    main()
