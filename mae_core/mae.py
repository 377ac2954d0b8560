"""The Masked Autoencoder: it encodes the visible patches of an image and predicts the hidden ones.

Attention does not depend on the order of its tokens, because positions tell them apart. The decoder therefore takes the
visible tokens first and the hidden ones after them, each with its position, and nothing is put back into image order; its
head runs on predicted tokens only. `reference_forward` computes the same in the paper's order, and the tests compare the
two.

Shapes: pixels [B, C, H, W], noise [B, L] -> loss [B], prediction [B, L - K, T]. B images, L patches each, K of them
visible, M predicted; n class tokens; D is the width of the encoder, Dd that of the decoder; T = target_dim.

Units: pixels are normalised float32. The loss is in squared units of the target, and float32 whatever dtype the model
computes in.

Source: He et al. 2022, arXiv 2111.06377, section 3."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.config import MAEConfig
from mae_core.constants import Constants
from mae_core.errors import ConfigError
from mae_core.losses import mse_per_sample
from mae_core.masking import Masked, mask_patches
from mae_core.patches import cut_patches, gather_patches, patchify, unpatchify
from mae_core.positions import positions_of, sine_cosine_2d
from mae_core.targets import PatchBasis, patches_of, target_of
from mae_core.vit import Block, Linear, MaskTokens, ViTEncoder, initialise


class MAEOutput(NamedTuple):
    """The result of one forward pass, per sample."""

    loss: Tensor
    """float32 [B], the mean over the sample's predicted patches."""
    prediction: Tensor
    """float32 [B, L - K, T], the hidden patches only, in the order of `masked.ids_hidden`."""
    masked: Masked
    """Which patches were visible and which were hidden."""


class Decoder(nn.Module):
    """Predict patches from the encoder's tokens; used in pretraining only.

    The decoder puts its learnt mask token in the place of every hidden patch, unless the encoder has seen mask tokens
    already (`encoder_input="all"`).
    """

    positions: Tensor  # [L, Dd], recomputed from the config and never stored

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        dim, eps = config.decoder_embed_dim, config.encoder.layer_norm_eps
        self.prefix_tokens, self.predicted = config.encoder.prefix_tokens, config.predicted_patches
        self.embed = Linear(config.encoder.embed_dim, dim)
        if config.encoder_input == "visible":
            self.mask_token = nn.Parameter(torch.full((1, 1, dim), math.nan))
        # a buffer, so that it moves with the module; not stored, so that another grid can load the same weights
        self.register_buffer("positions", sine_cosine_2d(config.encoder.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads=config.decoder_num_heads, mlp_dim=config.decoder_mlp_dim, layer_norm_eps=eps)
            for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = Linear(dim, config.target_dim)

    def forward(self, tokens: Tensor, masked: Masked) -> Tensor:
        """Return the predicted patches: the hidden ones, after the visible ones where those are predicted too.

        Each part is in the order of its ids in `masked`.

        Shapes: tokens [B, n + K, D], or [B, n + L, D] when the encoder saw mask tokens -> [B, M, T].
        """
        x = self.embed(tokens)  # [B, n + K, Dd] or [B, n + L, Dd]
        n, K = self.prefix_tokens, masked.ids_visible.shape[1]
        prefix, visible, hidden = x.split([n, K, x.shape[1] - n - K], dim=1)  # [B, n], [B, K], [B, L - K or 0]
        if hidden.shape[1] == 0:
            hidden = self.mask_token.to(x.dtype)  # [1, 1, Dd]
        table = self.positions.to(x.dtype)
        visible = visible + positions_of(table, masked.ids_visible)  # [B, K, Dd]
        hidden = hidden + positions_of(table, masked.ids_hidden)  # [B, L - K, Dd]
        # class and register tokens get no position: theirs is zero
        x = torch.cat([prefix, visible, hidden], dim=1)  # [B, n + L, Dd]
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.head(self.norm(x[:, -self.predicted :])))  # [B, M, T]


