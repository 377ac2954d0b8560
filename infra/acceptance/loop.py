"""Images per second of the training loop on real photographs: `pipeline.training.loop.train`, one worker, ZeRO-1.

    python -m infra.acceptance.loop --model huge --batch 256 --images DIR
    python -m infra.acceptance.loop --quick                                # a small model

The photographs go through the real snapshot and shard stages. Steps are counted after a warm-up, which holds compilation
and the first fill of the read-ahead. No checkpoint is written: `benchmarks.checkpoint` times those.

Units:  images per second; mfu: share of the matrix product's peak in the same precision, measured in the same process;
        held_gib: peak of CUDA's allocator, foreseen_gib: what `mae plan` predicts for the device.
Errors: SystemExit for a folder without usable JPEGs."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import _data
from benchmarks import _timing as timing
from benchmarks.train_step import QUICK_BATCH, quick_config
from mae_core import SIZES, MAEConfig, training_flops
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.resources import Resources
from pipeline.data.images.decode_speed import cores
from pipeline.graph.receipts import claim
from pipeline.planning.footprint import autoencoder_size, footprint
from pipeline.tracking import NullTracker
from pipeline.training.health.stop_reasons import StopReason
from pipeline.training.loop.loop import train
from pipeline.training.meters.matmul_peak import matmul_peak
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import engine_settings
from pipeline.training.world import enter_world

MOST_PHOTOS = 300
_NEVER = 10**9


class _Timed(Exception):
    """The loop has been timed for long enough."""


class Stopwatch(NullTracker):
    """A tracker that times the steps after a warm-up and then leaves the loop, and a stop signal that never asks to stop."""

    def __init__(self, *, warmup_steps: int, seconds: float) -> None:
        self.warmup_steps, self.seconds = warmup_steps, seconds
        self.row: Mapping[str, float] = {}
        """The last row."""
        self.steps, self.elapsed_s = 0, 0.0
        """Timed so far."""
        self._began: tuple[int, float] | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the time. Leaves the loop with an exception: a stop that it agrees to would write a checkpoint of gigabytes."""
        self.row = metrics
        now = time.perf_counter()
        if self._began is None:
            self._began = (step, now) if step >= self.warmup_steps else None
            return
        self.steps, self.elapsed_s = step - self._began[0], now - self._began[1]
        if self.elapsed_s >= self.seconds:
            raise _Timed

    def stop_reason(self) -> StopReason:
        """Return no reason."""
        return ""


def config_of(model: str) -> MAEConfig:
    """Return the autoencoder of a named size, or a small one for `quick`."""
    return quick_config() if model == "quick" else MAEConfig(encoder=SIZES[model]())


def command_line(name: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line that the loop and the usual recipe share."""
    parser = argparse.ArgumentParser(prog=f"python -m infra.acceptance.{name}", description="Images per second.")
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=512, help="images per step, in one micro-batch")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs to use; default: generated ones")
    parser.add_argument("--warmup", type=int, default=24, help="steps before the timed ones")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long steps are timed")
    parser.add_argument("--quick", action="store_true", help="a small model for two seconds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.batch, options.warmup, options.seconds = "quick", QUICK_BATCH, 4, 2.0
    return options


def speed(options: argparse.Namespace, device: torch.device, *, steps: int, elapsed_s: float) -> dict[str, object]:
    """Return the keys that the loop's line and that of the usual recipe share. Measures the peak, which takes a second."""
    images_per_s = options.batch * steps / elapsed_s
    peak = matmul_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return {
        "device": timing.device_name(device),
        "model": options.model,
        "batch": options.batch,
        "timed_steps": steps,
        "images_per_s": round(images_per_s, 1),
        "mfu": round(training_flops(config_of(options.model)) * images_per_s / peak, 4),
        "matmul_tflops": round(peak / 1e12, 1),
    }


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Train, and return the JSON line."""
    world = enter_world(use_gpu=local_gpu_count() > 0)
    on_gpu = world.device.type == "cuda"
    model = config_of(options.model)
    recipe = Recipe(
        global_batch=options.batch,
        epochs=_NEVER,
        warmup_epochs=0.0,
        base_lr=1e-5,
        precision="bf16" if on_gpu else "fp32",
    )
    resources = Resources(
        micro_batch=options.batch,
        log_every_steps=4,
        checkpoint_every_steps=_NEVER,
        decode_workers=max(1, cores() - 1),  # a number, because `auto` is decided where Ray starts the workers
    )
    stopwatch = Stopwatch(warmup_steps=options.warmup, seconds=options.seconds)
    with TemporaryDirectory(prefix="mae-acceptance-") as name:
        root = Path(name)
        found = _data.chosen_photos(options, count=32 if options.quick else MOST_PHOTOS)
        dataset = _data.dataset(_data.write_files(found.files, root / "images"), root, shards=8)
        spec = _data.pretraining(model, recipe, resources, dataset, cache=root / "cache")
        attempt = _data.attempt(root / "pretrain")
        claim(attempt.root, continues="")
        with suppress(_Timed):
            train(spec, attempt, world=world, tracker=stopwatch, stop_signal=stopwatch)
    settings = engine_settings(recipe, resources, workers=1)
    foreseen = footprint(autoencoder_size(model, settings), settings, workers=1, device="cuda" if on_gpu else "cpu")
    held = stopwatch.row.get(
        "memory/device_gib"
    )  # a CPU's process holds imports too, which the foreseen bytes leave out
    return {
        "benchmark": "loop",
        **speed(options, world.device, steps=stopwatch.steps, elapsed_s=stopwatch.elapsed_s),
        "data_wait": round(stopwatch.row.get("throughput/data_wait_share", 0.0), 4),
        "held_gib": None if held is None else round(held, 2),
        "foreseen_gib": round(foreseen.total / 2**30, 2),
        "images": found.words,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    print(json.dumps(measure(command_line("loop", arguments))), flush=True)


if __name__ == "__main__":
    main()
