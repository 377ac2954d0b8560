"""A worker's slice of the global batch, cut into the micro-batches that its engine takes."""

import torch
from torch import Tensor

from pipeline.training.engine.deepspeed_engine import MicroBatch
from pipeline.training.engine.settings import EngineSettings


def split(inputs: tuple[Tensor, ...], settings: EngineSettings, device: torch.device) -> list[MicroBatch]:
    """A worker's slice as exactly `accumulation` micro-batches; where samples run out, the first one stands in with weight 0."""
    held = len(inputs[0])
    indices = torch.arange(settings.micro_batch * settings.accumulation)
    weights = (indices < held).float()
    indices = torch.where(indices < held, indices, 0)
    if held == 0:
        inputs = tuple(torch.zeros(1, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    micro_batches = []
    for low in range(0, len(indices), settings.micro_batch):
        filled = int(weights[low : low + settings.micro_batch].sum())
        part = slice(low, low + max(1, filled))
        chosen = indices[part]
        micro_batches.append(
            MicroBatch(
                tuple(tensor[chosen].to(device, non_blocking=True) for tensor in inputs), weights[part].to(device)
            )
        )
    return micro_batches
