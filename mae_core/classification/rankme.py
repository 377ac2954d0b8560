"""RankMe: how many dimensions the features of many images use, a score that needs no labels.

It is exp of the entropy of the normalised singular values: D if all directions carry the same, 1 if all features are
multiples of one vector, and never more than the number of images. Compare it only between encoders of one width, on the same
images.

Source: Garrido et al. 2023, arXiv 2210.02885, equation 1."""

import torch
from torch import Tensor

EPSILON = 1e-7
"""Added to each share, as in the paper for float32."""
_IMAGES_AT_A_TIME = 4096


def rankme(features: Tensor) -> float:
    """Return the effective rank of [n, D] features, which are not centred.

    The singular values are the roots of the eigenvalues of the D x D matrix of products, so memory does not grow with n. In
    float64, those above 1e-8 of the largest are right, which is finer than EPSILON.

    Raises:
        ValueError: There are no features, or all are zero or not finite.
    """
    n, dim = features.shape
    products = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for chunk in torch.split(features, _IMAGES_AT_A_TIME):
        products.addmm_(chunk.T.double(), chunk.double())
    if n == 0 or not torch.isfinite(products).all() or not products.any():
        raise ValueError(f"{n} features have no rank: there are none, or they are all zero or not finite")
    values = torch.linalg.eigvalsh(products).clamp_min(0).sqrt().flip(0)[: min(n, dim)]
    shares = values / values.sum() + EPSILON
    return float((-(shares * shares.log()).sum()).exp())
