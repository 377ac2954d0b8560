"""The Masked Autoencoder: visible patches in, pixels of the hidden ones out.

Shapes: pixels [B, C, H, W], noise [B, L] -> loss [B], prediction [B, L - K, T], T = target_dim; n class tokens; Dd width of
        the decoder; M = predicted_patches.
Units:  pixels are normalised float32; the loss is in squared target units, float32 whatever the model computes in.
Errors: ConfigError where shapes do not fit the config; TypeError for half-precision pixels.
Source: He et al. 2022, arXiv 2111.06377, section 3.

Attention does not mind the order of tokens, positions tell them apart: the decoder takes visible tokens, then hidden ones,
each with its position, and nothing is put back into image order. Its head runs on predicted tokens alone. The same in the
paper's own order is mae_core.reference, against which this is tested."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.config import MAEConfig
from mae_core.errors import ConfigError
from mae_core.losses import mse_per_sample
from mae_core.masking import Masked, mask_patches
from mae_core.patches import gather_patches, patchify, unpatchify
from mae_core.positions import sine_cosine_2d
from mae_core.targets import PatchBasis, patches_of, target_of
from mae_core.vit import Block, Linear, MaskTokens, ViTEncoder, initialise


class MAEOutput(NamedTuple):
    """What one pass says about every sample."""

    loss: Tensor  # [B]            float32, mean over the predicted patches of the sample
    prediction: Tensor  # [B, L - K, T]  float32, hidden patches alone, in the order of masked.ids_hidden
    masked: Masked  # which patches were visible and which hidden


class Decoder(nn.Module):
    """Predicts patches from tokens; used in pretraining only.

    Its mask token stands for every hidden patch, unless the encoder has seen one already (encoder_input "all").
    Shapes: tokens [B, n + K, D] (or [B, n + L, D]), masked -> [B, M, T]. Errors: none. Source: arXiv 2111.06377, section 3.
    """

    positions: Tensor  # [L, Dd], recomputed and never stored

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        dim, eps = config.decoder_embed_dim, config.encoder.layer_norm_eps
        self.cls_tokens, self.predicted = config.encoder.cls_tokens, config.predicted_patches
        self.embed = Linear(config.encoder.embed_dim, dim)
        if config.encoder_input == "visible":
            self.mask_token = nn.Parameter(torch.full((1, 1, dim), math.nan))
        self.register_buffer("positions", sine_cosine_2d(config.encoder.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=config.decoder_num_heads, mlp_dim=config.decoder_mlp_dim, layer_norm_eps=eps)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = Linear(dim, config.target_dim)

    def forward(self, tokens: Tensor, masked: Masked) -> Tensor:
        """Predict patches: hidden ones in the order of masked.ids_hidden, after all visible ones when these are predicted too.

        Shapes, errors and source: the class's.
        """
        x = self.embed(tokens)  # [B, n + K, Dd] or [B, n + L, Dd]
        classes, patches = x[:, : self.cls_tokens], x[:, self.cls_tokens :]
        positions = self.positions.to(x.dtype).expand(len(x), -1, -1)  # [B, L, Dd]
        ids = torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)  # [B, L]
        if len(ids[0]) > patches.shape[1]:
            hidden = self.mask_token.to(x.dtype).expand(len(x), masked.ids_hidden.shape[1], -1)  # [B, L - K, Dd]
            patches = torch.cat([patches, hidden], dim=1)  # [B, L, Dd]
        x = torch.cat([classes, patches + gather_patches(positions, ids)], dim=1)  # class tokens: position zero
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(self.norm(x[:, -self.predicted :])))  # [B, M, T]


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder with their loss. `basis` is needed for target "pca" alone; it is no weight and stays float32.

    Shapes, units, errors and source: the module's.
    """

    def __init__(self, config: MAEConfig, *, generator: torch.Generator, basis: PatchBasis | None = None) -> None:
        super().__init__()
        self.config, self.basis = config, basis
        self.encoder = ViTEncoder(config.encoder)
        if config.encoder_input == "all":
            self.mask_token = nn.Parameter(torch.full((1, 1, config.encoder.embed_dim), math.nan))
        self.decoder = Decoder(config)
        initialise(self, generator=generator)

    def forward(self, pixels: Tensor, noise: Tensor) -> MAEOutput:
        """Hide patches by the noise, predict them, and say how far off each sample is.

        Shapes: pixels float32 [B, C, H, W]; noise uniform [B, L], which decides what is hidden -> MAEOutput.
        Errors and source: the module's.
        """
        config = self.config
        masked = self.mask(pixels, noise)
        mask_tokens = MaskTokens(self.mask_token, masked.ids_hidden) if config.encoder_input == "all" else None
        tokens = self.encoder(pixels, masked.ids_visible, None, mask_tokens)  # [B, n + K (+ L - K), D]
        prediction = self.decoder(tokens, masked).float()  # [B, M, T]
        ids = (
            masked.ids_hidden
            if config.loss_on == "hidden"
            else torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)
        )
        patches = gather_patches(patchify(pixels, config.encoder.patch_size), ids)  # [B, M, N]
        loss = mse_per_sample(prediction, target_of(patches, target=config.target, basis=self.basis_on(pixels.device)))
        return MAEOutput(loss, prediction[:, -masked.ids_hidden.shape[1] :], masked)

    def mask(self, pixels: Tensor, noise: Tensor) -> Masked:
        """What `forward` hides by this noise. Shapes, errors and source: as `forward`."""
        config = self.config
        if tuple(noise.shape) != (len(pixels), config.encoder.num_patches):
            raise ConfigError(
                f"noise of shape {tuple(noise.shape)} does not fit {len(pixels)} images of "
                f"{config.encoder.num_patches} patches: draw one number a patch"
            )
        return mask_patches(
            noise,
            grid=config.encoder.grid,
            mask_ratio=config.mask_ratio,
            masking=config.masking,
            mask_cell=config.mask_cell,
        )

    def basis_on(self, device: torch.device) -> PatchBasis | None:
        """The basis of target "pca" on a device. Shapes: PatchBasis. Errors: none. Source: none."""
        return None if self.basis is None else PatchBasis(*(part.to(device) for part in self.basis))

    def reconstruct(self, pixels: Tensor, output: MAEOutput) -> Tensor:
        """Images for display: hidden patches show the prediction, visible ones the original.

        With target "normalised" each predicted patch takes mean and deviation of the true one, which leaks its brightness
        and contrast: label such pictures. Shapes: pixels [B, C, H, W] -> float32 [B, C, H, W], still normalised by channel
        (denormalise_pixels undoes that). Errors: as patchify. Source: arXiv 2111.06377, figure 2.
        """
        encoder = self.config.encoder
        patches = patchify(pixels.float(), encoder.patch_size)  # [B, L, N]
        shown = patches_of(
            output.prediction,
            true_patches=gather_patches(patches, output.masked.ids_hidden),
            target=self.config.target,
            basis=self.basis_on(pixels.device),
        )  # [B, L - K, N]
        index = output.masked.ids_hidden.unsqueeze(-1).expand_as(shown)
        return unpatchify(patches.scatter(1, index, shown), grid=encoder.grid, patch_size=encoder.patch_size)
