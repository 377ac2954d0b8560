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
    count = len(inputs[0])
    # Sized by the largest worker's part, which is what `accumulation` is derived from.
    indices = torch.arange(settings.micro_batch * settings.accumulation)
    weights = (indices < count).float()
    indices = torch.where(indices < count, indices, 0)
    if count == 0:
        # A zero image has a finite loss, so that 0 * loss is 0 and not NaN.
        inputs = tuple(torch.zeros(1, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    micro_batches = []
    for low in range(0, len(indices), settings.micro_batch):
        # A last micro-batch that is only partly filled is cut short: one padding sample is enough for an empty one.
        filled = int(weights[low : low + settings.micro_batch].sum())
        part = slice(low, low + max(1, filled))
        chosen = indices[part]
        micro_batches.append(
            # `tensor[chosen]` is a copy in ordinary memory: on CUDA it does not overlap, although the batch is pinned.
            MicroBatch(
                tuple(tensor[chosen].to(device, non_blocking=True) for tensor in inputs), weights[part].to(device)
            )
        )
    return micro_batches
