"""The config of foreign weights, read off their shapes.

Shapes: as in layouts. Units: image_size in pixels, pixel_mean and pixel_std on the 0..1 scale.
Errors: ConfigError where shapes do not say it (heads of an unusual width, the grid of trained positions that is no square),
        or where what is asked for is missing.
Source: released sizes: arXiv 2111.06377, table 8, and mae_core.config.

Three things are in no shape. Heads: those of the named sizes by their width, else the caller says. layer_norm_eps: official
MAE and timm use 1e-6. Pixel scale: ImageNet's; many supervised encoders (timm's augreg, google/vit-*) want 0.5, 0.5."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mae_core.config import IMAGENET_MEAN, IMAGENET_STD, SIZES, MAEConfig, Target, ViTConfig
from mae_core.errors import ConfigError
from mae_core.interop.layouts import LAYOUTS, Half, LayoutName, depth_of, matching, names_of, spelled
from mae_core.positions import sine_cosine_2d

_HEADS = {config.embed_dim: config.num_heads for config in (size() for size in SIZES.values())}
_DECODER_HEADS = {512: 16}  # of every released MAE

_TRAINED_BEYOND = 1e-5
"""Float32 tables of two programs differ by 4e-6 at most up to 64 patches a side (angles in float32 or in float64). A table that
was trained and moved less than this is the fixed one as far as outputs tell."""


def is_fixed(table: Tensor, *, grid: tuple[int, int], tolerance: float | None = None) -> bool:
    """Whether a stored table is the fixed one of a grid, but for rounding to its dtype.

    Shapes: table [L, D]. Errors: none. Source: mae_core.positions.
    """
    rows, columns = grid
    if table.shape[0] != rows * columns or table.shape[1] % 4:
        return False
    # half a step of the dtype at 1: 4e-3 for bfloat16, 5e-4 for float16
    allowed = max(_TRAINED_BEYOND, torch.finfo(table.dtype).eps / 2) if tolerance is None else tolerance
    expected = sine_cosine_2d(grid, table.shape[1])
    return torch.allclose(table.detach().float().cpu(), expected, rtol=0, atol=allowed)


def infer_encoder_config(
    state_dict: Mapping[str, Tensor],
    *,
    layout: LayoutName,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    layer_norm_eps: float = 1e-6,
    pixel_mean: Sequence[float] = IMAGENET_MEAN,
    pixel_std: Sequence[float] = IMAGENET_STD,
) -> ViTConfig:
    """Shape of the encoder in foreign weights; `image_size` is the size they were made for, not one they shall be used at.

    Positions are "sine_cosine" when the stored table is the fixed one of its grid, and "learned" otherwise. Without
    image_size the grid is the one whose fixed table is stored, else a square. Shapes: the module's. Errors: the module's.
    Source: the module's.
    """
    found, half = spelled(state_dict, LAYOUTS[layout]), LAYOUTS[layout].encoder
    depth = depth_of(found, half)
    kernel, hidden, stored = _required(
        found, *(_name(half, name, depth) for name in ("patch_embed.weight", "blocks.0.mlp.fc1.weight")), half.positions
    )
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ConfigError(
            f"{_name(half, 'patch_embed.weight', depth)} of shape {tuple(kernel.shape)} is no kernel [D, C, P, P] of "
            f"square patches: such encoders cannot be taken over"
        )
    embed_dim, in_channels, patch_size, _ = kernel.shape
    shape = tuple(stored.shape)
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != embed_dim or not stored.is_floating_point():
        raise ConfigError(
            f"{half.positions} of shape {shape}, {stored.dtype}, is no table [1, 1 + L, {embed_dim}]: such encoders cannot be "
            f"taken over"
        )
    table = stored[0, 1:]  # [L, D]
    if image_size is None:
        grid = _grid_of(table, half.positions)
        image_size = grid[0] * patch_size, grid[1] * patch_size
    else:
        grid = image_size[0] // patch_size, image_size[1] // patch_size
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads or _known(_HEADS, embed_dim, field="num_heads"),
        mlp_ratio=_ratio(hidden.shape[0], embed_dim),
        layer_norm_eps=layer_norm_eps,
        positions="sine_cosine" if is_fixed(table, grid=grid) else "learned",
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
    )
    if len(table) != config.num_patches:
        raise other_positions(half.positions, stored, config)
    return config


def infer_autoencoder_config(
    state_dict: Mapping[str, Tensor],
    *,
    layout: LayoutName,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    layer_norm_eps: float = 1e-6,
    pixel_mean: Sequence[float] = IMAGENET_MEAN,
    pixel_std: Sequence[float] = IMAGENET_STD,
    mask_ratio: float = 0.75,
    target: Target = "normalised",
) -> MAEConfig:
    """Shape of the autoencoder in foreign weights; mask_ratio and target are in no shape either.

    Shapes, errors and source: the module's; also ConfigError naming what is missing when there is no decoder.
    """
    encoder = infer_encoder_config(
        state_dict,
        layout=layout,
        image_size=image_size,
        num_heads=num_heads,
        layer_norm_eps=layer_norm_eps,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    found, half = spelled(state_dict, LAYOUTS[layout]), decoder_of(layout)
    depth = depth_of(found, half)
    embed, hidden = _required(
        found,
        *(_name(half, name, max(1, depth)) for name in ("embed.weight", "blocks.0.mlp.fc1.weight")),
        among=[half.positions, *(name for group in names_of(half, depth=max(1, depth)).values() for name in group)],
        hint=encoder_alone_hint(found, layout),
    )
    width = embed.shape[0]
    return MAEConfig(
        encoder=replace(encoder, positions="sine_cosine"),  # other positions are refused when weights are carried over
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=decoder_num_heads or _known(_DECODER_HEADS, width, field="decoder_num_heads"),
        decoder_mlp_ratio=_ratio(hidden.shape[0], width),
        mask_ratio=mask_ratio,
        target=target,
    )


def decoder_of(layout: LayoutName) -> Half:
    """The decoder's names. Shapes: none. Errors: ConfigError for a layout of encoders. Source: mae_core.interop.layouts."""
    half = LAYOUTS[layout].decoder
    if half is None:
        raise ConfigError(
            f"layout {layout} holds an encoder alone: take one with a decoder (official_mae, hf_vitmae), or import the encoder"
        )
    return half


