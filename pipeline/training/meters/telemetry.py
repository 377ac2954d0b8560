"""Where a training's time goes: images/s, MFU, waits, memory, the slowest rank. One row serves history, MLflow and progress line.

MFU (model FLOPs utilisation) is the FLOPs that the model needs for the images trained on, without recomputation, divided by
what all workers could have done: their number times the matrix-product peak of the slowest one, measured at the start in the
compute precision. A row costs collectives at logged steps and none in between. Units: seconds, GiB; shares in [0, 1]."""

import functools
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.data.feed.loader import Loader
from pipeline.tracking import Point
from pipeline.training.checkpoints.position import Position
from pipeline.training.meters.data_meter import DATA_METRICS, DataMeter
from pipeline.training.meters.matmul_peak import matmul_peak, synchronise
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import World

METRICS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "images": "train/images_seen",
    "skipped_steps": "train/skipped_steps",
    "stepped_over": "train/stepped_over_steps",
    "images_per_s": "throughput/images_per_s",
    "mfu": "throughput/mfu",
    "checkpoint_wait": "throughput/checkpoint_wait_share",  # share of the time since the last row, mean over workers
    "slowest_rank": "throughput/slowest_rank",  # by forward passes, which wait for no other rank (except for weights at ZeRO-3)
    "slowest_excess": "throughput/slowest_rank_excess",  # how much longer its passes took than the median, as a share of that
    "process_gib": "memory/process_gib",  # peak resident memory of the largest worker
    "device_gib": "memory/device_gib",  # peak that torch allocated on a worker's GPU
    **DATA_METRICS,
}
"""Names in the history and in MLflow."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class WorkerReading(NamedTuple):
    """What one worker measured since the last row."""

    forward_s: float
    checkpoint_s: float
    process_bytes: float
    device_bytes: float


class TrainingMeter:
    """Measures between one row and the next. Close it before the module is used for anything but training."""

    def __init__(self, spec: TrainSpec, loader: Loader, module: nn.Module, world: World, global_step: int) -> None:
        self.global_batch, self.samples = spec.recipe.global_batch, loader.order.samples_per_epoch
        self.world, self.data = world, DataMeter(loader)
        self.forward = ForwardClock(module, world.device)
        self.flops = spec.task.training_flops()
        # The slowest device counts for all, because every step waits for it.
        self.peak = world.size * min(world.all_gather(_peak(world.device, DTYPES[spec.recipe.precision])))
        self.begin(global_step)

    def begin(self, global_step: int) -> None:
        """Start the interval of the next row here: at the start, and after a rollback."""
        self.step, self.time, self.checkpoint_s = global_step, time.monotonic(), 0.0

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time what the loop does for a checkpoint while training waits."""
        began = time.monotonic()
        yield
        self.checkpoint_s += time.monotonic() - began

    def row(self, position: Position, *, lr: float) -> dict[str, float]:
        """Return the row to log at this position; `lr` is that of the last step. Collective."""
        now, guard = time.monotonic(), position.guard
        elapsed, steps = max(now - self.time, 1e-9), position.global_step - self.step  # two rows at the same instant
        images = position.global_step * self.global_batch
        data = self.data.row(
            self.world,
            elapsed=elapsed,
            steps=steps,
            images=images,
            new_images=steps * self.global_batch,
            substitutions=position.substitutions,
            skipped_images=[
                (first * self.global_batch, last * self.global_batch) for first, last in guard.stepped_over
            ],
        )
        everyone = self.world.all_gather(
            WorkerReading(self.forward.take(), self.checkpoint_s, *memory(self.world.device))
        )
        self.begin(position.global_step)
        images_per_s = steps * self.global_batch / elapsed
        return {
            "step": position.global_step,
            "time": time.time(),
            "images": images,
            "epoch": images / self.samples,
            "loss": position.loss,
            "lr": lr,
            "grad_norm": position.grad_norm,
            "skipped_steps": len(guard.skipped),
            "stepped_over": guard.untrained_before(position.global_step),
            "images_per_s": images_per_s,
            "mfu": images_per_s * self.flops / self.peak,
            **data,
            **over_workers(everyone, elapsed=elapsed),
        }

    def close(self) -> None:
        """Remove the clock from the module."""
        self.forward.close()


def over_workers(everyone: Sequence[WorkerReading], *, elapsed: float) -> dict[str, float]:
    """Combine the workers' own measurements into columns of a row."""
    row = {
        "checkpoint_wait": sum(own.checkpoint_s for own in everyone) / len(everyone) / elapsed,
        "process_gib": max(own.process_bytes for own in everyone) / 2**30,
    }
    if device := max(own.device_bytes for own in everyone):
        row["device_gib"] = device / 2**30
    seconds = [own.forward_s for own in everyone]
    # Forward passes alone: a backward pass waits in collectives for the slowest rank, so all take equally long.
    if len(everyone) > 1 and (middle := median(seconds)) > 0:
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        row |= {"slowest_rank": rank, "slowest_excess": seconds[rank] / middle - 1}
    return row


def as_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row under its names in MLflow."""
    return {METRICS[key]: value for key, value in row.items() if key in METRICS}


def as_points(history: Sequence[Mapping[str, float]]) -> list[Point]:
    """Return the rows of a checkpoint's history as tracker points. Rows of old checkpoints have no time and get the current one."""
    now = time.time()
    return [Point(int(row["step"]), int(1000 * row.get("time", now)), as_metrics(row)) for row in history]


def progress_fields(row: Mapping[str, float]) -> dict[str, float]:
    """Return what the progress line shows of a row. Signs of trouble appear only when there is trouble."""
    line = {"loss": row["loss"]}
    if row["substitutions"]:
        line["substituted"] = row["substitutions"]
    if row["decode_restarts"]:
        line["decoders restarted"] = row["decode_restarts"]
    if lost := row["skipped_steps"] + row["stepped_over"]:
        line["lost steps"] = lost
    line |= {"wait": round(row["data_wait"], 2), "mfu": round(row["mfu"], 3)}
    if row["checkpoint_wait"] >= 0.01:
        line["saving"] = round(row["checkpoint_wait"], 2)
    if row.get("slowest_excess", 0) >= 0.1:
        line |= {"slow rank": row["slowest_rank"], "by": round(row["slowest_excess"], 2)}
    line["GiB"] = round(row.get("device_gib", row["process_gib"]), 1)
    return {**line, "images_per_s": row["images_per_s"]}


class ForwardClock:
    """Measures the seconds that a module's forward passes take; on CUDA with events, so that the host need not wait."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._hooks = [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def _now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            return event
        return time.perf_counter()

    def _begin(self, *_: object) -> None:
        self._began = self._now()

    def _end(self, *_: object) -> None:
        self._spans.append((self._began, self._now()))

    def take(self) -> float:
        """Return the seconds since the last call."""
        # Events can be read only once the device has passed them: the one wait per row.
        synchronise(self.device)
        spans, self._spans = self._spans, []
        if self.device.type == "cuda":
            return math.fsum(began.elapsed_time(ended) for began, ended in spans) / 1000  # milliseconds
        return math.fsum(ended - began for began, ended in spans)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def memory(device: torch.device) -> tuple[float, float]:
    """Return peak bytes: resident in this process, and allocated by torch on its GPU (0 without one)."""
    resident = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
    return resident, float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


@functools.cache
def _peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's peak; measured once per process, because it takes about a second."""
    return matmul_peak(device, dtype)
