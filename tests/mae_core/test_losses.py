"""Losses per sample: values computed by hand, float32 results."""

import math

import pytest
import torch

from mae_core import cross_entropy_per_sample, mse_per_sample


def test_mean_squared_error_by_hand():
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    assert mse_per_sample(prediction, torch.zeros(2, 2, 2)).tolist() == [7.5, 1.0]
    assert mse_per_sample(prediction.bfloat16(), torch.zeros(2, 2, 2)).dtype == torch.float32


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    labels = torch.tensor([0, 1])
    plain = cross_entropy_per_sample(logits, labels, label_smoothing=0.0)
    assert plain.tolist() == pytest.approx([math.log(2), math.log(4)], rel=1e-6)  # float32
    smoothed = cross_entropy_per_sample(logits, labels, label_smoothing=0.2)
    assert smoothed[1].item() == pytest.approx(0.9 * math.log(4) + 0.1 * math.log(4 / 3), rel=1e-6)  # float32
    mixed = cross_entropy_per_sample(logits, torch.eye(2), label_smoothing=0.0)
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=0)  # float32, the same logarithms
    assert cross_entropy_per_sample(logits.bfloat16(), labels, label_smoothing=0.0).dtype == torch.float32
