"""Whether two encoders differ in accuracy on the same images.

The question is about images: would the one also be better on other images like the scored ones? Both classifiers are given, seeds
of their heads included, and so is the one pretraining of each, so a p-value says nothing of another pretraining with another seed.

Shapes: a run's outcomes are bool [seeds, n], True where an image's first class is its label; n images, in one order for both runs.
Source: Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better than
exact conditional", BMC Medical Research Methodology 13:91; Holm 1979, Scandinavian Journal of Statistics 6(2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Outcomes = NDArray[np.bool_]
DRAWS = 10_000
_SEED = 0
MCNEMAR = "McNemar, mid-p"
SIGN_FLIP = f"sign flips, {DRAWS} draws"
"""For several seeds: the differences per image, averaged over the seeds, with their signs drawn at random."""


class Paired(NamedTuple):
    """Differences are shares of images, first less second."""

    difference: float
    low: float  # 95 % interval, by resampling images
    high: float
    only_first: float  # images that only the first gets right, mean over seeds
    only_second: float
    p: float  # two-sided, of no difference on images like these
    test: str


def paired_test(first: Outcomes, second: Outcomes) -> Paired:
    """Compare two runs image by image. Raises ValueError for outcomes of different shapes, or none."""
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"outcomes of shapes {first.shape} and {second.shape} cannot be paired")
    only_first, only_second = ((a & ~b).sum(axis=1) for a, b in ((first, second), (second, first)))
    # per image: few values occur, so resampling draws how often each does instead of n images
    values, counts = np.unique(first.mean(axis=0) - second.mean(axis=0), return_counts=True)
    low, high = _interval(values, counts)
    single = len(first) == 1
    return Paired(
        difference=float(values @ counts / counts.sum()),
        low=low,
        high=high,
        only_first=float(only_first.mean()),
        only_second=float(only_second.mean()),
        p=mcnemar_mid_p(int(only_first[0]), int(only_second[0])) if single else _sign_flip_p(values, counts),
        test=MCNEMAR if single else SIGN_FLIP,
    )


def mcnemar_mid_p(only_first: int, only_second: int) -> float:
    """Return the two-sided mid-p value of McNemar's test, from the images that only one of two classifiers gets right."""
    from scipy.stats import binom

    pairs, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return float(1 - binom.pmf(fewer, pairs, 0.5) / 2) if pairs else 1.0
    return float(2 * binom.cdf(fewer, pairs, 0.5) - binom.pmf(fewer, pairs, 0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number: rejecting those below a level errs in any of them at that level at most."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _interval(values: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, over images."""
    images = counts.sum()
    drawn = np.random.default_rng(_SEED).multinomial(images, counts / images, size=DRAWS)
    low, high = np.quantile(drawn @ values / images, [0.025, 0.975])
    return float(low), float(high)


def _sign_flip_p(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    draw, sums = np.random.default_rng(_SEED), np.zeros(DRAWS)
    sizes, index = np.unique(np.abs(values), return_inverse=True)
    for size, count in zip(sizes, np.bincount(index, weights=counts).astype(int), strict=True):
        sums += size * (2 * draw.binomial(count, 0.5, size=DRAWS) - count)
    # 1e-9: sums of the same fractions in another order; 1 + and + 1: the outcome itself is one of the draws
    return float((1 + (np.abs(sums) >= abs(values @ counts) - 1e-9).sum()) / (DRAWS + 1))
