"""Paired tests: hand-computed values, exact tests of scipy as reference, and how often they err on data without a difference."""

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.runs.comparing.statistics import holm, mcnemar_mid_p, paired_test


def test_mid_p_by_hand():
    # 6 images differ, 1 in favour of the first: 2 * (1 + 6) / 64 - 6 / 64
    assert mcnemar_mid_p(1, 5) == pytest.approx(8 / 64)
    assert mcnemar_mid_p(5, 1) == mcnemar_mid_p(1, 5)
    assert mcnemar_mid_p(0, 0) == 1.0
    assert mcnemar_mid_p(2, 2) == pytest.approx(1 - 6 / 32)


@pytest.mark.parametrize(("only_first", "only_second"), [(3, 9), (40, 80), (0, 7)])
def test_mid_p_is_the_exact_p_less_half_the_chance_of_the_outcome(only_first, only_second):
    pairs = only_first + only_second
    exact = binomtest(only_first, pairs).pvalue
    tail = binomtest(only_first, pairs, alternative="less").pvalue
    below = binomtest(only_first - 1, pairs, alternative="less").pvalue if only_first else 0.0
    assert mcnemar_mid_p(only_first, only_second) == pytest.approx(exact - (tail - below))


def test_holm_on_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def outcomes(draw, shape, *, accuracy):
    return draw.random(shape) < accuracy


def test_a_difference_is_of_the_first_less_the_second_and_counts_images():
    first, second = np.array([[1, 1, 1, 0]], dtype=bool), np.array([[0, 0, 1, 1]], dtype=bool)
    test = paired_test(first, second)
    assert (test.difference, test.only_first, test.only_second) == (0.25, 2, 1)
    other = paired_test(second, first)
    assert (other.difference, other.p) == (-0.25, test.p)
    assert test.low <= test.difference <= test.high


def test_repeating_a_seed_adds_no_evidence():
    draw = np.random.default_rng(1)
    first, second = outcomes(draw, (1, 400), accuracy=0.8), outcomes(draw, (1, 400), accuracy=0.72)
    once, thrice = paired_test(first, second), paired_test(first.repeat(3, axis=0), second.repeat(3, axis=0))
    # other methods: mid-p and 10,000 draws, whose p has a standard error of 0.002 at 0.05
    exact = binomtest(int(once.only_first), int(once.only_first + once.only_second)).pvalue
    assert thrice.p == pytest.approx(exact, abs=0.01)
    assert (thrice.difference, thrice.low, thrice.high) == pytest.approx((once.difference, once.low, once.high))


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_a_difference_p_is_below_a_level_about_as_often_as_the_level_says(seeds):
    draw = np.random.default_rng(seeds)
    hard = draw.random(300)  # images that are hard are hard for both
    tests = [paired_test(draw.random((seeds, 300)) < hard, draw.random((seeds, 300)) < hard) for _ in range(200)]
    missed = sum(test.p < 0.05 for test in tests)
    outside = sum(not test.low <= 0 <= test.high for test in tests)
    # 200 times 5 %: 10 expected, more than 22 has a chance of 1e-4
    assert missed <= 22
    assert outside <= 22
    assert missed + outside > 2


def test_outcomes_that_are_not_of_the_same_images_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_test(np.ones((1, 3), bool), np.ones((1, 4), bool))
