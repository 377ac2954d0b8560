"""Fixtures for the tests of mae_core: one thread, tiny shapes, every number from a seeded generator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_core import MAEConfig, ViTConfig, sine_cosine_2d

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def vit_config() -> ViTConfig:
    return ViTConfig(image_size=(24, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture
def mae_config(vit_config: ViTConfig) -> MAEConfig:
    return MAEConfig(encoder=vit_config, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2)


@pytest.fixture
def draw(generator: torch.Generator) -> Callable[[ViTConfig, int], tuple[Tensor, Tensor]]:
    """Pixels [B, C, H, W] and noise [B, L] for a config."""

    def batch(config: ViTConfig, size: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randn(size, config.in_channels, *config.image_size, generator=generator)
        return pixels, torch.rand(size, config.num_patches, generator=generator)

    return batch


@pytest.fixture
def hugging_face_peer() -> Callable[[MAEConfig], ViTMAEForPreTraining]:
    """A ViTMAEForPreTraining of a config's shape, with every weight moved well off its initial value so that each one counts."""

    def build(config: MAEConfig) -> ViTMAEForPreTraining:
        encoder = config.encoder
        peer = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=encoder.embed_dim,
                num_hidden_layers=encoder.depth,
                num_attention_heads=encoder.num_heads,
                intermediate_size=encoder.mlp_dim,
                layer_norm_eps=encoder.layer_norm_eps,
                image_size=encoder.image_size[0],
                patch_size=encoder.patch_size,
                decoder_hidden_size=config.decoder_embed_dim,
                decoder_num_hidden_layers=config.decoder_depth,
                decoder_num_attention_heads=config.decoder_num_heads,
                decoder_intermediate_size=4 * config.decoder_embed_dim,
                mask_ratio=config.mask_ratio,
                norm_pix_loss=config.target == "normalised",
                attn_implementation="eager",
            )
        )
        initialise_positions(peer, encoder.image_size[0] ** 2 // encoder.patch_size**2)
        if encoder.grid[0] != encoder.grid[1]:
            give_tables(peer, encoder.grid)
        generator = torch.Generator().manual_seed(3)
        # 0.3 per weight at a width of 16; wider sums need smaller moves to change by the same amount
        move = 1.2 / encoder.embed_dim**0.5
        with torch.no_grad():
            for parameter in peer.parameters():
                if parameter.requires_grad:
                    parameter.add_(move * torch.randn(parameter.shape, generator=generator))
        return peer

    return build


def initialise_positions(peer: ViTMAEForPreTraining, num_patches: int) -> None:
    """Fill the position tables of a fresh model. transformers 5.23 leaves them at zero, because its own marks make it skip them."""
    for marked in (*peer.modules(), *peer.parameters()):
        vars(marked).pop("_is_hf_initialized", None)
    peer.vit.embeddings.initialize_weights()
    peer.decoder.initialize_weights(num_patches)


def give_tables(peer: ViTMAEForPreTraining, grid: tuple[int, int]) -> None:
    """Give a model the position tables of a rectangular grid, which transformers can neither compute nor keep unstretched.

    Call such a model with interpolate_pos_encoding=True.
    """
    for module, name in ((peer.vit.embeddings, "position_embeddings"), (peer.decoder, "decoder_pos_embed")):
        width = getattr(module, name).shape[2]
        table = torch.cat([torch.zeros(1, width), sine_cosine_2d(grid, width)])[None]
        setattr(module, name, torch.nn.Parameter(table, requires_grad=False))
        module.interpolate_pos_encoding = lambda *_, module=module, name=name: getattr(module, name)
