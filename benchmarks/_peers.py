"""Masked autoencoders of other libraries with our weights: the same loss, computed their way.

Shapes: pixels [B, C, H, W], noise [B, L] -> mean loss, a scalar.
Errors: ImportError if the library is missing; check with `installed` first.
Source: transformers' ViTMAEForPreTraining. timm has blocks but no autoencoder, so ours is assembled from its blocks the way public
implementations do it (the order of arXiv 2111.06377, section 3): embed every patch with a convolution, shuffle and drop, append
mask tokens, unshuffle, predict every patch, weight the loss by the mask."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mae_core import MAEConfig, patchify, sine_cosine_2d, to_hf_vitmae, visible_count
from mae_core.patches import gather_patches
from mae_core.targets import VARIANCE_EPS

Loss = Callable[[Tensor, Tensor], Tensor]
"""(pixels, noise) -> mean loss of the batch."""


def installed(library: str) -> bool:
    """Return whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


def hugging_face(config: MAEConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a ViTMAEForPreTraining with fused attention and the weights of MaskedAutoencoder(config).

    The images must be square, and there must be one class token.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder = config.encoder
    theirs = ViTMAEConfig(
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
        decoder_intermediate_size=config.decoder_mlp_dim,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.target == "normalised",
        attn_implementation="sdpa",
    )
    peer: nn.Module = ViTMAEForPreTraining(theirs)
    peer.load_state_dict(to_hf_vitmae(weights, config))  # position tables too, which transformers 5.23 leaves at zero
    return peer.train()


def hugging_face_loss(peer: Callable[..., object]) -> Loss:
    """Return the forward pass of `peer`, compiled or not, as a Loss."""

    def loss(pixels: Tensor, noise: Tensor) -> Tensor:
        value: Tensor = peer(pixel_values=pixels, noise=noise).loss  # type: ignore[attr-defined]
        return value

    return loss


class TimmAutoencoder(nn.Module):
    """An autoencoder made of timm's blocks and patch embedding."""

    encoder_positions: Tensor  # [1, L, D]
    decoder_positions: Tensor  # [1, L, Dd]

    def __init__(self, config: MAEConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block, PatchEmbed

        encoder, width = config.encoder, config.decoder_embed_dim
        norm = partial(nn.LayerNorm, eps=encoder.layer_norm_eps)
        self.config = config
        self.patch_embed = PatchEmbed(
            img_size=encoder.image_size,
            patch_size=encoder.patch_size,
            in_chans=encoder.in_channels,
            embed_dim=encoder.embed_dim,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, encoder.cls_tokens, encoder.embed_dim))
        self.register_buffer(
            "encoder_positions", sine_cosine_2d(encoder.grid, encoder.embed_dim)[None], persistent=False
        )
        self.encoder_blocks = nn.Sequential(
            *(
                Block(encoder.embed_dim, encoder.num_heads, encoder.mlp_ratio, qkv_bias=True, norm_layer=norm)
                for _ in range(encoder.depth)
            )
        )
        self.encoder_norm = norm(encoder.embed_dim)
        self.narrow = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_positions", sine_cosine_2d(encoder.grid, width)[None], persistent=False)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(width, config.decoder_num_heads, config.decoder_mlp_ratio, qkv_bias=True, norm_layer=norm)
                for _ in range(config.decoder_depth)
            )
        )
        self.decoder_norm = norm(width)
        self.head = nn.Linear(width, config.target_dim)
        self.load_state_dict(_timm_names(config, weights))

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Return the mean loss."""
        n, patch_size = self.config.encoder.cls_tokens, self.config.encoder.patch_size
        count = visible_count(noise.shape[1], self.config.mask_ratio)
        shuffle = noise.argsort(dim=1)  # [B, L]
        unshuffle = shuffle.argsort(dim=1)  # [B, L]
        mask = (unshuffle >= count).float()  # [B, L], 1.0 = hidden

        x = self.patch_embed(pixels) + self.encoder_positions  # [B, L, D]
        x = gather_patches(x, shuffle[:, :count])  # [B, K, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.narrow(self.encoder_norm(self.encoder_blocks(x)))  # [B, n + K, Dd]

        appended = torch.cat(
            [x[:, n:], self.mask_token.expand(len(x), noise.shape[1] - count, -1)], dim=1
        )  # [B, L, Dd]
        patches = gather_patches(appended, unshuffle) + self.decoder_positions
        x = self.decoder_norm(self.decoder_blocks(torch.cat([x[:, :n], patches], dim=1)))
        prediction = self.head(x)[:, n:]  # [B, L, T]

        target = patchify(pixels, patch_size)  # [B, L, N]
        if self.config.target == "normalised":
            deviation = (target.var(dim=-1, keepdim=True) + VARIANCE_EPS).sqrt()
            target = (target - target.mean(dim=-1, keepdim=True)) / deviation
        error = (prediction - target).square().mean(dim=-1)  # [B, L]
        loss: Tensor = (error * mask).sum() / mask.sum()
        return loss


def _timm_names(config: MAEConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to the names in TimmAutoencoder; inside the blocks the names are the same."""
    prefixes = {
        "encoder.patch_embed.": "patch_embed.proj.",
        "encoder.cls_token": "cls_token",
        "encoder.blocks.": "encoder_blocks.",
        "encoder.norm.": "encoder_norm.",
        "decoder.embed.": "narrow.",
        "decoder.mask_token": "mask_token",
        "decoder.blocks.": "decoder_blocks.",
        "decoder.norm.": "decoder_norm.",
        "decoder.head.": "head.",
    }
    theirs = {
        there + name.removeprefix(here): tensor
        for name, tensor in weights.items()
        for here, there in prefixes.items()
        if name.startswith(here)
    }
    kernel = theirs["patch_embed.proj.weight"]  # [D, P * P * C]
    side = config.encoder.patch_size
    theirs["patch_embed.proj.weight"] = kernel.reshape(len(kernel), side, side, -1).permute(0, 3, 1, 2)  # [D, C, P, P]
    return theirs
