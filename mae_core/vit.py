"""The Vision Transformer encoder: pixels in, tokens out, of visible patches alone when told which are visible.

Shapes: pixels [B, C, H, W], patches [B, L, N], ids_visible [B, K] -> tokens [B, n + K, D], the n class tokens first; T tokens
        and h heads inside a block.
Units:  pixels are normalised float32 (mae_core.patches.normalise_pixels); they are cast to the parameters' dtype here.
Errors: ConfigError when an image does not have the size the encoder was made for.
Source: Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1; He et al. 2022, arXiv 2111.06377, section 3 and A.1.

Weights are NaN until `initialise` or `load_state_dict` fills them: constructing a module leaves torch's global generator
alone, and a forgotten fill cannot pass for a trained model."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mae_core.config import ViTConfig
from mae_core.errors import ConfigError
from mae_core.patches import gather_patches, patchify
from mae_core.positions import sine_cosine_2d


class Linear(nn.Linear):
    """nn.Linear whose weights start as NaN, see the module. Shapes, errors and source: those of nn.Linear."""

    def reset_parameters(self) -> None:
        """Fill weight and bias with NaN, drawing nothing. Shapes: theirs. Errors: none. Source: none."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Shapes: [B, T, D] -> [B, T, D]. Errors: none beyond ViTConfig's. Source: arXiv 1706.03762, section 3.2.
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Let every token read every other. Shapes, errors and source: the class's."""
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads)  # [B, T, 3, h, D/h]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, h, T, D/h]
        x = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, h, T, D/h]
        return cast("Tensor", self.proj(x.transpose(1, 2).reshape(B, T, D)))  # [B, T, D]


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them.

    Shapes: [..., D] -> [..., D]. Errors: none. Source: arXiv 2010.11929, section 3.1; arXiv 1606.08415 (GELU).
    """

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token alone. Shapes, errors and source: the class's."""
        return cast("Tensor", self.fc2(nn.functional.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm Transformer block.

    Shapes: [B, T, D] -> [B, T, D]. Errors: none. Source: arXiv 2010.11929, equations 2 and 3.
    """

    def __init__(self, dim: int, *, num_heads: int, mlp_dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.attn = Attention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.mlp = Mlp(dim, hidden_dim=mlp_dim)

    def forward(self, x: Tensor, drop_scale: Tensor | None = None) -> Tensor:
        """Add what attention and the MLP say to every token.

        Shapes: x [B, T, D]; drop_scale [B, 2] multiplies the two branches of each sample (0 drops one), None drops
        nothing -> [B, T, D]. Errors: none. Source: arXiv 1603.09382 for dropped branches.
        """
        if drop_scale is None:
            x = x + self.attn(self.norm1(x))
            return cast("Tensor", x + self.mlp(self.norm2(x)))
        scale = drop_scale.to(x.dtype)[:, :, None, None]  # [B, 2, 1, 1]
        x = x + scale[:, 0] * self.attn(self.norm1(x))
        return cast("Tensor", x + scale[:, 1] * self.mlp(self.norm2(x)))


class PatchEmbed(Linear):
    """Linear embedding of flattened patches: [B, L, P * P * C] -> [B, L, D]; equals a convolution of stride P.

    Errors: none. Source: arXiv 2010.11929, equation 1.
    """


class MaskTokens(NamedTuple):
    """A learnt token that stands in the encoder for every hidden patch (MAEConfig.encoder_input "all")."""

    token: Tensor  # [1, 1, D]
    ids: Tensor  # [B, M]  int64, the hidden patches


class ViTEncoder(nn.Module):
    """The encoder: patch embedding, class tokens, positions, blocks, final norm.

    Weights are NaN until loaded, unless `generator` is given: then `initialise` fills them. With fixed positions the weights
    of one image size serve every other: build the encoder with that size and load them.
    Shapes, units, errors and source: the module's.
    """

    positions: Tensor  # [L, D], a parameter when learned; else recomputed and never stored

    def __init__(self, config: ViTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_dim, config.embed_dim)
        self.cls_token = nn.Parameter(torch.full((1, config.cls_tokens, config.embed_dim), math.nan))
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
        """Patches as tokens with their positions, [B, K (+ M), D]; arguments, errors and source as `forward`."""
        if tuple(pixels.shape[1:]) != (self.config.in_channels, *self.config.image_size):
            raise ConfigError(
                f"pixels of shape {tuple(pixels.shape)} do not fit in_channels={self.config.in_channels}, "
                f"image_size={self.config.image_size}: resize the images or build the encoder with their size"
            )
        patches = patchify(pixels, self.config.patch_size)  # [B, L, N]
        dtype = self.cls_token.dtype
        positions = self.positions.to(dtype).expand(len(patches), -1, -1)  # [B, L, D]
        if ids_visible is None:
            return cast("Tensor", self.patch_embed(patches.to(dtype)) + positions)  # [B, L, D]
        patches = gather_patches(patches, ids_visible)  # [B, K, N]: hidden patches are not even embedded
        x = self.patch_embed(patches.to(dtype)) + gather_patches(positions, ids_visible)  # [B, K, D]
        if mask_tokens is None:
            return cast("Tensor", x)
        hidden = mask_tokens.token.to(x.dtype) + gather_patches(positions, mask_tokens.ids)  # [B, M, D]
        return torch.cat([x, hidden], dim=1)

    def tokens(
        self,
        pixels: Tensor,
        ids_visible: Tensor | None = None,
        drop_scales: Tensor | None = None,
        mask_tokens: MaskTokens | None = None,
    ) -> Tensor:
        """Tokens of the last block, before the final norm; arguments, shapes, errors and source as `forward`."""
        x = self.embed(pixels, ids_visible, mask_tokens)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # class tokens: position 0
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
        """Encode images, or their visible patches alone.

        Shapes: pixels float32 [B, C, H, W]; ids_visible int64 [B, K] or None for all patches; drop_scales [B, depth, 2]
        (see mae_core.heads.drop_path_scales) or None; mask_tokens for M hidden patches or None -> tokens [B, n + K (+ M), D]
        after the final norm, the n class tokens first, then patches in the order of ids_visible, then hidden ones in the
        order of mask_tokens.ids, in the parameters' dtype. Errors and source: the module's.
        """
        return cast("Tensor", self.norm(self.tokens(pixels, ids_visible, drop_scales, mask_tokens)))

    def encode(self, pixels: Tensor, *, pool: Literal["cls", "mean", "none"]) -> Tensor:
        """Features of whole images after the final norm; nothing is ever hidden or dropped here.

        Shapes: pixels float32 [B, C, H, W] -> "cls" the mean of the class tokens [B, D], "mean" the mean of the patch tokens
        [B, D], "none" all tokens [B, n + L, D]. Errors: the module's; ConfigError for another pool. Source: arXiv
        2111.06377, A.1.
        """
        return pooled(cast("Tensor", self(pixels)), pool=pool, cls_tokens=self.config.cls_tokens)


def pooled(tokens: Tensor, *, pool: Literal["cls", "mean", "none"], cls_tokens: int) -> Tensor:
    """Tokens of an image as one feature.

    Shapes: tokens [B, n + L, D], n = cls_tokens -> "cls" the mean of the class tokens [B, D], "mean" the mean of the patch
    tokens [B, D], "none" the tokens as they are. Errors: ConfigError for another pool. Source: arXiv 2111.06377, A.1.
    """
    match pool:
        case "none":
            return tokens
        case "cls":
            return tokens[:, :cls_tokens].mean(dim=1)
        case "mean":
            return tokens[:, cls_tokens:].mean(dim=1)
    raise ConfigError(f"pool={pool!r} is unknown: write one of cls, mean, none")


def fill(parameter: Tensor, init: Callable[[Tensor], Tensor], *, generator: torch.Generator) -> None:
    """Draw in float32 on the generator's device and copy: the same numbers whatever the parameter's dtype and device.

    Shapes: any; `init` fills a tensor in place from `generator`. Parameters on the meta device are left alone.
    Errors: those of `init`. Source: none.
    """
    if parameter.is_meta:
        return
    with torch.no_grad():
        fresh = torch.empty(parameter.shape, dtype=torch.float32, device=generator.device)
        parameter.copy_(init(fresh))


def initialise(module: nn.Module, *, generator: torch.Generator) -> None:
    """Fill every parameter of encoder, decoder or both from the generator, in the order of `named_modules`.

    Linear layers xavier uniform with zero bias (the patch embedding on its flattened patch, queries, keys and values as
    one matrix), norms one and zero, cls_token and mask_token normal with deviation 0.02, learned positions the fixed table.
    Shapes: the module's. Errors: ConfigError for a parameter of another kind. Source: arXiv 2111.06377, A.1.
    """

    def normal(tensor: Tensor) -> Tensor:
        return nn.init.normal_(tensor, std=0.02, generator=generator)

    def xavier(tensor: Tensor) -> Tensor:
        return nn.init.xavier_uniform_(tensor, generator=generator)

    for path, part in module.named_modules():
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("cls_token", "mask_token"):
                fill(parameter, normal, generator=generator)
            elif isinstance(part, ViTEncoder) and name == "positions":
                table = sine_cosine_2d(part.config.grid, part.config.embed_dim)
                fill(parameter, lambda fresh, table=table: fresh.copy_(table), generator=generator)  # type: ignore[misc]
            elif isinstance(part, nn.Linear) and name == "weight":
                fill(parameter, xavier, generator=generator)
            elif isinstance(part, nn.Linear) and name == "bias":
                nn.init.zeros_(parameter)
            else:
                raise ConfigError(f"parameter {path}.{name}: no rule says how it starts; add one to initialise")
