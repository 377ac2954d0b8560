"""What this device does at most: the best square matrix product, which a step's share of use (MFU) refers to.

Units: FLOP/s, 2 a multiply-add. Errors: none. Source: measured, since data sheets state clocks that a card does not hold."""

import time
from collections.abc import Mapping, Sequence

import torch

SIDES: Mapping[str, Sequence[int]] = {"cuda": (4096, 8192), "cpu": (256, 512, 1024)}
"""Sides of square matrices that show in a second what a device can do."""
LONG_S = 0.2
"""A product that takes longer is the last: bfloat16 on a CPU without instructions for it."""


def matmul_peak(device: torch.device, dtype: torch.dtype, *, sides: Sequence[int] = (), times: int = 0) -> float:
    """FLOP/s of the best square matrix product: the peak that a step's share of use (MFU) refers to.

    `sides`, `times` (products timed in a row, three times over): left out, so many as take about a second. A CPU without
    instructions for bfloat16 computes it by float32's, as fast as those at best: of a CPU's rates the larger one counts.
    Errors: none. Source: measured, since data sheets state clocks that a card does not hold.
    """
    best = 0.0
    if device.type == "cpu" and dtype != torch.float32:
        best = matmul_peak(device, torch.float32, sides=sides, times=times)
    for side in sides or SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def product(
            count: int, left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out
        ) -> float:
            synchronise(device)
            start = time.perf_counter()
            for _ in range(count):
                torch.matmul(left, right, out=out)
            synchronise(device)
            return (time.perf_counter() - start) / count

        product(1)
        fastest = min(product(times or (10 if device.type == "cuda" else 1)) for _ in range(3))
        best = max(best, 2 * side**3 / fastest)
        if not sides and fastest > LONG_S:
            break
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told. Errors: none. Source: none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
