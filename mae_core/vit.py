"""The Vision Transformer encoder: pixels in, tokens out, for all patches or for the visible ones only.

Weights are NaN until `initialise` or `load_state_dict` fills them. Constructing a module therefore leaves torch's global
random generator untouched, and a model whose weights were never filled cannot be mistaken for a trained one.

Shapes: pixels [B, C, H, W], patches [B, L, N], ids_visible [B, K] -> tokens [B, n + K, D], the n class and register tokens first.
T tokens and h heads inside a block; M hidden patches that have a mask token.

Units: pixels are normalised float32 (see `normalise_pixels`); the encoder casts them to the dtype of its parameters.

Source: Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1; He et al. 2022, arXiv 2111.06377, section 3 and A.1."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.config import ViTConfig
from mae_core.errors import ConfigError
from mae_core.patches import cut_patches, patchify
from mae_core.positions import positions_of, sine_cosine_2d


class Linear(nn.Linear):
    """An nn.Linear whose weights start as NaN, so that construction draws no random numbers."""

    def reset_parameters(self) -> None:
        """Fill weight and bias with NaN."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Source: arXiv 1706.03762, section 3.2.
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token attend to all tokens of its image: [B, T, D] -> [B, T, D]."""
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)  # [B, T, 3, h, D/h]
        # unbound in place and then transposed: the backward pass stacks the three gradients where they belong, in one copy
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each [B, h, T, D/h]
        # fused: the [T, T] scores never reach memory, so autograd need not keep them
        x = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, h, T, D/h]
        return cast("Tensor", self.proj(x.transpose(1, 2).reshape(B, T, D)))  # [B, T, D]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them.

    Source: arXiv 2010.11929, section 3.1; arXiv 1606.08415 (GELU).
    """

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token independently: [..., D] -> [..., D]."""
        # exact, not the tanh approximation: the released MAE and timm weights were trained with it
        return cast("Tensor", self.fc2(nn.functional.gelu(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm Transformer block: attention and an MLP, each behind a LayerNorm and added to its input.

    Source: arXiv 2010.11929, equations 2 and 3.
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.attn = Attention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.mlp = Mlp(dim, hidden_dim=mlp_dim)

    def forward(self, x: Tensor, drop_scale: Tensor | None = None) -> Tensor:
        """Add the output of attention, then that of the MLP, to every token.

        `drop_scale` multiplies each sample's two branches: 0 drops a branch, and None leaves both as they are.

        Shapes: x [B, T, D], drop_scale [B, 2] -> [B, T, D].

        Source: arXiv 1603.09382 for dropping branches.
        """
        # pretraining drops nothing, so it is spared the two multiplications per block
        if drop_scale is None:
            x = x + self.attn(self.norm1(x))
            return cast("Tensor", x + self.mlp(self.norm2(x)))
        scale = drop_scale.to(x.dtype)[:, :, None, None]  # [B, 2, 1, 1]
        x = x + scale[:, 0] * self.attn(self.norm1(x))
        return cast("Tensor", x + scale[:, 1] * self.mlp(self.norm2(x)))


class PatchEmbed(Linear):
    """Linear embedding of flattened patches: [B, L, P * P * C] -> [B, L, D]. Equals a convolution of stride P.

    Source: arXiv 2010.11929, equation 1.
    """


class MaskTokens(NamedTuple):
    """The learnt token that replaces every hidden patch in the encoder when `MAEConfig.encoder_input` is "all"."""

    token: Tensor
    """[1, 1, D], a parameter of the autoencoder."""
    ids: Tensor
    """int64 [B, M], the hidden patches."""


class ViTEncoder(nn.Module):
    """Encode images into tokens: patch embedding, class and register tokens, positions, blocks, final norm.

    With a `generator` the weights are initialised from it; without one they are NaN until they are loaded.

    With fixed positions, the weights of one image size serve every other: build the encoder for the new size and load
    them. `resized_encoder` handles learned positions too.
    """

    positions: Tensor  # [L, D]: a parameter when learned, otherwise recomputed from the config and never stored

    def __init__(self, config: ViTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_dim, config.embed_dim)
        self.cls_token = nn.Parameter(torch.full((1, config.cls_tokens, config.embed_dim), math.nan))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.full((1, config.num_register_tokens, config.embed_dim), math.nan))
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.full((config.num_patches, config.embed_dim), math.nan))
        else:
            self.register_buffer("positions", sine_cosine_2d(config.grid, config.embed_dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(
                config.embed_dim,
                num_heads=config.num_heads,
                mlp_dim=config.mlp_dim,
                layer_norm_eps=config.layer_norm_eps,
            )
            for _ in range(config.depth)
        )
        self.norm: nn.Module = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        if generator is not None:
            initialise(self, generator=generator)

    def embed(self, pixels: Tensor, ids_visible: Tensor | None, mask_tokens: MaskTokens | None) -> Tensor:
        """Return patches as tokens with their positions, before class tokens are added: [B, K (+ M), D].

        Arguments and errors are those of `forward`.
        """
        if tuple(pixels.shape[1:]) != (self.config.in_channels, *self.config.image_size):
            raise ConfigError(
                f"pixels of shape {tuple(pixels.shape)} do not fit in_channels={self.config.in_channels}, "
                f"image_size={self.config.image_size}: resize the images or build the encoder with their size"
            )
        # an engine may have cast the parameters; the pixels stay float32 for the target
        dtype = self.cls_token.dtype
        positions = self.positions.to(dtype)  # [L, D]
        if ids_visible is None:
            patches = patchify(pixels, self.config.patch_size)  # [B, L, N]
            return cast("Tensor", self.patch_embed(patches.to(dtype)) + positions)  # [B, L, D]
        patches = cut_patches(
            pixels, self.config.patch_size, ids_visible
        )  # [B, K, N]: hidden patches are never embedded
        x = self.patch_embed(patches.to(dtype)) + positions_of(positions, ids_visible)  # [B, K, D]
        if mask_tokens is None:
            return cast("Tensor", x)
        hidden = mask_tokens.token.to(x.dtype) + positions_of(positions, mask_tokens.ids)  # [B, M, D]
        return torch.cat([x, hidden], dim=1)

    def tokens(
        self,
        pixels: Tensor,
        ids_visible: Tensor | None = None,
        drop_scales: Tensor | None = None,
        mask_tokens: MaskTokens | None = None,
    ) -> Tensor:
        """Return the tokens of the last block, before the final norm.

        Arguments, shapes and errors are those of `forward`.
        """
        x = self.embed(pixels, ids_visible, mask_tokens)
        # class and register tokens are added after the positions, because theirs is zero
        prefix = [self.cls_token, self.register_tokens] if self.config.num_register_tokens else [self.cls_token]
        x = torch.cat(
            [*(token.expand(x.shape[0], -1, -1).to(x.dtype) for token in prefix), x], dim=1
        )  # [B, n + K (+ M), D]
        for index, block in enumerate(self.blocks):
            x = block(x, None if drop_scales is None else drop_scales[:, index])
        return x

    def forward(
        self,
        pixels: Tensor,
        ids_visible: Tensor | None = None,
        drop_scales: Tensor | None = None,
        mask_tokens: MaskTokens | None = None,
    ) -> Tensor:
        """Encode images, or only their visible patches, into tokens after the final norm.

        The result is in the dtype of the parameters. Class tokens come first, then registers, patches in the order of
        ids_visible, and hidden patches in the order of mask_tokens.ids.

        Shapes: pixels float32 [B, C, H, W]; ids_visible int64 [B, K], or None for all patches; drop_scales
        [B, depth, 2] (see `drop_path_scales`), or None to drop nothing; mask_tokens for M hidden patches, or None
        -> [B, n + K (+ M), D].

        Raises:
            ConfigError: The images do not have the size that the encoder was built for.
        """
        return cast("Tensor", self.norm(self.tokens(pixels, ids_visible, drop_scales, mask_tokens)))

    def encode(self, pixels: Tensor, *, pool: Literal["cls", "mean", "none"]) -> Tensor:
        """Return the features of whole images after the final norm. Nothing is hidden or dropped.

        Shapes: pixels float32 [B, C, H, W] -> [B, D] for pool "cls" (the mean of the class tokens) and "mean" (the mean
        of the patch tokens), [B, n + L, D] for "none" (all tokens).

        Source: arXiv 2111.06377, A.1.

        Raises:
            ConfigError: The images do not have the size that the encoder was built for, or pool is unknown.
        """
        return pooled(cast("Tensor", self(pixels)), pool=pool, config=self.config)


def pooled(tokens: Tensor, *, pool: Literal["cls", "mean", "none"], config: ViTConfig) -> Tensor:
    """Pool the tokens of each image into one feature, as `ViTEncoder.encode` does.

    Shapes: tokens [B, n + L, D] of ViTEncoder(config) -> [B, D], or the tokens as they are for pool "none".

    Raises:
        ConfigError: pool is unknown.
    """
    match pool:
        case "none":
            return tokens
        case "cls":
            return tokens[:, : config.cls_tokens].mean(dim=1)
        case "mean":
            return tokens[:, config.prefix_tokens :].mean(dim=1)
    raise ConfigError(f"pool={pool!r} is unknown: write one of cls, mean, none")


def fill(parameter: Tensor, init: Callable[[Tensor], Tensor], *, generator: torch.Generator) -> None:
    """Fill a parameter with numbers that do not depend on its dtype or device.

    `init` fills a float32 tensor in place from the generator, on the generator's device; the result is then copied.
    Parameters on the meta device are left alone.
    """
    if parameter.is_meta:
        return
    with torch.no_grad():
        # drawn in float32 and cast afterwards: a bfloat16 draw would give other weights, not rounded ones
        fresh = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
        parameter.copy_(init(fresh))


def initialise(module: nn.Module, *, generator: torch.Generator) -> None:
    """Initialise every parameter of an encoder, a decoder or an autoencoder from the generator.

    Linear layers are xavier uniform with zero bias, where the patch embedding counts as a matrix over the flattened patch,
    and queries, keys and values as one matrix. Norms start at one and zero, class, register and mask tokens normal with
    standard deviation 0.02, and learned positions as the fixed table. Parameters are drawn in the order of `named_modules`.

    Source: arXiv 2111.06377, A.1.

    Raises:
        ConfigError: There is a parameter of another kind.
    """

    def normal(tensor: Tensor) -> Tensor:
        return nn.init.normal_(tensor, std=0.02, generator=generator)

    def xavier(tensor: Tensor) -> Tensor:
        return nn.init.xavier_uniform_(tensor, generator=generator)

    for path, part in module.named_modules():
        if isinstance(part, nn.LayerNorm):
            # constants: no random number is drawn, so the order of draws is not affected
            part.reset_parameters()
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("cls_token", "register_tokens", "mask_token"):
                fill(parameter, normal, generator=generator)
            # a copy of the fixed table, so that learned positions start where the others stay
            elif isinstance(part, ViTEncoder) and name == "positions":
                table = sine_cosine_2d(part.config.grid, part.config.embed_dim)
                fill(parameter, lambda fresh, table=table: fresh.copy_(table), generator=generator)  # type: ignore[misc]
            elif isinstance(part, nn.Linear) and name == "weight":
                fill(parameter, xavier, generator=generator)
            elif isinstance(part, nn.Linear) and name == "bias":
                nn.init.zeros_(parameter)
            else:
                raise ConfigError(
                    f"parameter {path}.{name}: there is no rule for its initial value; add one to initialise"
                )
