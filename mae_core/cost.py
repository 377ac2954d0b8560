"""What a model costs: parameters and floating-point operations, from its config alone.

Units:  parameters are counts; operations are FLOPs an image, 2 a multiply-add; matrix products alone are counted (norms,
        softmax, GELU and the loss are below 1 %).
Errors: none.       Source: arithmetic over arXiv 2010.11929, section 3.1; backward as twice forward: arXiv 2001.08361, 2.1."""

import torch

from mae_core.config import MAEConfig, ViTConfig
from mae_core.mae import DECODER_MLP_RATIO, MaskedAutoencoder
from mae_core.vit import ViTEncoder


def parameter_count(config: MAEConfig | ViTConfig) -> int:
    """Trainable parameters of the autoencoder (MAEConfig) or the encoder alone (ViTConfig); takes no memory.

    The fixed position tables are no parameters. Errors: none. Source: the modules themselves, on the meta device.
    """
    with torch.device("meta"):
        model = (
            ViTEncoder(config)
            if isinstance(config, ViTConfig)
            else MaskedAutoencoder(config, generator=torch.Generator("cpu"))
        )
    return sum(parameter.numel() for parameter in model.parameters())


def _block_flops(*, tokens: int, dim: int, mlp_dim: int) -> int:
    projections = 4 * dim * dim + 2 * dim * mlp_dim  # multiply-adds a token: qkv, proj, fc1, fc2
    attention = 2 * tokens * dim  # multiply-adds a token: scores, weighted sum
    return 2 * tokens * (projections + attention)


def encoder_flops(config: ViTConfig, *, visible_patches: int) -> int:
    """FLOPs of one image through the encoder, `visible_patches` patches and the class token (num_patches: nothing hidden).

    Errors: none. Source: see the module.
    """
    embedding = 2 * visible_patches * config.patch_dim * config.embed_dim
    block = _block_flops(tokens=visible_patches + 1, dim=config.embed_dim, mlp_dim=config.mlp_dim)
    return embedding + config.depth * block


def forward_flops(config: MAEConfig) -> int:
    """FLOPs of one image through encoder (K + 1 tokens) and decoder (L + 1 tokens, head on the L - K hidden ones).

    Errors: none. Source: see the module.
    """
    visible, dim = config.visible_patches, config.decoder_embed_dim
    hidden = config.encoder.num_patches - visible
    embedding = 2 * (visible + 1) * config.encoder.embed_dim * dim
    block = _block_flops(tokens=config.encoder.num_patches + 1, dim=dim, mlp_dim=DECODER_MLP_RATIO * dim)
    head = 2 * hidden * dim * config.encoder.patch_dim
    return encoder_flops(config.encoder, visible_patches=visible) + embedding + config.decoder_depth * block + head


def training_flops(config: MAEConfig) -> int:
    """FLOPs of one image's training step: three forward passes (backward costs two); recomputation is not counted.

    Errors: none. Source: see the module.
    """
    return 3 * forward_flops(config)
