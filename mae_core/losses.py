"""Losses per sample, in float32.

The caller weights and averages them, so that the mean does not depend on how samples are split over ranks.

Shapes: predictions [B, M, N] or logits [B, classes] -> [B].

Source: He et al. 2022, arXiv 2111.06377, section 3; A.1 for label smoothing."""

from torch import Tensor, nn


def mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Return each sample's mean squared error over its predicted patches, in squared units of the target.

    Shapes: prediction and target [B, M, N], M predicted patches -> float32 [B].

    Source: arXiv 2111.06377, section 3, where the predicted patches are the hidden ones.
    """
    # every sample predicts the same number M of patches, so the mean over samples weighs all patches alike
    return (prediction.float() - target.float()).square().mean(dim=(1, 2))


def cross_entropy_per_sample(logits: Tensor, labels: Tensor, *, label_smoothing: float) -> Tensor:
    """Return each sample's cross entropy, in nats.

    `label_smoothing` is the fraction in [0, 1] of the label that is spread over all classes.

    Shapes: logits [B, classes]; labels int64 [B], or probabilities [B, classes] after mixup -> float32 [B].

    Source: arXiv 1512.00567, section 7.
    """
    # float32, because softmax over many classes in bfloat16 loses most of its digits
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
