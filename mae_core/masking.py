"""Which patches the encoder sees: noise in, indices out.

Shapes: noise [B, L] -> ids_visible [B, K], ids_hidden [B, L - K], mask [B, L]; K = visible_count(L, mask_ratio).
Units:  mask_ratio is a fraction, rounded to whole patches; noise is uniform in [0, 1), drawn by the caller.
Errors: ConfigError when no patch would stay visible or none would be hidden.
Source: He et al. 2022, arXiv 2111.06377, section 3 ("Simple implementation")."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.errors import ConfigError


class Masked(NamedTuple):
    """The two halves of every image's patches; each index is in 0..L-1, in shuffled order."""

    ids_visible: Tensor  # [B, K]      int64, patches the encoder sees
    ids_hidden: Tensor  # [B, L - K]  int64, patches to predict
    mask: Tensor  # [B, L]      float32, 1.0 = hidden


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """K, the patches that stay visible: L * (1 - mask_ratio) rounded to the nearest, halves up.

    The small term absorbs the error of binary fractions: 400 * (1 - 0.8) is 79.99... and means 80.
    Errors: ConfigError when that leaves no visible or no hidden patch. Source: arXiv 2111.06377 (the ratio alone).
    """
    count = math.floor(num_patches * (1.0 - mask_ratio) + 0.5 + 1e-9) if math.isfinite(mask_ratio) else -1
    if not 1 <= count < num_patches:
        raise ConfigError(
            f"mask_ratio={mask_ratio} of {num_patches} patches leaves {count} visible: at least one patch must be "
            f"visible and one hidden; write 0.75 for 75 %"
        )
    return count


def random_mask(noise: Tensor, *, mask_ratio: float) -> Masked:
    """Hide a random part of every image's patches: the K patches of least noise stay visible.

    Shapes: noise [B, L] -> Masked. Equal noise gives equal masks; ties go to the earlier patch.
    Errors: ConfigError, see visible_count. Source: arXiv 2111.06377, section 3.
    """
    count = visible_count(noise.shape[1], mask_ratio)
    ids = torch.argsort(noise, dim=1, stable=True)  # [B, L]
    ids_visible, ids_hidden = ids[:, :count], ids[:, count:]
    mask = torch.ones_like(noise, dtype=torch.float32).scatter(1, ids_visible, 0.0)
    return Masked(ids_visible, ids_hidden, mask)
