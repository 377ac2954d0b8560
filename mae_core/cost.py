"""What a model costs: parameters, floating-point operations and memory, from its config alone.

Units:  parameters are counts; operations are FLOPs an image, 2 a multiply-add; matrix products alone are counted (norms,
        softmax, GELU and the loss are below 1 %); memory is bytes an image.
Errors: none.       Source: arithmetic over arXiv 2010.11929, section 3.1; backward as twice forward: arXiv 2001.08361, 2.1;
        what a block keeps for backward: arXiv 2205.05198, section 4.1; its attention: arXiv 2205.14135."""

from typing import Literal, NamedTuple

import torch

from mae_core.config import MAEConfig, ViTConfig
from mae_core.mae import MaskedAutoencoder
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


def _embedding_flops(config: ViTConfig, visible_patches: int) -> int:
    return 2 * visible_patches * config.patch_dim * config.embed_dim


def encoder_flops(config: ViTConfig, *, visible_patches: int) -> int:
    """FLOPs of one image through the encoder: `visible_patches` patches and the class tokens (num_patches: nothing hidden).

    Errors: none. Source: see the module.
    """
    tokens = config.cls_tokens + visible_patches
    block = _block_flops(tokens=tokens, dim=config.embed_dim, mlp_dim=config.mlp_dim)
    return _embedding_flops(config, visible_patches) + config.depth * block


def decoder_flops(config: MAEConfig) -> int:
    """FLOPs of one image through the decoder: every patch and class token, the head on predicted patches alone.

    Errors: none. Source: see the module.
    """
    encoder, dim = config.encoder, config.decoder_embed_dim
    tokens = encoder.cls_tokens + encoder.num_patches
    encoded = tokens if config.encoder_input == "all" else encoder.cls_tokens + config.visible_patches
    embedding = 2 * encoded * encoder.embed_dim * dim
    block = _block_flops(tokens=tokens, dim=dim, mlp_dim=config.decoder_mlp_dim)
    head = 2 * config.predicted_patches * dim * config.target_dim
    return embedding + config.decoder_depth * block + head


def forward_flops(config: MAEConfig) -> int:
    """FLOPs of one image through encoder and decoder. Errors: none. Source: see the module."""
    encoder = config.encoder
    if config.encoder_input == "visible":
        return encoder_flops(encoder, visible_patches=config.visible_patches) + decoder_flops(config)
    masked = _embedding_flops(encoder, encoder.num_patches - config.visible_patches)  # mask tokens are not embedded
    return encoder_flops(encoder, visible_patches=encoder.num_patches) - masked + decoder_flops(config)


def training_flops(config: MAEConfig) -> int:
    """FLOPs of one image's training step: backward costs twice forward, but for pixels, which need no gradient.

    Recomputation (activation checkpointing) is not counted. Errors: none. Source: see the module.
    """
    return 3 * forward_flops(config) - _embedding_flops(config.encoder, config.visible_patches)


def classifier_training_flops(config: ViTConfig, *, num_classes: int) -> int:
    """FLOPs of one image's training step of a classifier on the whole image, all weights trained; as `training_flops`.

    Errors: none. Source: see the module.
    """
    head = 2 * config.embed_dim * num_classes
    forward = encoder_flops(config, visible_patches=config.num_patches) + head
    return 3 * forward - _embedding_flops(config, config.num_patches)


Recompute = Literal["none", "blocks"]


class _Kept(NamedTuple):
    """Bytes of one image in a stack of blocks, kept from forward to backward."""

    stays: int
    recomputed: int  # on top of that while backward goes through one block, when blocks are recomputed


def _blocks_kept(
    *, depth: int, tokens: int, dim: int, mlp_dim: int, num_heads: int, bytes_per_value: int, recompute: Recompute
) -> _Kept:
    values = 8 * dim + 2 * mlp_dim  # a token: both norms in and out, q, k, v, attention's output; GELU in and out
    statistics = 2 * 2 + num_heads  # a token, float32: mean and deviation of both norms, a log-sum-exp a head
    block = tokens * (values * bytes_per_value + statistics * 4)
    if recompute == "none":
        return _Kept(depth * block, 0)
    block_input = tokens * dim * bytes_per_value
    return _Kept(depth * block_input, block - block_input)


def _encoder_kept(
    config: ViTConfig, *, embedded: int, tokens: int, bytes_per_value: int, recompute: Recompute
) -> _Kept:
    blocks = _blocks_kept(
        depth=config.depth,
        tokens=tokens,
        dim=config.embed_dim,
        mlp_dim=config.mlp_dim,
        num_heads=config.num_heads,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    patches = embedded * config.patch_dim * bytes_per_value
    norm = tokens * (config.embed_dim * bytes_per_value + 2 * 4)  # its input, mean and deviation
    return _Kept(patches + blocks.stays + norm, blocks.recomputed)


def _decoder_kept(config: MAEConfig, *, encoded: int, bytes_per_value: int, recompute: Recompute) -> _Kept:
    encoder, dim, predicted = config.encoder, config.decoder_embed_dim, config.predicted_patches
    tokens = encoder.cls_tokens + encoder.num_patches
    blocks = _blocks_kept(
        depth=config.decoder_depth,
        tokens=tokens,
        dim=dim,
        mlp_dim=config.decoder_mlp_dim,
        num_heads=config.decoder_num_heads,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    embedding = encoded * encoder.embed_dim * bytes_per_value
    norm = tokens * dim * bytes_per_value + predicted * 2 * 4  # all of its input is kept, though it reads a part
    head = predicted * (dim * bytes_per_value + config.target_dim * 4)  # its input, and the error in float32
    return _Kept(embedding + blocks.stays + norm + head, blocks.recomputed)


def activation_bytes(config: MAEConfig, *, bytes_per_value: int = 2, recompute: Recompute = "none") -> int:
    """Bytes of one image that autograd holds in the autoencoder when backward needs most.

    Counted for the eager model with fused attention and parameters of `bytes_per_value` bytes (2 bf16, 4 float32). Not counted:
    what a kernel needs while it runs, and gradients. Under autocast more is held (norms and the residual stream stay float32).
    recompute "blocks" (activation checkpointing) holds each block's input, and all of the one block that is recomputed.
    Errors: none. Source: see the module.
    """
    visible = config.encoder.cls_tokens + config.visible_patches
    encoded = visible if config.encoder_input == "visible" else config.encoder.cls_tokens + config.encoder.num_patches
    encoder = _encoder_kept(
        config.encoder,
        embedded=config.visible_patches,
        tokens=encoded,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    decoder = _decoder_kept(config, encoded=encoded, bytes_per_value=bytes_per_value, recompute=recompute)
    # backward frees the decoder before it reaches the encoder
    return encoder.stays + max(decoder.stays + decoder.recomputed, encoder.recomputed)


def encoder_activation_bytes(
    config: ViTConfig, *, visible_patches: int, bytes_per_value: int = 2, recompute: Recompute = "none"
) -> int:
    """Bytes of one image that autograd holds in the encoder, up to its final norm; see `activation_bytes`.

    `visible_patches` as for encoder_flops. Errors: none. Source: see the module.
    """
    kept = _encoder_kept(
        config,
        embedded=visible_patches,
        tokens=config.cls_tokens + visible_patches,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    return kept.stays + kept.recomputed
