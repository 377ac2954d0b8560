"""A device's peak throughput: its fastest square matrix product, to which model FLOPs utilisation (MFU) refers.

It is measured, because data sheets state clocks that a card does not sustain. Units: FLOP/s, 2 FLOPs per multiply-add."""

import time
from collections.abc import Mapping, Sequence

import torch

SIDES: Mapping[str, Sequence[int]] = {"cuda": (4096, 8192), "cpu": (256, 512, 1024)}
"""Sides of the square matrices that show within a second what a device can do."""
LONG_S = 0.2
"""No larger product is tried after one that takes longer: bfloat16 on a CPU without instructions for it."""


def matmul_peak(device: torch.device, dtype: torch.dtype, *, sides: Sequence[int] = (), times: int = 0) -> float:
    """Return the FLOP/s of the fastest square matrix product.

    Without `sides` and `times` (products timed in a row, repeated three times) measuring takes about a second. A CPU without
    bfloat16 instructions computes bfloat16 in float32, and at best as fast, so the faster of the two counts on a CPU.
    """
    best = 0.0
    if device.type == "cpu" and dtype != torch.float32:
        best = matmul_peak(device, torch.float32, sides=sides, times=times)
    for side in sides or SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        # Defaults bind this round's matrices; a closure would see those of the next one.
        def product(
            count: int, left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out
        ) -> float:
            synchronise(device)
            start = time.perf_counter()
            for _ in range(count):
                torch.matmul(left, right, out=out)
            synchronise(device)
            return (time.perf_counter() - start) / count

        product(1)  # untimed: the first call loads kernels and allocates workspace
        # The fastest of three: other load can only slow a product down. On CUDA ten in a row hide the launch.
        fastest = min(product(times or (10 if device.type == "cuda" else 1)) for _ in range(3))
        best = max(best, 2 * side**3 / fastest)
        if not sides and fastest > LONG_S:
            break
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