def listed(names: Iterable[str], *, most: int = 12) -> str:
    """Names for an error text, sorted; of many the first. Shapes: none. Errors: none. Source: none."""
    names = sorted(names)
    return str(names) if len(names) <= most else f"{names[:most]} and {len(names) - most} more"


def encoder_alone_hint(found: Iterable[str], layout: LayoutName) -> str:
    """What to say when an autoencoder is asked of weights without any decoder, else nothing. Shapes, errors, source: none."""
    if matching(found, LAYOUTS[layout].decoder_names):
        return ""
    return "they hold an encoder alone, and a decoder is not made up: take a file with one, or import the encoder"


def other_positions(name: str, stored: Tensor, config: ViTConfig) -> ConfigError:
    """The error for a position table that is not config's. Shapes: stored [1, 1 + L, D] if all were well. Source: none."""
    expected = 1 + config.num_patches
    if stored.ndim != 3 or tuple(stored.shape[:2]) != (1, expected):
        return ConfigError(
            f"{name} of shape {tuple(stored.shape)} should be [1, {expected}, D] for image_size={config.image_size}, "
            f"patch_size={config.patch_size}: set them to those of the weights"
        )
    return ConfigError(
        f"{name} of shape {tuple(stored.shape)} is not the fixed sine-cosine table of grid={config.grid}: set image_size and "
        f"patch_size to those of the weights; trained positions need an encoder with positions='learned', and a decoder "
        f"cannot have them"
    )


def _required(found: Mapping[str, Tensor], *names: str, among: Iterable[str] = (), hint: str = "") -> list[Tensor]:
    """The tensors under these names; when one is absent, the error lists all that is missing, `among` more names too."""
    if not all(name in found for name in names):
        missing = listed({*names, *among} - set(found))
        raise ConfigError(f"the weights are incomplete: missing {missing}; {hint or 'is their layout the one given?'}")
    return [found[name] for name in names]


def _known(heads: Mapping[int, int], width: int, *, field: str) -> int:
    if width not in heads:
        raise ConfigError(
            f"{field} cannot be read from weights of width {width}: say it (64 numbers a head would be {max(1, width // 64)})"
        )
    return heads[width]


def _name(half: Half, ours: str, depth: int) -> str:
    return names_of(half, depth=max(1, depth))[ours][0]


def _grid_of(table: Tensor, name: str) -> tuple[int, int]:
    count = table.shape[0]
    side = math.isqrt(count)
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    # 256 patches may be 16 x 16 or 8 x 32: a fixed table tells
    for grid in sorted(grids, key=lambda grid: abs(grid[0] - grid[1])):
        if is_fixed(table, grid=grid):
            return grid
    if side * side != count:
        raise ConfigError(
            f"{name} holds trained positions of {count} patches, which is no square: give the image_size of the weights"
        )
    return side, side


def _ratio(hidden: int, width: int) -> float:
    """hidden / width, nudged where needed so that int(width * ratio) is hidden again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
