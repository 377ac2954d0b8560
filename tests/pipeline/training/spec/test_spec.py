"""Recipes: what they refuse, and the learning rate they give each step."""

import pytest

from pipeline.errors import ConfigError
from pipeline.training.spec.recipe import Recipe

STABLE = Recipe(
    global_batch=256, epochs=100, warmup_epochs=10, base_lr=1e-3, schedule="warmup_stable_decay", decay_share=0.25
)


def test_the_cosine_is_the_default_and_ends_at_the_floor():
    recipe = Recipe(global_batch=256, epochs=100, warmup_epochs=10, base_lr=1e-3, min_lr=1e-5)
    rates = [recipe.learning_rate(step, 256) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])


def test_the_stable_part_does_not_depend_on_the_length():
    longer = Recipe(**{**vars(STABLE), "epochs": 200, "decay_share": 0.125})
    for step in (0, 5, 10, 40, 75):
        assert STABLE.learning_rate(step, 256) == longer.learning_rate(step, 256)
    assert STABLE.learning_rate(75, 256) == pytest.approx(1e-3)
    assert longer.learning_rate(175, 256) == pytest.approx(1e-3)
    # a quarter of the 25 epochs of decay: 1 - sqrt(0.24)
    assert STABLE.learning_rate(81, 256) == pytest.approx(1e-3 * (1 - 0.24**0.5))
    assert STABLE.learning_rate(100, 256) == 0.0


@pytest.mark.parametrize("samples", [1, 3, 7, 1001])
def test_rounding_never_makes_an_impossible_schedule(samples):
    recipe = Recipe(epochs=3, warmup_epochs=0.5, schedule="warmup_stable_decay", decay_share=5 / 6)
    assert recipe.learning_rate(10**6, samples) == 0.0


def test_a_decay_that_does_not_fit_is_answered():
    with pytest.raises(ConfigError, match=r"decay_share=0.95 is not in \(0, 0.9\]"):
        Recipe(epochs=100, warmup_epochs=10, schedule="warmup_stable_decay", decay_share=0.95)


def test_sums_coarser_than_the_gradients_are_answered():
    assert Recipe(precision="fp32", gradient_precision="fp32").gradient_precision == "fp32"
    with pytest.raises(ConfigError, match="gradient_precision=bf16 is coarser than precision=fp32: leave it out"):
        Recipe(precision="fp32", gradient_precision="bf16")


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_clipping_to_nothing_is_answered(norm):
    with pytest.raises(ConfigError, match=f"max_grad_norm={norm} is not positive: write 1.0, or null for no clipping"):
        Recipe(max_grad_norm=norm)
