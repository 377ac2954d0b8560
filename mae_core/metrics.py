"""Accuracy as sums and counts, divided once: parts add up over batches and ranks to the exact whole.

Shapes: logits [B, classes], labels [B] -> TopK.       Units: counts of images; loss in nats.
Errors: ValueError when a share of no images is asked for.       Source: arXiv 1409.0575, section 4.1 (top-1 and top-5)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Sums over the images counted so far. Units: images and nats. Errors, source: the module's."""

    correct_top1: int = 0
    """Images whose highest logit is their label's."""
    correct_top5: int = 0
    """Images whose label is among the five highest logits (all of them with fewer classes)."""
    count: int = 0
    """Images counted."""
    loss_sum: float = 0.0
    """Sum of the cross entropy without label smoothing, in nats."""

    def __add__(self, other: "TopK") -> "TopK":
        return TopK(
            correct_top1=self.correct_top1 + other.correct_top1,
            correct_top5=self.correct_top5 + other.correct_top5,
            count=self.count + other.count,
            loss_sum=self.loss_sum + other.loss_sum,
        )

    @property
    def top1(self) -> float:
        """Share of images in 0..1 that are right. Errors: ValueError when none was counted."""
        return self._share(self.correct_top1)

    @property
    def top5(self) -> float:
        """Share of images in 0..1 with the label among the best five. Errors: ValueError when none was counted."""
        return self._share(self.correct_top5)

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats. Errors: ValueError when no image was counted."""
        return self._share(self.loss_sum)

    def _share(self, total: float) -> float:
        if self.count == 0:
            raise ValueError("no image was counted: the evaluation set is empty or every label is negative (padding)")
        return total / self.count


def topk_counts(logits: Tensor, labels: Tensor) -> TopK:
    """Count one batch; a negative label marks padding and is left out.

    Shapes: logits [B, classes], labels int64 [B] -> TopK (brings the sums to the host). Units: images, nats. Errors:
    torch's on labels >= classes. Source: see the module.
    """
    counted = labels >= 0
    logits, labels = logits[counted].float(), labels[counted]
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
    hits = best == labels[:, None]  # [B, 5]
    loss = nn.functional.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64)
    return TopK(
        correct_top1=int(hits[:, 0].sum()),
        correct_top5=int(hits.sum()),
        count=labels.shape[0],
        loss_sum=float(loss),
    )
