"""The Masked Autoencoder: visible patches in, pixels of the hidden ones out.

Shapes: pixels [B, C, H, W], noise [B, L] -> loss [B], prediction [B, L - K, N], N = P * P * C; Dd width of the decoder.
Units:  pixels are normalised float32; the loss is in squared target units, float32 whatever the model computes in.
Errors: ConfigError where shapes do not fit the config; TypeError for half-precision pixels.
Source: He et al. 2022, arXiv 2111.06377, section 3.

Attention does not mind the order of tokens, positions tell them apart: the decoder takes visible tokens, then hidden ones,
each with its position, and nothing is put back into image order. Its head runs on hidden tokens alone."""

import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.config import MAEConfig
from mae_core.errors import ConfigError
from mae_core.losses import hidden_mse_per_sample
from mae_core.masking import Masked, random_mask
from mae_core.patches import gather_patches, patch_statistics, patchify, targets, unpatchify
from mae_core.positions import sine_cosine_2d
from mae_core.vit import Block, Linear, ViTEncoder, initialise

DECODER_MLP_RATIO = 4
"""Width of the decoder's hidden MLP layers in multiples of decoder_embed_dim, as in the encoder of the paper."""


class MAEOutput(NamedTuple):
    """What one pass says about every sample."""

    loss: Tensor  # [B]            float32, mean over the hidden patches of the sample
    prediction: Tensor  # [B, L - K, N]  float32, in the order of masked.ids_hidden
    masked: Masked  # which patches were visible and which hidden


class Decoder(nn.Module):
    """Predicts hidden patches from visible tokens; used in pretraining only.

    Shapes: tokens [B, 1 + K, D], masked -> [B, L - K, N]. Errors: none. Source: arXiv 2111.06377, section 3.
    """

    positions: Tensor  # [L, Dd], recomputed and never stored

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        dim, eps = config.decoder_embed_dim, config.encoder.layer_norm_eps
        self.embed = Linear(config.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.full((1, 1, dim), math.nan))
        self.register_buffer("positions", sine_cosine_2d(config.encoder.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=config.decoder_num_heads, mlp_dim=DECODER_MLP_RATIO * dim, layer_norm_eps=eps)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = Linear(dim, config.encoder.patch_dim)

    def forward(self, tokens: Tensor, masked: Masked) -> Tensor:
        """Predict every hidden patch, in the order of masked.ids_hidden. Shapes, errors and source: the class's."""
        x = self.embed(tokens)  # [B, 1 + K, Dd]
        positions = self.positions.to(x.dtype).expand(len(x), -1, -1)  # [B, L, Dd]
        visible = x[:, 1:] + gather_patches(positions, masked.ids_visible)  # [B, K, Dd]
        hidden = self.mask_token.to(x.dtype) + gather_patches(positions, masked.ids_hidden)  # [B, L - K, Dd]
        x = torch.cat([x[:, :1], visible, hidden], dim=1)  # [B, 1 + L, Dd], the class token's position is zero
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(self.norm(x[:, -hidden.shape[1] :])))  # [B, L - K, N]


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder with their loss. Shapes, units, errors and source: the module's."""

    def __init__(self, config: MAEConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViTEncoder(config.encoder)
        self.decoder = Decoder(config)
        initialise(self, generator=generator)

    def forward(self, pixels: Tensor, noise: Tensor) -> MAEOutput:
        """Hide patches by the noise, predict them, and say how far off each sample is.

        Shapes: pixels float32 [B, C, H, W]; noise uniform [B, L], which decides what is hidden -> MAEOutput.
        Errors and source: the module's.
        """
        config = self.config
        if tuple(noise.shape) != (len(pixels), config.encoder.num_patches):
            raise ConfigError(
                f"noise of shape {tuple(noise.shape)} does not fit {len(pixels)} images of "
                f"{config.encoder.num_patches} patches: draw one number a patch"
            )
        masked = random_mask(noise, mask_ratio=config.mask_ratio)
        target = targets(pixels, patch_size=config.encoder.patch_size, target=config.target)  # [B, L, N] float32
        tokens = self.encoder(pixels, masked.ids_visible)  # [B, 1 + K, D]
        prediction = self.decoder(tokens, masked).float()  # [B, L - K, N]
        loss = hidden_mse_per_sample(prediction, gather_patches(target, masked.ids_hidden))  # [B]
        return MAEOutput(loss, prediction, masked)


def reconstruct(pixels: Tensor, output: MAEOutput, *, patch_size: int, mode: Literal["raw", "true_stats"]) -> Tensor:
    """Images for display: hidden patches show the prediction, visible ones the original.

    "raw" shows the prediction as it is (target "raw"). "true_stats" gives each predicted patch the mean and deviation of
    the true patch (target "normalised"); that leaks the hidden patch's brightness and contrast: label such pictures.
    Shapes: pixels [B, C, H, W] -> float32 [B, C, H, W], still normalised by channel (denormalise_pixels undoes that).
    Errors: ConfigError for another mode, or as patchify. Source: arXiv 2111.06377, figure 2.
    """
    if mode not in ("raw", "true_stats"):
        raise ConfigError(f"mode={mode!r} is unknown: write one of raw, true_stats")
    patches = patchify(pixels.float(), patch_size)  # [B, L, N]
    prediction = output.prediction  # [B, L - K, N]
    index = output.masked.ids_hidden.unsqueeze(-1).expand_as(prediction)
    if mode == "true_stats":
        mean, deviation = patch_statistics(patches.gather(1, index))  # [B, L - K, 1]
        prediction = prediction * deviation + mean
    grid = (pixels.shape[2] // patch_size, pixels.shape[3] // patch_size)
    return unpatchify(patches.scatter(1, index, prediction), grid=grid, patch_size=patch_size)
