"""Classification by nearest neighbours: each image gets the votes of the labelled images whose features are most like its own.

Likeness is the cosine of two features; a neighbour's vote weighs exp(likeness / temperature).

Shapes: queries [n, D], bank [m, D], labels int64 [m] -> votes float32 [n, classes]; K neighbours.

Source: Wu et al. 2018, arXiv 1805.01978, section 3.4 (the vote); Caron et al. 2021, arXiv 2104.14294, appendix F.1 (k, T)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_QUERIES, _BANK = 1024, 16384
"""Size of the tiles of the similarity matrix: 64 MiB each, so that memory does not grow with n x m."""


class Neighbours(NamedTuple):
    """The nearest images of the bank for each query, nearest first."""

    likeness: Tensor  # [n, K] float32, cosine in [-1, 1]
    labels: Tensor  # [n, K] int64


def nearest(queries: Tensor, bank: Tensor, labels: Tensor, *, count: int) -> Neighbours:
    """Return the `count` nearest images of the bank, or the whole bank if it is smaller.

    Takes 2 n m D operations, and little more memory than the arguments and a copy of the bank.

    Raises:
        ValueError: The bank is empty, or has not as many labels as images.
    """
    if len(bank) == 0 or len(bank) != len(labels):
        raise ValueError(f"a bank of {len(bank)} features and {len(labels)} labels has no neighbours to offer")
    bank = F.normalize(bank.float(), dim=1)
    count = min(count, len(bank))
    found = [
        _nearest_of_chunk(F.normalize(chunk.float(), dim=1), bank, count) for chunk in torch.split(queries, _QUERIES)
    ]
    likeness, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Neighbours(likeness, labels[indices.long()])


def _nearest_of_chunk(chunk: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    likeness = chunk.new_empty(len(chunk), 0)
    indices = torch.empty(len(chunk), 0, dtype=torch.int32, device=chunk.device)  # half the memory of int64
    for start in range(0, len(bank), _BANK):
        tile = chunk @ bank[start : start + _BANK].T  # [Q, <= _BANK]
        best = tile.topk(min(count, tile.shape[1]), dim=1)
        likeness = torch.cat([likeness, best.values], dim=1)
        indices = torch.cat([indices, (best.indices + start).int()], dim=1)
        kept = likeness.topk(min(count, likeness.shape[1]), dim=1)
        likeness, indices = kept.values, indices.gather(1, kept.indices)
    return likeness, indices


def votes(neighbours: Neighbours, *, k: int, temperature: float, num_classes: int) -> Tensor:
    """Return the share of the votes of the `k` nearest neighbours that each class gets.

    Shapes: -> float32 [n, classes]; every row sums to 1.
    """
    likeness, labels = neighbours.likeness[:, :k], neighbours.labels[:, :k]
    weights = torch.softmax(
        likeness / temperature, dim=1
    )  # the same ranking as exp, and no overflow at a low temperature
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
