"""Reconstruction targets: what the decoder has to predict for a patch, in float32 whatever dtype the model computes in.

Shapes: patches [..., N] of normalised pixels, N = P * P * C -> targets [..., N], or [..., k] coefficients.

Units: "raw" and "pca" targets are in normalised pixels, "normalised" targets in standard deviations of their own patch.

Source: He et al. 2022, arXiv 2111.06377, section 3 ("Reconstruction target") and table 1d. The variance is unbiased and has
1e-6 added to it, which is what the released weights were trained with."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.errors import ConfigError

VARIANCE_EPS = 1e-6
"""Added to the variance of a patch before the square root, so that flat patches do not divide by zero."""


class PatchBasis(NamedTuple):
    """The directions in patch space along which patches differ most: their principal components."""

    mean: Tensor
    """float32 [N], the mean patch."""
    components: Tensor
    """float32 [k, N], orthonormal rows in order of decreasing variance."""


def target_of(
    patches: Tensor, *, target: Literal["raw", "normalised", "pca"], basis: PatchBasis | None = None
) -> Tensor:
    """Return what the decoder has to predict for each of these patches.

    The target is the patch itself ("raw"), the patch standardised by its own mean and standard deviation ("normalised"),
    or its first k principal components ("pca", which needs `basis`).

    Half-precision patches are refused because normalisation magnifies their rounding in flat patches: bfloat16 is off by
    0.05 of a patch's standard deviation.

    Shapes: [..., N] -> float32 [..., N], or [..., k] for "pca".

    Raises:
        TypeError: The patches are in half precision.
        ConfigError: The target is "pca" and there is no basis.
    """
    if patches.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"patches are {patches.dtype}: pass pixels as float32, the model casts its own input")
    patches = patches.to(torch.float32)
    if target == "raw":
        return patches
    if target == "normalised":
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation
    if basis is None:
        raise ConfigError(
            "target='pca' needs a basis: pass patch_basis(patches), taken over patches of training images"
        )
    with torch.autocast(patches.device.type, enabled=False):  # autocast would run this product in half precision
        return (patches - basis.mean) @ basis.components.T


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each patch, over all its values and all channels together.

    A patch of a single colour is therefore not zero once normalised, unless its channels are equal. The standard
    deviation is sqrt(unbiased variance + 1e-6).

    Shapes: [..., N] -> two float32 [..., 1].
    """
    variance, mean = torch.var_mean(patches.to(torch.float32), dim=-1, correction=1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def patch_basis(patches: Tensor, *, components: int) -> PatchBasis:
    """Return the first principal components of a sample of patches, computed in float64.

    The sign of each component is fixed by making its largest entry positive, so that equal patches give equal targets.

    Shapes: [M, N] -> PatchBasis with k = components.

    Source: arXiv 2111.06377, table 1d (96 coefficients).

    Raises:
        ConfigError: There are not more patches than components, or fewer values per patch than components.
    """
    count, values = patches.shape
    # subtracting the mean takes one dimension away, so M patches span at most M - 1
    if not 1 <= components <= min(count - 1, values):
        raise ConfigError(
            f"components={components} of {count} patches with {values} values each cannot be computed: pass more patches, or "
            f"ask for fewer components"
        )
    wide = patches.to(torch.float64)
    mean = wide.mean(dim=0)
    # the N x N scatter matrix, not the M x N patches: M is large, and N is a few hundred
    _, vectors = torch.linalg.eigh((wide - mean).T @ (wide - mean))  # columns, in order of increasing variance
    rows = vectors.T.flip(0)[:components]  # [k, N]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))  # [k, 1]
    return PatchBasis(mean.float(), (rows * largest.sign()).float())


def patches_of(
    prediction: Tensor,
    *,
    true_patches: Tensor,
    target: Literal["raw", "normalised", "pca"],
    basis: PatchBasis | None = None,
) -> Tensor:
    """Turn predicted targets back into patches of normalised pixels, for display; the inverse of `target_of`.

    A "normalised" prediction is rescaled by the true patch's mean and standard deviation. That leaks the brightness and
    contrast of the original, so say so next to such a picture.

    Shapes: prediction [..., N], or [..., k] for "pca"; true_patches [..., N] -> float32 [..., N].

    Source: arXiv 2111.06377, figure 2.

    Raises:
        ConfigError: The target is "pca" and there is no basis.
    """
    prediction = prediction.float()
    if target == "raw":
        return prediction
    if target == "normalised":
        mean, deviation = patch_statistics(true_patches)
        return prediction * deviation + mean
    if basis is None:
        raise ConfigError("target='pca' needs the basis that the model was trained with: pass basis")
    return prediction @ basis.components + basis.mean