class MaskedAutoencoder(nn.Module):
    """Pretrain an encoder: hide patches, predict them with a decoder, and return the loss per sample.

    `generator` draws the initial weights. `basis` is needed for `target="pca"` only. It is neither a parameter nor a
    buffer, so casting the model leaves it in float32, and a state dict does not hold it.
    """

    def __init__(self, config: MAEConfig, *, generator: torch.Generator, basis: PatchBasis | None = None) -> None:
        super().__init__()
        self.config = config
        self._basis = None if basis is None else Constants(*basis)
        self.encoder = ViTEncoder(config.encoder)
        if config.encoder_input == "all":
            self.mask_token = nn.Parameter(torch.full((1, 1, config.encoder.embed_dim), math.nan))
        self.decoder = Decoder(config)
        initialise(self, generator=generator)

    def forward(self, pixels: Tensor, noise: Tensor) -> MAEOutput:
        """Hide the patches that the noise selects, predict them, and return the loss of every sample.

        Shapes: pixels float32 [B, C, H, W]; noise [B, L], uniform in [0, 1) -> MAEOutput.

        Raises:
            ConfigError: The shape of pixels or noise does not fit the config, or `target="pca"` has no basis.
            TypeError: The pixels are in half precision.
        """
        config = self.config
        masked = self.mask(pixels, noise)
        mask_tokens = MaskTokens(self.mask_token, masked.ids_hidden) if config.encoder_input == "all" else None
        tokens = self.encoder(pixels, masked.ids_visible, None, mask_tokens)  # [B, n + K (+ L - K), D]
        # the targets are cut from the float32 pixels below, never from what the encoder cast to its own dtype
        prediction = self.decoder(tokens, masked).float()  # [B, M, T]
        loss = self.losses(prediction, pixels, masked)
        return MAEOutput(loss, prediction[:, -masked.ids_hidden.shape[1] :], masked)

    def losses(self, prediction: Tensor, pixels: Tensor, masked: Masked) -> Tensor:
        """Return the loss of every sample, over the patches that `loss_on` names.

        Shapes: prediction [B, M, T], pixels float32 [B, C, H, W] -> float32 [B].
        """
        config = self.config
        ids = (
            masked.ids_hidden
            if config.loss_on == "hidden"
            else torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)
        )
        patches = cut_patches(pixels, config.encoder.patch_size, ids)  # [B, M, N]
        target = target_of(patches, target=config.target, basis=self.basis_on(pixels.device))
        return mse_per_sample(prediction, target)

    def mask(self, pixels: Tensor, noise: Tensor) -> Masked:
        """Return the mask that `forward` applies for this noise. Only the batch size of `pixels` is used.

        Raises:
            ConfigError: The noise is not [B, L].
        """
        config = self.config
        if tuple(noise.shape) != (len(pixels), config.encoder.num_patches):
            raise ConfigError(
                f"noise of shape {tuple(noise.shape)} does not fit {len(pixels)} images of "
                f"{config.encoder.num_patches} patches: draw one number per patch"
            )
        return mask_patches(
            noise,
            grid=config.encoder.grid,
            mask_ratio=config.mask_ratio,
            masking=config.masking,
            mask_cell=config.mask_cell,
        )

    def basis_on(self, device: torch.device) -> PatchBasis | None:
        """Return the basis of target "pca" on a device, or None if there is none."""
        return None if self._basis is None else PatchBasis(*self._basis.on(device))

    def reconstruct(self, pixels: Tensor, output: MAEOutput) -> Tensor:
        """Return images for display: predictions in place of the hidden patches, the original pixels elsewhere.

        With target "normalised" each prediction is rescaled by the true patch's mean and standard deviation. That leaks
        the brightness and contrast of the original, so say so next to such a picture.

        Shapes: pixels [B, C, H, W] -> float32 [B, C, H, W], still normalised per channel; `denormalise_pixels` undoes
        that.

        Source: arXiv 2111.06377, figure 2.
        """
        encoder = self.config.encoder
        patches = patchify(pixels.float(), encoder.patch_size)  # [B, L, N]
        shown = patches_of(
            output.prediction,
            true_patches=gather_patches(patches, output.masked.ids_hidden),
            target=self.config.target,
            basis=self.basis_on(pixels.device),
        )  # [B, L - K, N]
        index = output.masked.ids_hidden.unsqueeze(-1).expand_as(shown)  # [B, L - K, N], a view
        return unpatchify(patches.scatter(1, index, shown), grid=encoder.grid, patch_size=encoder.patch_size)
