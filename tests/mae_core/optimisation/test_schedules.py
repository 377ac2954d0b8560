"""The learning rate: its ends, its shape, and the schedules it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core import ConfigError, scaled_lr, warmup_cosine, warmup_stable_decay

OPTIONS = {"peak_lr": 2.0, "warmup_images": 100, "total_images": 1100, "min_lr": 0.5}
STABLE = {**OPTIONS, "decay_images": 400}  # constant from 100 to 700


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


@pytest.mark.parametrize(
    ("images", "rate"),
    # after 1/16, 1/4 and 9/16 of the decay, 1 - sqrt is 3/4, 1/2 and 1/4 of the way from 0.5 to 2
    [(0, 0.0), (50, 1.0), (100, 2.0), (699, 2.0), (700, 2.0), (725, 1.625), (800, 1.25), (925, 0.875), (1100, 0.5)],
)
def test_stable_decay_values_at_the_ends_and_between(images, rate):
    assert warmup_stable_decay(images, **STABLE) == pytest.approx(rate, abs=1e-12)  # double arithmetic


@given(st.integers(0, 1200), st.integers(0, 1200))
def test_stable_decay_has_no_jumps(first, second):
    early, late = sorted((first, second))
    step = late - early
    # over `step` images the warmup rises by at most 2 * step / 100, and the decay falls by at most 1.5 * sqrt(step / 400)
    change = warmup_stable_decay(late, **STABLE) - warmup_stable_decay(early, **STABLE)
    assert -1.5 * (step / 400) ** 0.5 - 1e-12 <= change <= 0.02 * step + 1e-12
    if early >= 100:
        assert change <= 0


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 400))
def test_stable_part_serves_every_length(images, longer, decay):
    short = {**STABLE, "total_images": 2000, "decay_images": 400}
    long = {**STABLE, "total_images": 2000 + longer, "decay_images": decay}
    images %= 1601  # up to the decay of the shorter run
    assert warmup_stable_decay(images, **short) == warmup_stable_decay(images, **long)


def test_stable_decay_stays_at_its_floor_and_may_take_all_that_is_left():
    assert warmup_stable_decay(10**9, **STABLE) == 0.5
    whole = {"peak_lr": 1.0, "warmup_images": 0, "decay_images": 100, "total_images": 100}
    assert [warmup_stable_decay(n, **whole) for n in (0, 25, 100)] == [1.0, 0.5, 0.0]


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
@pytest.mark.parametrize(("schedule", "options"), [(warmup_cosine, OPTIONS), (warmup_stable_decay, STABLE)])
def test_wrong_schedules_are_refused(schedule, options, images, changed, message):
    with pytest.raises(ConfigError, match=message):
        schedule(images, **{**options, **changed})


@pytest.mark.parametrize("decay_images", [0, -1, 1001])
def test_a_decay_that_does_not_fit_is_refused(decay_images):
    with pytest.raises(ConfigError, match=rf"decay_images={decay_images} is not in \[1, 1000\].*write 200 for a fifth"):
        warmup_stable_decay(0, **{**STABLE, "decay_images": decay_images})
