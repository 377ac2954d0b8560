"""Times side by side: variants of a training step take turns, so that a busy moment falls on all of them.

Units:  seconds, FLOP/s; an image is one sample of a batch.
Errors: a variant that cannot run (no compiler, no memory) is reported with its reason and leaves the comparison.
Source: median of rounds, ratios within a round: robust to a machine that others use."""

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
    """A way to do a training step; `step` does one and gives its mean loss, still on the device."""

    name: str
    step: Callable[[], Tensor]


class Timed(NamedTuple):
    """What turns on the machine gave."""

    seconds: dict[str, list[float]]  # by variant, a step's seconds in every round
    losses: dict[str, float]  # by variant, after the first step
    failed: dict[str, str]  # by variant, why it has no seconds
    peak: float  # FLOP/s of the best matrix product of all rounds


def device_name(device: torch.device) -> str:
    """What a reader calls this device. Errors: none. Source: the driver, or /proc/cpuinfo."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context of a forward pass: nothing for float32, autocast for bfloat16. Errors: none. Source: none."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=DTYPES[precision])


def adamw(parameters: Iterable[nn.Parameter], *, kernel: Literal["fused", "foreach"] = "fused") -> torch.optim.AdamW:
    """AdamW with a rate of zero: the work of a real step, and weights that stay equal, so that losses can be compared.

    Errors: torch's, where a device has no such kernel. Source: betas and decay of arXiv 2111.06377, table 8.
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
    """A whole step: forward under autocast, backward, optimiser. `loss` gives the mean loss of the batch.

    Errors: none of its own. Source: none.
    """

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    return step


def seconds_of(action: Callable[[], object], *, times: int, device: torch.device) -> float:
    """Mean seconds of an action done `times` times in a row. Errors: none. Source: none."""
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
    """Time variants A B C, A B C, ...: `steps` steps each in each of `rounds` rounds, after `warmup` untimed ones.

    The matrix product has its turn too, so that the peak is that of a machine as hot and as busy as the steps found it.
    Errors: a RuntimeError of a variant in its warm-up (memory, compiler) takes it out. Source: none.
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
    """How many times faster `of` is than `over`: the median of the rounds' own ratios; None where one was not timed.

    Errors: none. Source: none.
    """
    if of not in seconds or over not in seconds:
        return None
    return median(theirs / ours for ours, theirs in zip(seconds[of], seconds[over], strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as what is in them, the first to the left, numbers to the right. Errors: none. Source: none."""
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
    """A number for a table, a dash where there is none. Errors: none. Source: none."""
    return "–" if value is None else format(value, form)
