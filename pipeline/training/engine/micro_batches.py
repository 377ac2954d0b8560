"""Cuts a worker's part of the global batch into the micro-batches that its engine takes."""

import torch
from torch import Tensor

from pipeline.training.engine.deepspeed_engine import MicroBatch
from pipeline.training.engine.settings import EngineSettings


def split(inputs: tuple[Tensor, ...], settings: EngineSettings, device: torch.device) -> list[MicroBatch]:
    """Return a worker's samples as exactly `accumulation` micro-batches on the device.

    Every worker must run the same number of forward passes, because gradients are reduced collectively. Where samples run out,
    the first sample is repeated with weight 0; a worker without any sample gets zeros.
    """
    count, size = len(inputs[0]), settings.micro_batch
    if count == 0:
        # A zero image has a finite loss, so that 0 * loss is 0 and not NaN.
        inputs = tuple(torch.zeros(1, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    micro_batches = []
    for low in range(0, size * settings.accumulation, size):
        # A last micro-batch that is only partly filled is cut short: one padding sample is enough for an empty one.
        filled = max(0, min(size, count - low))
        part = slice(low, low + filled) if filled else slice(0, 1)
        # Slices of pinned memory stay pinned, so these copies queue behind the step before instead of waiting for it.
        taken = tuple(tensor[part].to(device, non_blocking=True) for tensor in inputs)
        micro_batches.append(MicroBatch(taken, torch.full((max(1, filled),), float(filled > 0), device=device)))
    return micro_batches
