"""Losses by sample, in float32: the caller weighs and averages them, so that no split over ranks changes the mean.

Shapes: predictions [B, M, N] or logits [B, classes] -> [B].       Units: squared normalised pixels, or nats.
Errors: none but those of torch.       Source: He et al. 2022, arXiv 2111.06377, section 3; A.1 for label smoothing."""

from torch import Tensor, nn


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over its predicted patches.

    Shapes: prediction and target [B, M, N], M predicted patches -> float32 [B]. Units: squared target units. Errors: torch's
    on unequal shapes. Source: arXiv 2111.06377, section 3 (the hidden ones only).
    """
    return (prediction.float() - target.float()).square().mean(dim=(1, 2))


def cross_entropy_per_sample(logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross entropy of each sample.

    Shapes: logits [B, classes]; labels int64 [B], or probabilities [B, classes] after mixup -> float32 [B]. Units: nats;
    label_smoothing is the fraction in [0, 1] spread over all classes. Errors: torch's. Source: arXiv 1512.00567, section 7.
    """
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
