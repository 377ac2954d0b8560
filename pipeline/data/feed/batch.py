"""A batch of training samples, and how its tensors lie in one block of memory.

One block, so that a decode worker opens a single thing and pinning is a single copy.
Letters: b samples of this rank, H x W pixels, N whatever shape a task's noise has."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.feed.substitution import Substitution

Int64s = npt.NDArray[np.int64]
Noise = Callable[[Int64s, Int64s], npt.NDArray[np.float32]]
"""(epochs [b], sample ids [b]) -> the task's random numbers [b, *N], a row per sample that depends on no other row."""
NO_NOISE = torch.empty(0, 0)


class Batch(NamedTuple):
    """One rank's samples of one step."""

    images: Tensor  # [b, H, W, 3] uint8
    labels: Tensor  # [b] int64, index into the manifest's classes; -1 = none
    sample_ids: Tensor  # [b] int64, of the samples in the batch
    epochs: Tensor  # [b] int64, of the order; 0 in evaluation
    substitutions: tuple[Substitution, ...] = ()  # samples that the order asked for and that the batch lacks
    noise: Tensor = NO_NOISE  # [b, *N] float32, what the task draws for each sample


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """Where a batch's tensors lie in a block of bytes: int64 columns first, because they must be aligned."""

    image_size: tuple[int, int]
    noise_shape: tuple[int, ...]
    """N."""

    @property
    def bytes_per_sample(self) -> int:
        """Size of one sample in the block."""
        height, width = self.image_size
        return 3 * 8 + 4 * math.prod(self.noise_shape) + height * width * 3

    def tensors(self, block: Tensor) -> Batch:
        """Return a batch whose tensors are views of a uint8 block of a whole number of samples."""
        count = len(block) // self.bytes_per_sample
        rest = block
        columns = []
        for dtype, shape in (
            *[(torch.int64, (count,))] * 3,
            (torch.float32, (count, *self.noise_shape)),
            (torch.uint8, (count, *self.image_size, 3)),
        ):
            size = math.prod(shape) * dtype.itemsize
            columns.append(rest[:size].view(dtype).reshape(shape))
            rest = rest[size:]
        labels, sample_ids, epochs, noise, images = columns
        return Batch(images, labels, sample_ids, epochs, noise=noise)
