"""Where a training's time goes: images/s, MFU, waits, memory, the slowest rank. One row serves history, MLflow and progress line.

MFU (model FLOPs utilisation) is the FLOPs that the model needs for the images trained on, without recomputation, divided by
what all workers could have done: their number times the matrix-product peak of the slowest one, measured at the start in the
compute precision. A row costs collectives at logged steps and none in between, and never waits for a GPU: events of its steps
are read when it has passed them. Units: seconds, GiB; shares in [0, 1]."""

import functools
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.data.feed.step_feed import Feed
from pipeline.tracking import Point
from pipeline.training.checkpoints.position import Position
from pipeline.training.meters.data_meter import DATA_METRICS, DataMeter
from pipeline.training.meters.matmul_peak import matmul_peak
from pipeline.training.meters.step_clocks import GpuClock, GpuTimes, Phase, PhaseClock, compile_seconds
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
    "workers": "throughput/workers",
    "checkpoint_wait": "throughput/checkpoint_wait_share",  # share of the time since the last row, mean over workers
    "agree_wait": "throughput/agree_wait_share",  # of the loop's thread, in collectives on the CPU; mean over workers
    "gpu_busy": "throughput/gpu_busy_share",  # passes and optimiser, by events; gaps between kernels count as busy; GPUs only
    "host_bound": "throughput/host_bound_share",  # the GPU has nothing queued; on a CPU, the loop's thread is in no phase
    "copy_wait": "throughput/copy_wait_share",  # the GPU waits for micro-batches to be copied; GPUs only
    "exchange": "throughput/exchange_share",  # by which passes exceed what a forward pass foretells; several workers only
    "compiling": "throughput/compile_share",  # torch.compile, mean over workers; absent where nothing compiles
    "slowest_rank": "throughput/slowest_rank",  # by forward passes, which wait for no other rank (except for weights at ZeRO-3)
    "slowest_excess": "throughput/slowest_rank_excess",  # how much longer its passes took than the median, as a share of that
    "process_gib": "memory/process_gib",  # peak resident memory of the largest worker
    "device_gib": "memory/device_gib",  # peak that torch allocated on a worker's GPU
    **DATA_METRICS,
    "milestone_images": "milestone/images_seen",  # of the checkpoint that the other milestone scores belong to
    "milestone_held_out_loss": "milestone/held_out_loss",
    "milestone_knn": "milestone/knn_top1",
    "milestone_ridge": "milestone/ridge_top1",
    "milestone_probe": "milestone/probe_top1",
    "milestone_rankme": "milestone/rankme",
    "milestones_dropped": "milestone/dropped",  # checkpoints that were overtaken before they could be scored
}
"""Names in the history and in MLflow."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


class WorkerReading(NamedTuple):
    """What one worker measured since the last row."""

    forward_s: float
    checkpoint_s: float
    process_bytes: float
    device_bytes: float
    phases: Mapping[Phase, float] = MappingProxyType({})
    compile_s: float = 0.0
    gpu: GpuTimes | None = None


class TrainingMeter:
    """Measures between one row and the next. Close it before the module is used for anything but training."""

    def __init__(
        self,
        spec: TrainSpec,
        feed: Feed[Any],
        module: nn.Module,
        world: World,
        global_step: int,
        *,
        phases: PhaseClock,
        gpu: GpuClock,
    ) -> None:
        self.global_batch, self.samples = spec.recipe.global_batch, feed.loader.order.samples_per_epoch
        self.world, self.data = world, DataMeter(feed)
        self.forward, self.phases, self.gpu = ForwardClock(module, world.device), phases, gpu
        # Forward passes that a step's passes take: a backward pass costs two, and recomputation one more.
        self.passes = 4 if spec.resources.activation_checkpointing else 3
        self.compiled_s = compile_seconds()
        self.flops = spec.task.training_flops()
        # The slowest device counts for all, because every step waits for it.
        self.peak = world.size * min(world.all_gather(_peak(world.device, spec.recipe.precision)))
        self.begin(global_step)

    def begin(self, global_step: int) -> None:
        """Start the interval of the next row here: at the start, and after a rollback."""
        self.step, self.time, self.checkpoint_s = global_step, time.monotonic(), 0.0
        self.phases.take()

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
        everyone = self.world.all_gather(self._reading())
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
            "workers": self.world.size,
            **data,
            **over_workers(everyone, elapsed=elapsed),
            **time_shares(everyone, elapsed=elapsed, passes=self.passes),
        }

    def _reading(self) -> WorkerReading:
        before, self.compiled_s = self.compiled_s, compile_seconds()
        return WorkerReading(
            self.forward.take(),
            self.checkpoint_s,
            *memory(self.world.device),
            self.phases.take(),
            self.compiled_s - before,
            self.gpu.take(),
        )

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


def time_shares(everyone: Sequence[WorkerReading], *, elapsed: float, passes: int) -> dict[str, float]:
    """Return what the workers' time went into, as shares of a row: means over workers. What was not measured is absent.

    `passes`: how many forward passes' time a step's forward and backward passes take on a worker that is alone.
    """
    row = {"agree_wait": fmean(own.phases.get("agree", 0.0) for own in everyone) / elapsed}
    if any(own.compile_s for own in everyone):
        row["compiling"] = fmean(own.compile_s for own in everyone) / elapsed
    if gpus := [own.gpu for own in everyone if own.gpu]:
        row["gpu_busy"] = fmean(gpu.busy for gpu in gpus)
        row["copy_wait"] = fmean(gpu.copies_s / gpu.all_s for gpu in gpus)
        row["host_bound"] = fmean(gpu.host_bound for gpu in gpus)
    elif everyone[0].phases:
        row["host_bound"] = fmean(max(0.0, 1 - sum(own.phases.values()) / elapsed) for own in everyone)
    if len(everyone) > 1:
        taken = ((own.gpu.passes_s, own.gpu.all_s) if own.gpu else (_passes_s(own), elapsed) for own in everyone)
        excesses = [(all_s, took - passes * own.forward_s) for own, (took, all_s) in zip(everyone, taken, strict=True)]
        row["exchange"] = fmean(max(0.0, excess) / all_s for all_s, excess in excesses)
    return row


def _passes_s(own: WorkerReading) -> float:
    return own.phases.get("forward", 0.0) + own.phases.get("backward", 0.0)


def milestone_columns(scores: Mapping[str, float], *, global_batch: int) -> dict[str, float]:
    """Return the columns of what milestones made known, at the images seen by the checkpoint that was scored."""
    columns = {f"milestone_{name}": value for name, value in scores.items() if name not in ("step", "dropped")}
    if "step" in scores:
        columns["milestone_images"] = scores["step"] * global_batch
    if "dropped" in scores:
        columns["milestones_dropped"] = scores["dropped"]
    return columns


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
    for name in ("knn", "probe", "held_out_loss"):
        if f"milestone_{name}" in row:
            line[name.replace("_", " ")] = round(row[f"milestone_{name}"], 3)
    line |= {"wait": round(row["data_wait"], 2), "mfu": round(row["mfu"], 3)}
    if "gpu_busy" in row:
        line["gpu busy"] = round(row["gpu_busy"], 2)
    for name, key in {
        "host": "host_bound",
        "copies": "copy_wait",
        "agree": "agree_wait",
        "compiling": "compiling",
    }.items():
        if row.get(key, 0) >= 0.1:
            line[name] = round(row[key], 2)
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
        self._paused = False
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
        if not self._paused:
            self._spans.append((self._began, self._now()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the passes in the body."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take(self) -> float:
        """Return the seconds since the last call."""
        spans, self._spans = self._spans, []
        if self.device.type == "cuda":
            # Events can be read only once the device has passed them. Those of the last step it has: `Engine.measured` waited.
            self._spans = [span for span in spans if not span[1].query()]
            ready = [span for span in spans if span not in self._spans]
            return math.fsum(began.elapsed_time(ended) for began, ended in ready) / 1000  # milliseconds
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
def _peak(device: torch.device, precision: str) -> float:
    """Return the device's peak; measured once per process and precision, because it takes about a second.

    `float32_products` has set what float32 products are.
    """
    return matmul_peak(device, DTYPES[precision])
