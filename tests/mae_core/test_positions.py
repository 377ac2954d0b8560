"""Positions: Hugging Face's table, axes not swapped, rectangles their own."""

import numpy as np
import pytest
import torch

from mae_core import ConfigError, MAEConfig, ViTConfig, sine_cosine_2d


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


def test_odd_widths_are_answered():
    with pytest.raises(ConfigError, match="embed_dim=10"):
        sine_cosine_2d((2, 2), 10)
