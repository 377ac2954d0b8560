"""The numbers the decoder has to predict for a patch, in float32 whatever the model computes in.

Shapes: patches [..., N], N = P * P * C, of normalised pixels -> targets [..., N], or [..., k] coefficients.
Units:  normalised pixels; or the deviations of each patch.
Errors: TypeError where half precision would spoil a target; ConfigError where a basis is missing or cannot be found.
Source: He et al. 2022, arXiv 2111.06377, section 3 ("Reconstruction target") and table 1d; variance unbiased, 1e-6 added to
it, as in the weights the authors released."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.errors import ConfigError

VARIANCE_EPS = 1e-6


class PatchBasis(NamedTuple):
    """The directions in patch space along which patches differ most."""

    mean: Tensor  # [N]     float32
    components: Tensor  # [k, N]  float32, orthonormal rows, of falling variance


def target_of(
    patches: Tensor, *, target: Literal["raw", "normalised", "pca"], basis: PatchBasis | None = None
) -> Tensor:
    """What the decoder has to predict for each of these patches.

    Shapes: [..., N] -> float32 [..., N], or [..., k] for "pca". Errors: TypeError for half-precision patches, whose rounding
    would be magnified in flat ones (bf16: off by 0.05 of a patch's deviation); ConfigError for "pca" without a basis.
    Source: see the module.
    """
    if patches.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"patches are {patches.dtype}: hand pixels over as float32, the model casts its own input")
    patches = patches.to(torch.float32)
    if target == "raw":
        return patches
    if target == "normalised":
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation
    if basis is None:
        raise ConfigError("target='pca' needs the basis of the training images' patches: give patch_basis(patches)")
    with torch.autocast(patches.device.type, enabled=False):
        return (patches - basis.mean) @ basis.components.T


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch over all its numbers, channels together.

    A patch of one colour is not zero when normalised by them, unless its channels are equal.
    Shapes: [..., N] -> two float32 [..., 1]; the deviation is sqrt(unbiased variance + 1e-6). Errors: none.
    Source: arXiv 2111.06377, section 3.
    """
    variance, mean = torch.var_mean(patches.to(torch.float32), dim=-1, correction=1, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def patch_basis(patches: Tensor, *, components: int) -> PatchBasis:
    """The first principal components of a sample of patches, computed in float64.

    The sign of each component is fixed (its largest entry is positive), so that equal patches give equal targets.
    Shapes: [M, N] -> PatchBasis. Errors: ConfigError when there are not more patches than components.
    Source: arXiv 2111.06377, table 1d (96 coefficients).
    """
    count, numbers = patches.shape
    if not 1 <= components <= min(count - 1, numbers):
        raise ConfigError(
            f"components={components} of {count} patches with {numbers} numbers each: give more patches, or ask for fewer"
        )
    wide = patches.to(torch.float64)
    mean = wide.mean(dim=0)
    _, vectors = torch.linalg.eigh((wide - mean).T @ (wide - mean))  # columns, of rising variance
    rows = vectors.T.flip(0)[:components]  # [k, N]
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return PatchBasis(mean.float(), (rows * largest.sign()).float())


def patches_of(
    prediction: Tensor,
    *,
    true_patches: Tensor,
    target: Literal["raw", "normalised", "pca"],
    basis: PatchBasis | None = None,
) -> Tensor:
    """Predicted targets as patches of normalised pixels, for display.

    Normalised targets take each true patch's own mean and deviation: that leaks its brightness and contrast, so label such
    pictures. Shapes: prediction [..., N or k], true_patches [..., N] -> float32 [..., N].
    Errors: ConfigError for "pca" without a basis. Source: arXiv 2111.06377, figure 2.
    """
    prediction = prediction.float()
    if target == "raw":
        return prediction
    if target == "normalised":
        mean, deviation = patch_statistics(true_patches)
        return prediction * deviation + mean
    if basis is None:
        raise ConfigError("target='pca' needs the basis it was trained with")
    return prediction @ basis.components + basis.mean
