"""Timing of variants of a training step, in turns, so that a busy moment of the machine affects all of them.

Times are medians over rounds, ratios are taken within a round: both are robust on a machine that others use.
Units:  seconds, FLOP/s; an image is one sample of a batch.
Errors: a variant that cannot run (no compiler, no memory) is reported with its reason and left out of the
        comparison."""

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.training.meters.matmul_peak import matmul_peak, synchronise

Precision = Literal["float32", "bfloat16"]
DTYPES: Mapping[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Variant(NamedTuple):
    """One way to do a training step. `step` does one and returns its mean loss, still on the device."""

    name: str
    step: Callable[[], Tensor]


class Timed(NamedTuple):
    """The measurements of all rounds."""

    seconds: dict[str, list[float]]  # by variant: seconds per step, in every round
    losses: dict[str, float]  # by variant: the loss of the first step
    failed: dict[str, str]  # by variant: why it could not run
    peak: float  # FLOP/s of the best matrix product in all rounds


def device_name(device: torch.device) -> str:
    """Return the model name of the device, from the driver or /proc/cpuinfo."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the context for a forward pass: autocast for bfloat16, none for float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=DTYPES[precision])


def adamw(parameters: Iterable[nn.Parameter], *, kernel: Literal["fused", "foreach"] = "fused") -> torch.optim.AdamW:
    """Return AdamW with a learning rate of zero: a step costs as much as a real one, but the weights stay equal.

    Losses of variants can therefore be compared at any step. Raises torch's error if the device lacks the kernel. Betas and
    weight decay: arXiv 2111.06377, table 8.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    chosen = {"fused": True} if kernel == "fused" else {"foreach": True}
    return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, **chosen)


def training_step(
    loss: Callable[[], Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    precision: Precision,
) -> Callable[[], Tensor]:
    """Return a function that does a whole step (forward under autocast, backward, optimiser) and returns the mean loss."""

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step


def seconds_of(action: Callable[[], object], *, times: int, device: torch.device) -> float:
    """Return the mean seconds of an action repeated `times` times."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    synchronise(device)
    return (time.perf_counter() - start) / times


def take_turns(
    variants: Sequence[Variant],
    *,
    rounds: int,
    steps: int,
    device: torch.device,
    precision: Precision,
    warmup: int = 2,
) -> Timed:
    """Time variants in the order A B C, A B C, ...: `steps` steps each per round, after `warmup` untimed ones.

    The matrix product takes its turn too, so that its peak is measured on a machine as hot and as busy as the steps found it.
    A variant that raises RuntimeError during its warm-up (no memory, no compiler) is left out.
    """
    losses: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, step in variants:
        try:
            losses[name] = float(step())
            for _ in range(warmup - 1):
                step()
        except RuntimeError as error:  # out of memory, no compiler: both are RuntimeErrors
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    running = [variant for variant in variants if variant.name not in failed]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in running}
    peak = 0.0
    for _ in range(rounds):
        for name, step in running:
            seconds[name].append(seconds_of(step, times=steps, device=device))
        sides, many = ((4096, 8192, 16384), 20) if device.type == "cuda" else ((1024, 2048), 2)
        peak = max(peak, matmul_peak(device, DTYPES[precision], sides=sides, times=many))
    return Timed(seconds, losses, failed, peak)


def speed_ratio(seconds: Mapping[str, Sequence[float]], *, of: str, over: str) -> float | None:
    """Return how many times as fast `of` is as `over` (the median of the ratios per round), or None if one was not timed."""
    if of not in seconds or over not in seconds:
        return None
    return median(theirs / ours for ours, theirs in zip(seconds[of], seconds[over], strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align rows in columns: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def shown(value: float | None, form: str = ".2f") -> str:
    """Format a number for a table, or a dash if there is none."""
    return "–" if value is None else format(value, form)
