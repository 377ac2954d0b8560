"""Cuts a worker's part of the global batch into the micro-batches that its engine takes, and copies them to the device."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.feed.loader import Batch
from pipeline.training.engine.deepspeed_engine import MicroBatch
from pipeline.training.engine.settings import EngineSettings


class Copying(NamedTuple):
    """Micro-batches whose copy to the device may still be under way."""

    micro_batches: Sequence[MicroBatch]
    done: torch.cuda.Event | None
    """None on a CPU, where nothing is copied."""

    def ready(self) -> Sequence[MicroBatch]:
        """Return the micro-batches for use in the current stream, which waits for the copy; the host does not."""
        if self.done:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            for tensor in _tensors(self.micro_batches):
                tensor.record_stream(stream)  # or their memory would be reused while this stream still reads it
        return self.micro_batches


class Copier:
    """Copies to the device on a stream of its own, so that copies overlap with the step before. For one thread at a time."""

    def __init__(
        self, inputs_of: Callable[[Batch], tuple[Tensor, ...]], settings: EngineSettings, device: torch.device
    ) -> None:
        self.inputs_of, self.settings, self.device = inputs_of, settings, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, batch: Batch) -> Copying:
        """Start to copy a batch as micro-batches. Returns at once if it lies in pinned memory."""
        with torch.cuda.stream(self.stream):  # does nothing for None
            micro_batches = split(self.inputs_of(batch), self.settings, self.device)
            return Copying(micro_batches, self.stream.record_event() if self.stream else None)


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
        # Slices of pinned memory stay pinned, so these copies are only queued here.
        taken = tuple(tensor[part].to(device, non_blocking=True) for tensor in inputs)
        micro_batches.append(MicroBatch(taken, torch.full((max(1, filled),), float(filled > 0), device=device)))
    return micro_batches


def _tensors(micro_batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
    for inputs, weights in micro_batches:
        yield from (*inputs, weights)
