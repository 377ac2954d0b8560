"""Ridge classification in closed form: least squares on targets of +1 for an image's class and -1 for the others.

The penalty is chosen by the squared error of predicting each training image from all the others, which costs no more than one
fit, so that neither a validation split nor the test split is needed. With one image per class, nothing is left of a class
whose image is held out; a large penalty then wins, under which the classifier compares with the classes' mean features.

Shapes: features [n, D], labels int64 [n] -> scores [n, classes]. Everything is computed in float64.

Source: Hoerl and Kennard 1970; Allen 1974 (PRESS, the leave-one-out error); few-shot linear evaluation as in Kolesnikov et al.
2020, arXiv 1912.11370, appendix, which picks the penalty on a validation split instead."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CLASSES_AT_A_TIME = 256


class Ridge(NamedTuple):
    """A fitted classifier: scores = features @ weight.T + bias."""

    weight: Tensor  # [classes, D] float64
    bias: Tensor  # [classes] float64
    penalty: float
    """The one that was chosen."""


def fit_ridge(features: Tensor, labels: Tensor, *, num_classes: int, penalties: Sequence[float]) -> Ridge:
    """Fit the classifier, with the penalty of the lowest leave-one-out error; of equal ones, the first.

    The intercept is not penalised. Takes one singular value decomposition of the features.

    Raises:
        ValueError: There are fewer than two images, no penalty, or one that is not positive.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images are too few to leave one out: give at least 2")
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties={list(penalties)}: give at least one, all above 0")
    x = features.double()
    centre = x.mean(dim=0)  # centring both sides is what an unpenalised intercept amounts to
    u, s, vt = torch.linalg.svd(x - centre, full_matrices=False)  # [n, r], [r], [r, D]; r = min(n, D)
    errors = torch.zeros(len(penalties), dtype=torch.float64, device=x.device)
    blocks = range(0, num_classes, _CLASSES_AT_A_TIME)
    for classes in (range(start, min(start + _CLASSES_AT_A_TIME, num_classes)) for start in blocks):
        target = _targets(labels, classes)  # [n, c]
        target -= target.mean(dim=0)
        projected = u.T @ target  # [r, c]
        for index, penalty in enumerate(penalties):
            shrink = s**2 / (s**2 + penalty)  # [r]
            residual = target - u @ (shrink[:, None] * projected)
            leverage = 1 / len(x) + (u**2 * shrink).sum(dim=1)  # [n]; 1 / n is the intercept's
            errors[index] += ((residual / (1 - leverage)[:, None]) ** 2).sum()
    penalty = penalties[int(errors.argmin())]
    scaled = (s / (s**2 + penalty))[:, None] * u.T  # [r, n]
    target = _targets(labels, range(num_classes))
    weight = ((scaled @ (target - target.mean(dim=0))).T @ vt).contiguous()  # [classes, D]
    return Ridge(weight, target.mean(dim=0) - weight @ centre, penalty)


def ridge_scores(ridge: Ridge, features: Tensor) -> Tensor:
    """Return the scores of images, float32 [n, classes]."""
    chunks = torch.split(features, 4096)  # float64 copies of a part at a time
    return torch.cat([(chunk.double() @ ridge.weight.T + ridge.bias).float() for chunk in chunks])


def _targets(labels: Tensor, classes: range) -> Tensor:
    wanted = torch.arange(classes.start, classes.stop, device=labels.device)
    return (labels[:, None] == wanted).double() * 2 - 1
