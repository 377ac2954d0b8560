"""BatchNorm without scale and shift, by the statistics of a global batch that is cut over micro-batches and ranks.

torch's BatchNorm sees one micro-batch of one rank, and its SyncBatchNorm one micro-batch of all ranks, on GPUs only. Here the
caller shows the norm every part of the global batch first (`observe`), and then normalises the parts one by one. Sums are taken
in float64, so that any cut gives the same statistics up to rounding in float32.

Shapes: features [b, D] or tokens [b, T, D] of b samples; weights [b] is 1 for a sample and 0 for padding.

Source: Ioffe and Szegedy 2015, arXiv 1502.03167; momentum and the unbiased running variance are torch.nn.BatchNorm1d's."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOMENTUM = 0.1
"""Share of the running statistics that an update replaces, torch's default."""
Share = Callable[[Tensor], object]
"""Replaces a tensor by its sum over all ranks, in place. Collective."""


class _Batch(NamedTuple):
    """Statistics of a global batch."""

    mean: Tensor  # [D]
    variance: Tensor  # [D], biased
    scale: Tensor  # [D], 1 / the standard deviation
    values: Tensor  # [], how many per feature
    weights: Tensor  # [b], of this rank's samples
    share: Share


class GlobalNorm(nn.Module):
    """Normalise by the observed batch in train mode, and by the running statistics in eval mode.

    The running statistics are parameters without gradient, so that they have names and can be saved and loaded as the
    trained ones are. They change only when the caller says so (`update`): a step that is dropped leaves no trace.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.running_mean = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(dim), requires_grad=False)
        self._batch: _Batch | None = None

    def observe(self, parts: Iterable[tuple[Tensor, Tensor]], *, share: Share) -> None:
        """Take the statistics of a global batch from this rank's (values, weights). Collective through `share`."""
        dim = self.running_mean.numel()
        sums = torch.zeros(2 * dim + 1, dtype=torch.float64, device=self.running_mean.device)
        all_weights = []
        for values, weights in parts:
            all_weights.append(weights)
            x = values.detach().double().reshape(len(values), -1, dim)  # [b, T, D]
            weighted = x * weights.double()[:, None, None]
            sums[:dim] += weighted.sum(dim=(0, 1))
            sums[dim:-1] += (weighted * x).sum(dim=(0, 1))
            sums[-1] += weights.double().sum() * x.shape[1]
        share(sums)
        count = sums[-1]
        mean = sums[:dim] / count
        variance = (sums[dim:-1] / count - mean.square()).clamp_min(0.0)  # rounding may leave -1e-17
        scale = (variance + self.eps).rsqrt()
        self._batch = _Batch(mean.float(), variance.float(), scale.float(), count, torch.cat(all_weights), share)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, of D features.

        If x needs a gradient in train mode, it must be all of this rank's rows of the observed batch, [b, D]: the gradient goes
        through the statistics as well, and its backward pass is collective.
        """
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        if self._batch is None:
            raise RuntimeError("no batch was observed: call observe before a forward pass in train mode")
        if x.requires_grad:
            normalised: Tensor = _ThroughStatistics.apply(x, self._batch)
            return normalised
        return (x - self._batch.mean) * self._batch.scale

    def update(self) -> None:
        """Move the running statistics towards those of the observed batch."""
        if self._batch is None:
            return
        mean, variance, _, count, *_ = self._batch
        unbiased = variance * (count / (count - 1).clamp_min(1.0)).float()
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(unbiased, MOMENTUM)


class _ThroughStatistics(torch.autograd.Function):
    """y = (x - mean) * scale, where mean and scale depend on the rows of x that are no padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: _Batch) -> Tensor:
        y = (x - batch.mean) * batch.scale
        ctx.save_for_backward(y)
        ctx.batch = batch
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        batch = ctx.batch
        sums = torch.stack([gradient.sum(dim=0, dtype=torch.float64), (gradient * y).sum(dim=0, dtype=torch.float64)])
        batch.share(sums)
        of_mean, of_scale = (sums / batch.values).float()
        through = (of_mean + y * of_scale) * batch.weights[:, None]
        return batch.scale * (gradient - through), None
