"""Masks: exact counts, each patch once, all alike, decided by the noise alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core import ConfigError, random_mask, visible_count


@pytest.mark.parametrize(
    ("patches", "ratio", "count"),
    [(196, 0.75, 49), (256, 0.75, 64), (400, 0.8, 80), (400, 0.9, 40), (1600, 0.8, 320), (9, 0.75, 2), (10, 0.85, 2)],
)
def test_counts_are_rounded_not_cut(patches, ratio, count):
    assert visible_count(patches, ratio) == count


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_nothing_visible_or_nothing_hidden_is_answered(ratio):
    with pytest.raises(ConfigError, match="mask_ratio="):
        visible_count(16, ratio)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.0, 1.0), st.integers(0, 2**31))
def test_every_patch_is_either_visible_or_hidden(patches, ratio, seed):
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    try:
        count = visible_count(patches, ratio)
    except ConfigError:
        return
    masked = random_mask(noise, mask_ratio=ratio)
    assert masked.ids_visible.shape == (3, count)
    both = torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(patches).expand(3, -1))
    assert torch.equal(masked.mask.sum(dim=1), torch.full((3,), float(patches - count)))
    assert masked.mask.gather(1, masked.ids_hidden).min() == 1.0
    assert noise.gather(1, masked.ids_visible).amax() <= 1.0
    assert (noise.gather(1, masked.ids_visible).amax(dim=1) <= noise.gather(1, masked.ids_hidden).amin(dim=1)).all()


def test_a_sample_keeps_its_mask_in_any_batch(generator):
    noise = torch.rand(4, 16, generator=generator)
    alone = random_mask(noise[2:3], mask_ratio=0.75)
    assert torch.equal(alone.mask[0], random_mask(noise, mask_ratio=0.75).mask[2])


def test_ties_go_to_the_earlier_patch():
    assert random_mask(torch.zeros(1, 4), mask_ratio=0.5).ids_visible.tolist() == [[0, 1]]


def test_every_position_is_hidden_equally_often(generator):
    draws = 20_000
    hidden = random_mask(torch.rand(draws, 16, generator=generator), mask_ratio=0.75).mask.mean(dim=0)
    # binomial deviation sqrt(0.75 * 0.25 / 20000) = 0.0031; five of them for 16 positions
    torch.testing.assert_close(hidden, torch.full((16,), 0.75), rtol=0, atol=0.0155)
