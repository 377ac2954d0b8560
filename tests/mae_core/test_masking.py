"""Masks: counts are exact, every patch occurs once, all patches are equally likely, and the noise alone decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

from mae_core import ConfigError, mask_patches, random_mask, visible_count


@pytest.mark.parametrize(
    ("patches", "ratio", "count"),
    [(196, 0.75, 49), (196, 0.7, 58), (196, 0.9, 19), (256, 0.75, 64), (400, 0.8, 79), (9, 0.75, 2), (10, 0.85, 1)],
)
def test_counts_are_cut_not_rounded(patches, ratio, count):
    assert visible_count(patches, ratio) == count


@pytest.mark.parametrize("side", [32, 112])
def test_counts_are_those_of_hugging_face_at_every_ratio(side):
    config = ViTMAEConfig(image_size=side, patch_size=8, hidden_size=8, num_attention_heads=1)
    embeddings = ViTMAEEmbeddings(config)
    tokens = torch.zeros(1, (side // 8) ** 2, 8)
    for percent in range(5, 94):
        config.mask_ratio = percent / 100
        kept, _, _ = embeddings.random_masking(tokens)
        assert visible_count(tokens.shape[1], percent / 100) == kept.shape[1], percent


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_nothing_visible_or_nothing_hidden_is_refused(ratio):
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


MASKINGS = ("random", "block", "grid", "cell")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MASKINGS),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.0, 1.0),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_every_way_of_masking_keeps_exact_counts(masking, rows, columns, ratio, cell, seed):
    noise = torch.rand(3, rows * columns, generator=torch.Generator().manual_seed(seed))
    try:
        count = visible_count(rows * columns, ratio)
    except ConfigError:
        return
    masked = mask_patches(noise, grid=(rows, columns), mask_ratio=ratio, masking=masking, mask_cell=cell)
    assert masked.ids_visible.shape == (3, count)
    both = torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(rows * columns).expand(3, -1))
    assert torch.equal(masked.mask, torch.ones(3, rows * columns).scatter(1, masked.ids_visible, 0.0))
    alone = mask_patches(noise[1:2], grid=(rows, columns), mask_ratio=ratio, masking=masking, mask_cell=cell)
    assert torch.equal(alone.mask[0], masked.mask[1])  # a sample keeps its mask in any batch


def drawn(masking, *, grid=(14, 14), ratio=0.75, draws=4000, **more):
    noise = torch.rand(draws, grid[0] * grid[1], generator=torch.Generator().manual_seed(2))
    mask = mask_patches(noise, grid=grid, mask_ratio=ratio, masking=masking, **more).mask
    return mask.reshape(draws, *grid)


@pytest.mark.parametrize("masking", MASKINGS)
def test_masks_differ_between_samples(masking):
    assert len(drawn(masking, draws=64).flatten(1).unique(dim=0)) >= (4 if masking == "grid" else 60)


def test_blocks_hide_the_middle_more_often_than_the_border():
    share = drawn("block").mean(dim=0)
    # random masking has 0.75 everywhere, deviation 0.007 over 4000 draws
    assert share[6:8, 6:8].mean() > 0.85
    assert share[[0, 0, -1, -1], [0, -1, 0, -1]].mean() < 0.65


def test_blocks_are_few_and_large():
    """The neighbour of a hidden patch is hidden far more often than in 75 % of cases."""

    def neighbours(mask):
        return (mask[:, :, :-1] * mask[:, :, 1:]).sum() / mask[:, :, :-1].sum()

    assert neighbours(drawn("random")).item() == pytest.approx(0.75, abs=0.01)
    assert neighbours(drawn("block")) > 0.9


def test_a_grid_keeps_one_patch_of_every_two_by_two():
    visible = 1 - drawn("grid", draws=200)
    corners = [visible[:, row::2, column::2].sum(dim=(1, 2)) for row in (0, 1) for column in (0, 1)]
    counts = torch.stack(corners, dim=1)  # [draws, 4]: all 49 visible patches share the parity of row and column
    assert torch.equal(counts.sort(dim=1).values, torch.tensor([0.0, 0.0, 0.0, 49.0]).expand(200, 4))
    assert (counts.argmax(dim=1).bincount(minlength=4) > 25).all()  # each of the four about 50 times


def test_half_a_grid_is_a_chequerboard():
    mask = drawn("grid", ratio=0.5, draws=20)
    assert (mask[:, :, 1:] != mask[:, :, :-1]).all()
    assert (mask[:, 1:] != mask[:, :-1]).all()


@pytest.mark.parametrize(("side", "grid"), [(2, (14, 14)), (4, (16, 16)), (2, (8, 16))])
def test_cells_are_hidden_whole(side, grid):
    mask = drawn("cell", grid=grid, mask_cell=side, draws=50)
    cells = mask.unfold(1, side, side).unfold(2, side, side).mean(dim=(3, 4))  # share of each cell that is hidden
    cut = ((cells > 0) & (cells < 1)).sum(dim=(1, 2))
    assert cut.max() <= 1  # 49 visible patches are 12 cells of 2 x 2 and a quarter of one
    if cells[0].numel() % 4 == 0:
        assert cut.max() == 0


def test_cells_of_one_patch_are_random_masking(generator):
    noise = torch.rand(4, 24, generator=generator)
    cells = mask_patches(noise, grid=(6, 4), mask_ratio=0.75, masking="cell", mask_cell=1)
    assert torch.equal(cells.mask, random_mask(noise, mask_ratio=0.75).mask)


def test_cells_and_grids_hide_every_position_equally_often():
    for masking, more in (("cell", {"mask_cell": 2}), ("grid", {})):
        share = drawn(masking, grid=(8, 8), **more).mean(dim=0)
        # binomial deviation sqrt(0.75 * 0.25 / 4000) = 0.0069; five of them for 64 positions
        torch.testing.assert_close(share, torch.full((8, 8), 0.75), rtol=0, atol=0.035)
