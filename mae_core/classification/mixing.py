"""Mixup and CutMix: images are mixed in pairs, and so are their labels.

Images 2k and 2k + 1 of a batch are a pair. Both are mixed by the plan of the first, each as the larger or smaller part of the
other: timm's mode `pair`. The official fine-tuning uses its mode `batch`, with one plan for all images of a GPU. Each image is
mixed alike in both, but here the result does not depend on how a batch is split over workers, as long as no pair is.

Shapes: pixels [B, C, H, W], labels [B]; a plan is float32 [B, PLAN]: the share of the image's own label, then top, bottom, left
and right of the box that its partner fills, in pixels. The box is empty for mixup.

Source: Zhang et al. 2018, arXiv 1710.09412 (mixup); Yun et al. 2019, arXiv 1905.04899 (CutMix)."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PLAN = 5
"""Numbers of a plan per image."""
MIX_UNIFORMS = 4
"""Random numbers of a plan: mixup or CutMix, the share, and the centre of the box."""
_POINTS = 8192


def mix_plan(
    uniforms: npt.NDArray[np.float64], *, mixup: float, cutmix: float, size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Return a plan for each image of `size` = (H, W).

    `mixup` and `cutmix` are the parameters of their symmetric Beta distributions; if neither is 0, each is chosen half of the
    time. At least one is above 0.

    Shapes: uniforms [B, MIX_UNIFORMS] -> float32 [B, PLAN].
    """
    height, width = size
    which, share, row, column = uniforms.T
    cut = (which < 0.5) if mixup and cutmix else np.full(len(which), bool(cutmix))
    own = np.where(cut, beta_quantile(share, cutmix or mixup), beta_quantile(share, mixup or cutmix))
    plan = np.zeros((len(own), PLAN))
    side = np.where(cut, np.sqrt(1 - own), 0.0)
    for first, centre, pixels in ((1, np.floor(row * height), height), (3, np.floor(column * width), width)):
        length = np.floor(pixels * side)
        plan[:, first] = np.clip(centre - length // 2, 0, pixels)
        plan[:, first + 1] = np.clip(centre + (length + 1) // 2, 0, pixels)
    area = (plan[:, 2] - plan[:, 1]) * (plan[:, 4] - plan[:, 3])
    # a box at the border is smaller than drawn, and the labels follow the pixels
    plan[:, 0] = np.where(cut, 1 - area / (height * width), own)
    plan[area == 0, 1:] = 0
    return plan.astype(np.float32)


def beta_quantile(uniforms: npt.NDArray[np.float64], parameter: float) -> npt.NDArray[np.float64]:
    """Return numbers of a symmetric Beta distribution from uniforms, by its inverse distribution function.

    Exact to 1e-5 for parameters from 0.3; numpy draws such numbers by rejection, and may change how.
    """
    # With x = sin^2(angle), the density is sin^(2a-1) cos^(2a-1), which does not diverge at the ends for a >= 0.5.
    angles = (np.arange(_POINTS) + 0.5) * (math.pi / 2 / _POINTS)
    density = (np.sin(angles) * np.cos(angles)) ** (2 * parameter - 1)
    distribution = np.concatenate([[0.0], np.cumsum(density) / density.sum()])
    angle = np.interp(uniforms, distribution, np.linspace(0.0, math.pi / 2, _POINTS + 1))
    return np.sin(angle) ** 2


def mixed(pixels: Tensor, plan: Tensor) -> Tensor:
    """Return the images, each mixed with its partner. Of an odd number, the last stays as it is.

    Shapes: pixels [B, C, H, W], plan [B, PLAN] -> [B, C, H, W].
    """
    partner, plan = _pairs(plan)
    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[2:])
    share, top, bottom, left, right = plan[:, :, None, None].unbind(1)  # each [B, 1, 1]
    inside = (rows[:, None] >= top) & (rows[:, None] < bottom) & (columns >= left) & (columns < right)  # [B, H, W]
    own = torch.where(bottom > top, (~inside).to(pixels.dtype), share.to(pixels.dtype))[:, None]  # [B, 1, H, W]
    return pixels * own + pixels[partner] * (1 - own)


def mixed_labels(labels: Tensor, plan: Tensor, *, num_classes: int) -> Tensor:
    """Return the probabilities of the classes of mixed images.

    Shapes: labels int64 [B], plan [B, PLAN] -> float32 [B, num_classes].
    """
    partner, plan = _pairs(plan)
    certain = nn.functional.one_hot(labels, num_classes).float()
    share = plan[:, :1]
    return certain * share + certain[partner] * (1 - share)


def _pairs(plan: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each image's partner, [B], and the plan of its pair, [B, PLAN]."""
    index = torch.arange(len(plan), device=plan.device)
    return (index ^ 1).clamp(max=len(plan) - 1), plan[index & ~1]
