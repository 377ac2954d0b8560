"""Ways to run the same training step, timed in turns: compilation, attention kernels, precision of float32 products.

    python -m benchmarks.step_variants --model large --batch 256 --budget 50    # on a GPU, within 90 s
    python -m benchmarks.step_variants --quick                     # a small model on a CPU, nothing compiled

On CUDA every way has bf16 weights of which AdamW moves float32 copies, as in the engine, except for fp32 and tf32, which have
float32 weights. On a CPU all weights are float32, and tf32 computes as fp32 does. Attention kernels are forced in an eager
model: the difference from `eager` is that of attention. Every way has the same weights and batch, and its loss is checked.

A way that cannot run, that would begin after --budget seconds, or whose first step takes until 25 s after them, is left out with
its reason. Prints a table and one JSON line.

Units:  images per second, medians over rounds; mfu: share of the peak of the matrix product, in bf16 on CUDA.
Errors: SystemExit if losses differ or the eager step cannot run."""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import _timing as timing
from benchmarks.train_step import (
    CPU_BATCH,
    LOSS_TOLERANCE,
    QUICK_BATCH,
    Way,
    bf16_twin,
    by_block,
    check_near,
    loss_of,
    quick_config,
    rounded,
)
from mae_core import SIZES, MAEConfig, MaskedAutoencoder, training_flops

EAGER = "eager"
AUTOTUNED = "max-autotune-no-cudagraphs"
ATTENTION = {
    "attention by cudnn": SDPBackend.CUDNN_ATTENTION,
    "attention by flash": SDPBackend.FLASH_ATTENTION,
    "attention by efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GPU_BATCH = 256
GRACE_S = 25.0
"""How long after the budget a first step, which compiles, may last."""


class _Late(BaseException):
    """No Exception, because autotuning takes those for a kernel that does not work, and goes on."""


@contextmanager
def _cut_off(at: float) -> Iterator[None]:
    """Raise RuntimeError if what runs inside lasts until this time of the monotonic clock."""

    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    if math.isfinite(at):
        signal.setitimer(signal.ITIMER_REAL, max(0.001, at - time.monotonic()))
    try:
        yield
    except _Late:
        raise RuntimeError("its first step was cut off") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def ways(model: MaskedAutoencoder, *, compiled: bool) -> Iterator[Way]:
    """Yield every way; those that take longest to begin come last."""
    on_gpu = next(model.parameters()).is_cuda
    of_float32 = timing.adamw(model.parameters())
    trained, optimizer = bf16_twin(model) if on_gpu else (model, of_float32)
    yield Way(EAGER, loss_of(trained), optimizer)
    for name, kernel in ATTENTION.items():
        yield Way(name, partial(_with_attention, kernel, trained), optimizer)
    yield Way("tf32", loss_of(model), of_float32)
    yield Way("fp32", loss_of(model), of_float32)
    if not compiled:
        return
    yield Way("compiled by block", loss_of(by_block(trained)), optimizer)
    twin = by_block(trained)
    twin.losses = torch.compile(twin.losses, dynamic=False)  # type: ignore[method-assign]
    yield Way("compiled by block, loss too", loss_of(twin), optimizer)
    yield Way(f"compiled by block, {AUTOTUNED}", loss_of(by_block(trained, mode=AUTOTUNED)), optimizer)


def _with_attention(kernel: SDPBackend, model: MaskedAutoencoder, pixels: Tensor, noise: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return loss_of(model)(pixels, noise)


def _step(way: Way, pixels: Tensor, noise: Tensor, *, ends: float) -> Callable[[], Tensor]:
    """Return the step of a way. Its first one raises RuntimeError if it begins after `ends` or lasts too long."""
    step = timing.training_step(
        partial(way.loss, pixels, noise), optimizer=way.optimizer, device=pixels.device, precision="float32"
    )
    begun = way.name == EAGER

    def in_time() -> Tensor:
        nonlocal begun
        if not begun:
            if time.monotonic() > ends:
                raise RuntimeError("no time was left to begin it")
            begun = True
            with _cut_off(ends + GRACE_S):
                return run()
        return run()

    def run() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if way.name == "tf32" and pixels.is_cuda else "highest")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(before)

    return in_time


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Time every way, print the table and return the JSON line."""
    ends = time.monotonic() + options.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    config = quick_config() if options.quick else MAEConfig(encoder=SIZES[options.model]())
    batch = options.batch or (QUICK_BATCH if options.quick else GPU_BATCH if on_gpu else CPU_BATCH)
    generator = torch.Generator(device).manual_seed(0)
    model = MaskedAutoencoder(config, generator=generator).to(device)
    pixels = torch.randn(batch, 3, *config.encoder.image_size, device=device, generator=generator)
    noise = torch.rand(batch, config.encoder.num_patches, device=device, generator=generator)

    precision: timing.Precision = "bfloat16" if on_gpu else "float32"
    steps = 3 if on_gpu else 1
    found = list(ways(model, compiled=not options.quick))
    variants = [timing.Variant(way.name, _step(way, pixels, noise, ends=ends)) for way in found]
    timed = timing.take_turns(variants, rounds=2, steps=steps, device=device, precision=precision)
    if EAGER in timed.failed:
        raise SystemExit(f"{EAGER} cannot run: {timed.failed[EAGER]}; try a smaller --batch")
    for name, loss in timed.losses.items():
        check_near(name, loss, timed.losses[EAGER], LOSS_TOLERANCE[precision])
    speed = {name: batch / median(seconds) for name, seconds in timed.seconds.items()}
    share = training_flops(config) / timed.peak
    rows = [
        (way.name, timing.shown(speed.get(way.name), ".1f"), _share_or_reason(timed, way.name, speed, share))
        for way in found
    ]
    print(timing.table(("variant", "images/s", "of the peak"), rows))
    return {
        "benchmark": "step_variants",
        "device": timing.device_name(device),
        "model": "quick" if options.quick else options.model,
        "batch": batch,
        "precision": precision,
        "matmul_tflops": rounded(timed.peak / 1e12),
        "images_per_s": {name: rounded(value) for name, value in speed.items()},
        "mfu": {name: rounded(value * share) for name, value in speed.items()},
        "left_out": timed.failed,
    }


def _share_or_reason(timed: timing.Timed, name: str, speed: dict[str, float], share: float) -> str:
    return f"{100 * share * speed[name]:.1f} %" if name in speed else timed.failed[name]


def command_line(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_variants", description="Ways to run a step.")
    parser.add_argument("--quick", action="store_true", help="a small model, nothing compiled")
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument(
        "--batch", type=int, help=f"images per step; default: {GPU_BATCH} on CUDA, {CPU_BATCH} on a CPU"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no other way is begun")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    # the ways hold memory of different sizes
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    print(json.dumps(measure(command_line(arguments))), flush=True)


if __name__ == "__main__":
    main()
