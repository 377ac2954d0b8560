"""The cost of a model in parameters, floating-point operations and memory, computed from its config alone.

Units: parameters are counts. Operations are FLOPs per image, 2 FLOPs per multiply-add; only matrix products are counted,
because norms, softmax, GELU and the loss add less than 1 %. Memory is in bytes per image.

Source: the operations of a block, arXiv 2010.11929, section 3.1; a backward pass costs twice the forward pass,
arXiv 2001.08361, section 2.1; the tensors a block saves for backward, arXiv 2205.05198, section 4.1, with the attention of
arXiv 2205.14135."""

from typing import Literal, NamedTuple

import torch

from mae_core.classification.heads import Classifier, freeze_below
from mae_core.config import MAEConfig, ViTConfig
from mae_core.mae import MaskedAutoencoder
from mae_core.vit import ViTEncoder


def parameter_count(config: MAEConfig | ViTConfig) -> int:
    """Count the trainable parameters of an autoencoder (MAEConfig) or of an encoder alone (ViTConfig).

    The model is built on the meta device, so counting takes no memory. Fixed position tables are not parameters.
    """
    with torch.device("meta"):
        model = (
            ViTEncoder(config)
            if isinstance(config, ViTConfig)
            else MaskedAutoencoder(config, generator=torch.Generator("cpu"))
        )
    return sum(parameter.numel() for parameter in model.parameters())


class WeightCount(NamedTuple):
    """Weights of a classifier."""

    trained: int
    frozen: int


def classifier_weights(config: ViTConfig, *, num_classes: int, trained_blocks: float | None = None) -> WeightCount:
    """Count the weights of a `Classifier`; `trained_blocks`: as in `freeze_below`, None where all are trained."""
    with torch.device("meta"):
        model = Classifier(ViTEncoder(config), num_classes=num_classes, generator=torch.Generator("cpu"))
    if trained_blocks is not None:
        freeze_below(model, trained_blocks=trained_blocks)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return WeightCount(trained, sum(parameter.numel() for parameter in model.parameters()) - trained)


def _mlp_flops(*, tokens: int, dim: int, mlp_dim: int) -> int:
    return 2 * tokens * 2 * dim * mlp_dim


def _block_flops(*, tokens: int, dim: int, mlp_dim: int) -> int:
    projections = 4 * dim * dim + 2 * dim * mlp_dim  # multiply-adds per token: qkv, proj, fc1, fc2
    attention = 2 * tokens * dim  # multiply-adds per token: scores, weighted sum
    return 2 * tokens * (projections + attention)


def _embedding_flops(config: ViTConfig, visible_patches: int) -> int:
    return 2 * visible_patches * config.patch_dim * config.embed_dim


def encoder_flops(config: ViTConfig, *, visible_patches: int) -> int:
    """Return the FLOPs of one image's forward pass through the encoder.

    The encoder sees class and register tokens and `visible_patches` patches; pass config.num_patches when nothing is hidden.
    """
    tokens = config.prefix_tokens + visible_patches
    block = _block_flops(tokens=tokens, dim=config.embed_dim, mlp_dim=config.mlp_dim)
    return _embedding_flops(config, visible_patches) + config.depth * block


def decoder_flops(config: MAEConfig) -> int:
    """Return the FLOPs of one image's forward pass through the decoder.

    The blocks run on every patch, class and register token, the head on predicted patches only.
    """
    encoder, dim = config.encoder, config.decoder_embed_dim
    tokens = encoder.prefix_tokens + encoder.num_patches
    encoded = tokens if config.encoder_input == "all" else encoder.prefix_tokens + config.visible_patches
    embedding = 2 * encoded * encoder.embed_dim * dim
    block = _block_flops(tokens=tokens, dim=dim, mlp_dim=config.decoder_mlp_dim)
    head = 2 * config.predicted_patches * dim * config.target_dim
    return embedding + config.decoder_depth * block + head


def forward_flops(config: MAEConfig) -> int:
    """Return the FLOPs of one image's forward pass through encoder and decoder."""
    encoder = config.encoder
    if config.encoder_input == "visible":
        return encoder_flops(encoder, visible_patches=config.visible_patches) + decoder_flops(config)
    masked = _embedding_flops(encoder, encoder.num_patches - config.visible_patches)  # mask tokens are not embedded
    return encoder_flops(encoder, visible_patches=encoder.num_patches) - masked + decoder_flops(config)


def training_flops(config: MAEConfig) -> int:
    """Return the FLOPs per image of a training step: three times the forward pass, less the gradient of the pixels.

    Pixels need no gradient, so the patch embedding is charged twice instead of three times. Operations repeated by
    activation checkpointing are not counted.
    """
    return 3 * forward_flops(config) - _embedding_flops(config.encoder, config.visible_patches)


def classifier_training_flops(config: ViTConfig, *, num_classes: int, trained_blocks: float | None = None) -> int:
    """Return the FLOPs per image of a fine-tuning step, in which every patch is visible.

    Counted as in `training_flops`. The backward pass ends at the first trained branch; `trained_blocks` is as in `freeze_below`.
    """
    head = 2 * config.embed_dim * num_classes
    forward = encoder_flops(config, visible_patches=config.num_patches) + head
    if trained_blocks is None or trained_blocks == config.depth:
        return 3 * forward - _embedding_flops(config, config.num_patches)
    block = {"tokens": config.cls_tokens + config.num_patches, "dim": config.embed_dim, "mlp_dim": config.mlp_dim}
    blocks, half = divmod(trained_blocks, 1)
    trained = int(blocks) * _block_flops(**block) + (_mlp_flops(**block) if half else 0)
    return forward + 2 * (trained + head)


