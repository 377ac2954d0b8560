"""The learning rate: its ends, its shape, its refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core import ConfigError, scaled_lr, warmup_cosine

OPTIONS = {"peak_lr": 2.0, "warmup_images": 100, "total_images": 1100, "min_lr": 0.5}


@pytest.mark.parametrize(("images", "rate"), [(0, 0.0), (50, 1.0), (100, 2.0), (600, 1.25), (1100, 0.5), (5000, 0.5)])
def test_values_at_the_ends_and_between(images, rate):
    assert warmup_cosine(images, **OPTIONS) == pytest.approx(rate, abs=1e-12)  # double arithmetic


@given(st.integers(100, 1100), st.integers(100, 1100))
def test_never_rises_after_warmup(first, second):
    early, late = sorted((first, second))
    assert warmup_cosine(early, **OPTIONS) >= warmup_cosine(late, **OPTIONS)


def test_without_warmup_starts_at_the_peak_and_ends_at_zero():
    options = {"peak_lr": 1.0, "warmup_images": 0, "total_images": 10}
    assert warmup_cosine(0, **options) == 1.0
    assert warmup_cosine(10, **options) == 0.0


def test_linear_scaling():
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    with pytest.raises(ConfigError, match="global_batch=0"):
        scaled_lr(1.0, 0)


@pytest.mark.parametrize(
    ("images", "changed", "message"),
    [
        (0, {"total_images": 100}, "warmup_images=100"),
        (0, {"warmup_images": -1}, "warmup_images=-1"),
        (0, {"min_lr": 3.0}, "min_lr=3.0"),
        (-1, {}, "images_seen=-1"),
    ],
)
def test_wrong_schedules_are_answered(images, changed, message):
    with pytest.raises(ConfigError, match=message):
        warmup_cosine(images, **{**OPTIONS, **changed})
