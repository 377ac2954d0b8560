"""Accuracy and loss as sums and counts, which add up over batches and ranks and are divided once, at the end.

Shapes: logits [B, classes], labels [B] -> TopK.

Units: counts are in images, losses in nats.

Source: arXiv 1409.0575, section 4.1 (top-1 and top-5)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Accumulate accuracy and loss over images; add two of them with `+`."""

    correct_top1: int = 0
    """Images whose label has the highest logit."""
    correct_top5: int = 0
    """Images whose label is among the five highest logits; with fewer than five classes, every image."""
    count: int = 0
    """Images counted."""
    loss_sum: float = 0.0
    """Sum of the images' cross entropies without label smoothing, in nats."""

    def __add__(self, other: "TopK") -> "TopK":
        return TopK(
            correct_top1=self.correct_top1 + other.correct_top1,
            correct_top5=self.correct_top5 + other.correct_top5,
            count=self.count + other.count,
            loss_sum=self.loss_sum + other.loss_sum,
        )

    @property
    def top1(self) -> float:
        """Top-1 accuracy, in 0..1. Raises ValueError if no image was counted."""
        return self._per_image(self.correct_top1)

    @property
    def top5(self) -> float:
        """Top-5 accuracy, in 0..1. Raises ValueError if no image was counted."""
        return self._per_image(self.correct_top5)

    @property
    def loss(self) -> float:
        """Mean cross entropy, in nats. Raises ValueError if no image was counted."""
        return self._per_image(self.loss_sum)

    def _per_image(self, total: float) -> float:
        if self.count == 0:
            raise ValueError("no image was counted: the evaluation set is empty, or every label is negative (padding)")
        return total / self.count


def best_classes(scores: Tensor, count: int) -> Tensor:
    """Return the classes of the highest scores, best first; of equal scores, the lower class first.

    Unlike `torch.topk`, whose order of equal scores is arbitrary, this gives the same classes on every device. A vote of the
    nearest neighbours has many equal scores.

    Shapes: scores [B, classes], finite -> int64 [B, min(count, classes)].
    """
    left = scores.clone()
    best: list[Tensor] = []
    for _ in range(min(count, scores.shape[1])):
        best.append(left.argmax(dim=1, keepdim=True))  # the first of equal ones
        left.scatter_(1, best[-1], -torch.inf)
    return torch.cat(best, dim=1)


def topk_counts(logits: Tensor, labels: Tensor) -> TopK:
    """Count the hits and sum the losses of a batch. A negative label marks padding and is not counted.

    The sums are read back to the host, which waits for the device.

    Shapes: logits [B, classes], labels int64 [B], each below the number of classes -> TopK.
    """
    counted = labels >= 0
    logits, labels = logits[counted].float(), labels[counted]
    best = best_classes(logits, 5)  # [B, 5]
    hits = best == labels[:, None]  # [B, 5]
    # summed in float64, so that the cut into batches changes the mean by no more than float64 rounding
    loss = nn.functional.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64)
    return TopK(
        correct_top1=int(hits[:, 0].sum()),
        correct_top5=int(hits.sum()),
        count=labels.shape[0],
        loss_sum=float(loss),
    )