def linear_probe_flops(*, dim: int, num_classes: int) -> int:
    """Return the FLOPs of one image's forward pass through a `LinearProbe`."""
    return 2 * dim * num_classes


def attentive_probe_flops(*, tokens: int, dim: int, num_queries: int, num_classes: int) -> int:
    """Return the FLOPs of one image's forward pass through an `AttentiveProbe`, whose heads share the width."""
    projections = 2 * tokens * dim * dim  # multiply-adds: keys, values
    attention = 2 * num_queries * tokens * dim  # scores, weighted sum
    return 2 * (projections + attention) + linear_probe_flops(dim=dim, num_classes=num_classes)


def efficient_probe_flops(*, tokens: int, dim: int, num_queries: int, num_classes: int) -> int:
    """Return the FLOPs of one image's forward pass through an `EfficientProbe`."""
    attention = 2 * num_queries * tokens * dim  # multiply-adds: scores, weighted sum
    return 2 * (attention + dim * dim) + linear_probe_flops(dim=dim, num_classes=num_classes)


Recompute = Literal["none", "blocks"]
"""What backward computes again instead of reading it from memory: nothing, or every block (activation checkpointing)."""


class _Saved(NamedTuple):
    """Bytes per image that part of a model saves in its forward pass for the backward pass."""

    held: int
    recomputed: int  # added while backward recomputes one block; 0 when nothing is recomputed


def _saved_by_blocks(
    *, depth: int, tokens: int, dim: int, mlp_dim: int, num_heads: int, bytes_per_value: int, recompute: Recompute
) -> _Saved:
    # per token: input and output of both norms, q, k, v and the output of attention, input and output of GELU
    values = 8 * dim + 2 * mlp_dim
    statistics = 2 * 2 + num_heads  # per token, float32: mean and deviation of both norms, one log-sum-exp per head
    block = tokens * (values * bytes_per_value + statistics * 4)
    if recompute == "none":
        return _Saved(depth * block, 0)
    block_input = tokens * dim * bytes_per_value
    return _Saved(depth * block_input, block - block_input)


def _saved_by_encoder(
    config: ViTConfig, *, embedded: int, tokens: int, bytes_per_value: int, recompute: Recompute
) -> _Saved:
    blocks = _saved_by_blocks(
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
    return _Saved(patches + blocks.held + norm, blocks.recomputed)


def _saved_by_decoder(config: MAEConfig, *, encoded: int, bytes_per_value: int, recompute: Recompute) -> _Saved:
    encoder, dim, predicted = config.encoder, config.decoder_embed_dim, config.predicted_patches
    tokens = encoder.prefix_tokens + encoder.num_patches
    blocks = _saved_by_blocks(
        depth=config.decoder_depth,
        tokens=tokens,
        dim=dim,
        mlp_dim=config.decoder_mlp_dim,
        num_heads=config.decoder_num_heads,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    embedding = encoded * encoder.embed_dim * bytes_per_value
    # the norm reads a slice of the last block's output, and autograd keeps the whole tensor behind that slice
    norm = tokens * dim * bytes_per_value + predicted * 2 * 4
    head = predicted * (dim * bytes_per_value + config.target_dim * 4)  # its input, and the error in float32
    return _Saved(embedding + blocks.held + norm + head, blocks.recomputed)


def activation_bytes(config: MAEConfig, *, bytes_per_value: int = 2, recompute: Recompute = "none") -> int:
    """Return the bytes per image that autograd holds in the autoencoder at the peak of a training step.

    The count is for the eager model with fused attention and parameters of `bytes_per_value` bytes (2 for bfloat16, 4 for
    float32). With `recompute="blocks"` (activation checkpointing) autograd holds the input of every block, and all
    activations of the one block it is recomputing.

    Gradients and the scratch memory of kernels are not counted. Autocast holds more than this, because it keeps norms and
    the residual stream in float32.
    """
    visible = config.encoder.prefix_tokens + config.visible_patches
    encoded = (
        visible if config.encoder_input == "visible" else config.encoder.prefix_tokens + config.encoder.num_patches
    )
    encoder = _saved_by_encoder(
        config.encoder,
        embedded=config.visible_patches,
        tokens=encoded,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    decoder = _saved_by_decoder(config, encoded=encoded, bytes_per_value=bytes_per_value, recompute=recompute)
    # Backward frees the decoder's activations before it reaches the encoder, so only one of the two recomputes at a time.
    return encoder.held + max(decoder.held + decoder.recomputed, encoder.recomputed)


def encoder_activation_bytes(
    config: ViTConfig, *, visible_patches: int, bytes_per_value: int = 2, recompute: Recompute = "none"
) -> int:
    """Return the bytes per image that autograd holds in the encoder, up to and including its final norm.

    `visible_patches` is as in `encoder_flops`; what is counted is as in `activation_bytes`.
    """
    saved = _saved_by_encoder(
        config,
        embedded=visible_patches,
        tokens=config.prefix_tokens + visible_patches,
        bytes_per_value=bytes_per_value,
        recompute=recompute,
    )
    return saved.held + saved.recomputed
