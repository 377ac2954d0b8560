"""Positions: they equal Hugging Face's table, the axes are not swapped, and rectangular grids work."""

import numpy as np
import pytest
import torch

from mae_core import ConfigError, MAEConfig, ViTConfig, interpolate_positions, resized_encoder, sine_cosine_2d
from mae_core.positions import positions_of


def test_equals_hugging_face_table(hugging_face_peer):
    encoder = ViTConfig(image_size=(20, 20), patch_size=4, embed_dim=16, depth=1, num_heads=2)
    peer = hugging_face_peer(MAEConfig(encoder=encoder, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2))
    for theirs in (peer.vit.embeddings.position_embeddings[0], peer.decoder.decoder_pos_embed[0]):
        width = theirs.shape[1]
        assert torch.equal(theirs[0], torch.zeros(width))
        # both computed in float64 and rounded once to float32: one step of float32 at 1
        torch.testing.assert_close(sine_cosine_2d((5, 5), width), theirs[1:].detach(), rtol=0, atol=1.2e-7)


def test_first_half_is_the_column_and_second_the_row():
    table = sine_cosine_2d((3, 5), 8).reshape(3, 5, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 4, 4:])
    frequencies = 1 / 10000 ** (np.arange(2) / 2)
    by_hand = [*np.sin(4 * frequencies), *np.cos(4 * frequencies), *np.sin(2 * frequencies), *np.cos(2 * frequencies)]
    np.testing.assert_allclose(table[2, 4].numpy(), by_hand, atol=1.2e-7)  # one step of float32 at 1
    assert len({tuple(row) for row in table.reshape(-1, 8).tolist()}) == 15


def test_a_larger_grid_holds_the_smaller():
    large, small = sine_cosine_2d((4, 6), 8).reshape(4, 6, 8), sine_cosine_2d((2, 3), 8).reshape(2, 3, 8)
    assert torch.equal(large[:2, :3], small)


@pytest.mark.parametrize("learned", [False, True])
def test_a_patch_has_its_row_of_the_table_and_the_row_gets_its_gradient(learned):
    table, ids = torch.randn(6, 4).requires_grad_(learned), torch.tensor([[5, 0], [5, 3]])
    rows = positions_of(table, ids)
    assert torch.equal(rows, torch.stack([table[[5, 0]], table[[5, 3]]]))
    if learned:
        rows.sum().backward()
        assert table.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 2.0]


def test_odd_widths_are_refused():
    with pytest.raises(ConfigError, match="embed_dim=10"):
        sine_cosine_2d((2, 2), 10)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (8, 2), (1, 6)])
def test_the_same_grid_changes_nothing(grid, generator):
    table = torch.randn(grid[0] * grid[1], 8, generator=generator)
    assert torch.equal(interpolate_positions(table, old_grid=grid, new_grid=grid), table)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_finer_grid_keeps_rows_and_columns_in_order(grid, factor):
    rows, columns = grid
    row, column = (part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    table = torch.stack([row, column], dim=1).float()  # [L, 2]: each position holds its row and its column
    new = (rows * factor, columns * factor)
    found = interpolate_positions(table, old_grid=grid, new_grid=new).reshape(*new, 2)
    assert (found[1:, :, 0] > found[:-1, :, 0]).all()
    assert (found[:, 1:, 1] > found[:, :-1, 1]).all()
    # a row is the same in all its columns up to rounding: bicubic weights sum to 1 within one step of float32
    torch.testing.assert_close(found[:, :, 0], found[:, :1, 0].expand(new), rtol=0, atol=2e-6)
    torch.testing.assert_close(found[:, :, 1], found[:1, :, 1].expand(new), rtol=0, atol=2e-6)


def test_a_coarser_grid_averages_over_what_it_covers(generator):
    grid, table = (8, 12), torch.randn(96, 4, generator=generator)
    found = interpolate_positions(table, old_grid=grid, new_grid=(2, 3))
    image = table.reshape(8, 12, 4)
    for index in range(6):
        row, column = divmod(index, 3)
        changed = image.clone()
        changed[4 * row, 4 * column] += 1.0  # the corner of the region, which would not be read without antialiasing
        other = interpolate_positions(changed.reshape(96, 4), old_grid=grid, new_grid=(2, 3))
        assert (other[index] - found[index]).abs().min() > 1e-3


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ConfigError, match=r"15 positions does not fit old_grid=\(4, 4\)"):
        interpolate_positions(torch.zeros(15, 4), old_grid=(4, 4), new_grid=(8, 8))


def test_an_encoder_at_another_size_keeps_all_but_learned_positions(generator):
    config = ViTConfig(image_size=(16, 24), patch_size=4, embed_dim=16, depth=1, num_heads=2, positions="learned")
    weights = {"positions": torch.randn(24, 16, generator=generator), "cls_token": torch.zeros(1, 1, 16)}
    resized, at_size = resized_encoder(weights, config, image_size=(32, 24))
    assert at_size.grid == (8, 6)
    assert resized["cls_token"] is weights["cls_token"]
    expected = interpolate_positions(weights["positions"], old_grid=(4, 6), new_grid=(8, 6))
    assert torch.equal(resized["positions"], expected)
    assert weights["positions"].shape == (24, 16)
    with pytest.raises(ConfigError, match="height 30"):
        resized_encoder(weights, config, image_size=(30, 24))
