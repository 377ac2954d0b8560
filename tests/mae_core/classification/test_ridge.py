"""Ridge classification chooses scikit-learn's penalty and gives its scores."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV

from mae_core import fit_ridge, ridge_scores
from mae_core.classification import ridge as module

PENALTIES = [10.0**power for power in range(-2, 7)]


def drawn(n: int, dim: int, classes: int, *, spread: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + spread * torch.randn(n, dim, generator=generator) + 3, labels


@pytest.mark.parametrize(
    ("n", "dim", "classes", "spread"), [(200, 12, 5, 1.0), (30, 60, 3, 4.0), (40, 64, 40, 1.0), (300, 20, 9, 8.0)]
)
def test_penalty_and_scores_are_those_of_scikit_learn(n, dim, classes, spread, monkeypatch):
    monkeypatch.setattr(module, "_CLASSES_AT_A_TIME", 4)
    features, labels = drawn(n, dim, classes, spread=spread)
    fitted = fit_ridge(features, labels, num_classes=classes, penalties=PENALTIES)
    x = features.numpy().astype(np.float64)
    chosen = RidgeClassifierCV(alphas=PENALTIES).fit(x, labels)
    assert fitted.penalty == chosen.alpha_
    expected = RidgeClassifier(alpha=fitted.penalty).fit(x, labels).decision_function(x)
    # scores are around 1 in size; float32 results of a float64 fit
    np.testing.assert_allclose(ridge_scores(fitted, features).numpy(), expected, rtol=0, atol=1e-5)


def test_the_leave_one_out_error_is_that_of_leaving_each_out():
    features, labels = drawn(20, 6, 2, spread=3.0)
    x, target = features.double(), (labels[:, None] == torch.arange(2)).double() * 2 - 1
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for out in range(20):
            rest = torch.arange(20) != out
            fitted = fit_ridge(features[rest], labels[rest], num_classes=2, penalties=[penalty])
            error += float(((x[out] @ fitted.weight.T + fitted.bias - target[out]) ** 2).sum())
        errors.append(error)
    chosen = fit_ridge(features, labels, num_classes=2, penalties=PENALTIES).penalty
    assert chosen == PENALTIES[int(np.argmin(errors))]
    assert PENALTIES[0] < chosen < PENALTIES[-1]


def test_one_image_per_class_is_the_class_mean_classifier():
    features, labels = drawn(10, 50, 10)
    fitted = fit_ridge(features, labels, num_classes=10, penalties=PENALTIES)
    assert torch.equal(ridge_scores(fitted, features).argmax(dim=1), labels)


def test_what_cannot_be_fitted_is_refused():
    features, labels = drawn(10, 5, 2)
    with pytest.raises(ValueError, match="1 images are too few"):
        fit_ridge(features[:1], labels[:1], num_classes=2, penalties=[1.0])
    for penalties in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="penalties="):
            fit_ridge(features, labels, num_classes=2, penalties=penalties)
