"""The config of other projects' weights, read off the shapes of their tensors.

Three things cannot be read off shapes:

- The number of heads. The named sizes are recognised by their width; for other widths the caller has to give it.
- layer_norm_eps. Official MAE and timm use 1e-6, which is the default here.
- The pixel scale. The default is ImageNet's; many supervised encoders (timm's augreg, google/vit-*) need a mean and a
  standard deviation of 0.5.

Units: image_size is in pixels; pixel_mean and pixel_std are on the 0..1 scale.

Source: the released sizes of arXiv 2111.06377, table 8, and `mae_core.config`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mae_core.config import IMAGENET_MEAN, IMAGENET_STD, SIZES, MAEConfig, Target, ViTConfig
from mae_core.errors import ConfigError
from mae_core.interop.layouts import (
    LAYOUTS,
    LayoutName,
    NameTable,
    canonical_names,
    depth_of,
    names_matching,
    part_names,
    tensor_names,
)
from mae_core.interop.unsupported import unsupported_parts
from mae_core.positions import sine_cosine_2d

# every named size has its own width, so the width is enough
_HEADS = {config.embed_dim: config.num_heads for config in (size() for size in SIZES.values())}
_DECODER_HEADS = {512: 16}  # width and heads of the decoder in every released MAE

_FIXED_TOLERANCE = 1e-5
"""How far a float32 table may be from the fixed one and still count as fixed. Tables computed by two programs differ by at most
4e-6 up to 64 patches per side (angles in float32 or in float64), and a trained table that moved by less than 1e-5 gives the
same outputs."""


def is_sine_cosine(table: Tensor, *, grid: tuple[int, int], tolerance: float | None = None) -> bool:
    """Return whether a stored position table [L, D] is the fixed one of a grid, up to rounding in its dtype."""
    rows, columns = grid
    if table.shape[0] != rows * columns or table.shape[1] % 4:
        return False
    # rounding to the dtype moves an entry near 1 by up to half a step: 4e-3 in bfloat16, 5e-4 in float16
    allowed = max(_FIXED_TOLERANCE, torch.finfo(table.dtype).eps / 2) if tolerance is None else tolerance
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
    """Return the config of the encoder in a state dict of the given layout.

    `image_size` is the size that the weights were trained for, not the size they will be used at. Without it, the grid is
    the one whose fixed position table is stored, or else a square. Positions are "sine_cosine" when the stored table is
    the fixed one of the grid, and "learned" otherwise. `num_heads` is needed for a width that no named size has. The
    remaining options cannot be read off shapes either.

    Raises:
        ConfigError: A tensor is missing or has an unknown form, or the shapes do not determine the number of heads or
            the grid.
    """
    found, names = canonical_names(state_dict, LAYOUTS[layout]), LAYOUTS[layout].encoder
    depth = depth_of(found, names)
    # before any shape is read: "has register tokens" helps, "table of shape (1, 201, 384)" does not
    _check_parts(found, layout, depth)
    kernel, hidden, stored = _required(
        found,
        *(_foreign_name(names, name, depth) for name in ("patch_embed.weight", "blocks.0.mlp.fc1.weight")),
        names.positions,
    )
    _check_kernel(kernel, _foreign_name(names, "patch_embed.weight", depth))
    embed_dim, in_channels, patch_size, _ = kernel.shape  # [D, C, P, P]
    _check_position_table(stored, names.positions, embed_dim)
    registers = _register_count(found, names, embed_dim)
    if image_size is None:
        grid = _grid_of(stored[0], names.positions, registers=registers)
        image_size = grid[0] * patch_size, grid[1] * patch_size
    else:
        grid = image_size[0] // patch_size, image_size[1] // patch_size
    table = patch_rows(stored, num_patches=grid[0] * grid[1])  # [L, D]
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        in_channels=in_channels,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads or _known_heads(_HEADS, embed_dim, field="num_heads"),
        mlp_ratio=_mlp_ratio(hidden.shape[0], embed_dim),
        layer_norm_eps=layer_norm_eps,
        num_register_tokens=registers,
        positions="sine_cosine" if is_sine_cosine(table, grid=grid) else "learned",
        pixel_mean=tuple(pixel_mean),
        pixel_std=tuple(pixel_std),
    )
    if len(table) != config.num_patches:
        raise positions_error(names.positions, stored, config)
    return config


def _register_count(found: Mapping[str, Tensor], names: NameTable, embed_dim: int) -> int:
    if names.registers not in found:
        return 0
    (tokens,) = _required(found, names.registers)
    if tokens.ndim != 3 or tokens.shape[0] != 1 or tokens.shape[2] != embed_dim:
        raise ConfigError(f"{names.registers} of shape {tuple(tokens.shape)} should be [1, r, {embed_dim}]")
    return tokens.shape[1]


def _check_kernel(kernel: Tensor, name: str) -> None:
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ConfigError(
            f"{name} of shape {tuple(kernel.shape)} is no kernel [D, C, P, P] of square patches: encoders with other patches "
            "cannot be imported"
        )


def _check_position_table(stored: Tensor, name: str, embed_dim: int) -> None:
    shape = tuple(stored.shape)
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != embed_dim:
        raise ConfigError(
            f"{name} of shape {shape}, {stored.dtype}, is no table [1, 1 + L, {embed_dim}]: encoders with other positions "
            "cannot be imported"
        )


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
    """Return the config of the autoencoder in a state dict of the given layout.

    The encoder's arguments are as in `infer_encoder_config`. `mask_ratio` and `target` cannot be read off shapes either;
    `decoder_num_heads` is needed for a decoder whose width is not 512.

    Raises:
        ConfigError: As in `infer_encoder_config`; also if the weights or the layout have no decoder, in which case the
            message lists the missing names.
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
    found, names = canonical_names(state_dict, LAYOUTS[layout]), decoder_table(layout)
    depth = depth_of(found, names)
    embed, hidden = _required(
        found,
        *(_foreign_name(names, name, max(1, depth)) for name in ("embed.weight", "blocks.0.mlp.fc1.weight")),
        among=[
            names.positions,
            *(name for group in tensor_names(names, depth=max(1, depth)).values() for name in group),
        ],
        hint=encoder_only_hint(found, layout),
    )
    width = embed.shape[0]
    return MAEConfig(
        encoder=replace(encoder, positions="sine_cosine"),  # autoencoder_from refuses other tables
        decoder_embed_dim=width,
        decoder_depth=depth,
        decoder_num_heads=decoder_num_heads or _known_heads(_DECODER_HEADS, width, field="decoder_num_heads"),
        decoder_mlp_ratio=_mlp_ratio(hidden.shape[0], width),
        mask_ratio=mask_ratio,
        target=target,
    )


def decoder_table(layout: LayoutName) -> NameTable:
    """Return the names of a layout's decoder.

    Raises:
        ConfigError: The layout holds encoders only.
    """
    names = LAYOUTS[layout].decoder
    if names is None:
        raise ConfigError(
            f"layout {layout} holds an encoder alone: use a layout with a decoder (official_mae, hf_vitmae), or import only "
            f"the encoder"
        )
    return names


def format_names(names: Iterable[str], *, most: int = 12) -> str:
    """Format names for an error message: sorted, and cut to the first `most` of them."""
    names = sorted(names)
    return str(names) if len(names) <= most else f"{names[:most]} and {len(names) - most} more"


def encoder_only_hint(found: Iterable[str], layout: LayoutName) -> str:
    """Return the advice for weights that have no decoder at all, or an empty string if they have one."""
    if names_matching(found, LAYOUTS[layout].decoder_patterns):
        return ""
    return (
        "they hold an encoder alone, and a decoder with random weights is never added: use a file that has a decoder, or "
        "import only the encoder"
    )


def positions_error(name: str, stored: Tensor, config: ViTConfig) -> ConfigError:
    """Return the error for a position table that does not fit the config, in its shape or in its values."""
    expected = 1 + config.num_patches
    if stored.ndim != 3 or tuple(stored.shape[:2]) != (1, expected):
        return ConfigError(
            f"{name} of shape {tuple(stored.shape)} should be [1, {expected}, D] for image_size={config.image_size}, "
            f"patch_size={config.patch_size}: set both to what the weights were trained with"
        )
    return ConfigError(
        f"{name} of shape {tuple(stored.shape)} is not the fixed sine-cosine table of grid={config.grid}: set image_size and "
        f"patch_size to what the weights were trained with; trained positions need an encoder with positions='learned', and a "
        f"decoder cannot have them"
    )


def check_floating_point(name: str, tensor: Tensor) -> None:
    """Raise a ConfigError if a tensor holds integers or floats of 8 bits and less, as quantised weights do."""
    if not tensor.is_floating_point():
        raise ConfigError(
            f"{name} is {tensor.dtype}, which is not a floating-point type: use the weights from before quantisation"
        )
    if tensor.element_size() < 2:
        raise ConfigError(f"{name} is {tensor.dtype}, a type of quantised weights: use those from before quantisation")


def patch_rows(stored: Tensor, *, num_patches: int) -> Tensor:
    """Return the rows [L, D] of the patches in a position table: the last ones.

    The first row is the class token's, followed by those of registers if they have some, unless there are as many rows as patches:
    timm's models with `no_embed_class` give neither a position, as we do.
    """
    return stored[0, max(0, stored.shape[1] - num_patches) :]


def _check_parts(found: Mapping[str, Tensor], layout: LayoutName, depth: int) -> None:
    """Refuse an encoder of another kind by what it has, before its shapes are read as if it were of ours."""
    known, names = LAYOUTS[layout], LAYOUTS[layout].encoder
    wanted = {name for group in tensor_names(names, depth=depth).values() for name in group}
    wanted |= part_names(found, names, depth=depth)
    ignored = names_matching(found, (*known.decoder_patterns, *known.optional_patterns))
    if parts := unsupported_parts(set(found) - wanted - ignored):
        raise ConfigError(parts_message(parts))
    cls_token = names.names["cls_token"]
    if depth and cls_token not in found:
        raise ConfigError(
            f"the weights have no class token ({cls_token}), and the encoder here always has one: use weights that were "
            f"trained with one"
        )


def parts_message(parts: str) -> str:
    """Return the message for weights with parts that the encoder here does not have."""
    return f"the weights hold {parts}: the encoder here has no such part, so use weights of a plain ViT"


def _required(found: Mapping[str, Tensor], *names: str, among: Iterable[str] = (), hint: str = "") -> list[Tensor]:
    """Return the tensors of these names, which hold floating-point numbers.

    If one is absent, the error lists all missing names, including those in `among`."""
    if not all(name in found for name in names):
        missing = format_names({*names, *among} - set(found))
        raise ConfigError(
            f"the weights are incomplete: missing {missing}; {hint or 'check that the layout is the right one'}"
        )
    for name in names:
        check_floating_point(name, found[name])
    return [found[name] for name in names]


def _known_heads(heads: Mapping[int, int], width: int, *, field: str) -> int:
    if width not in heads:
        raise ConfigError(
            f"{field} cannot be read from weights of width {width}: give it (with 64 values per head it would be "
            f"{max(1, width // 64)})"
        )
    return heads[width]


def _foreign_name(names: NameTable, ours: str, depth: int) -> str:
    return tensor_names(names, depth=max(1, depth))[ours][0]


def _grid_of(rows: Tensor, name: str, *, registers: int) -> tuple[int, int]:
    """Return the grid of a position table, if its values or its shape determine one. Its shape is that of `patch_rows`."""
    # 256 patches may be 16 x 16 or 8 x 32; a fixed table matches only one of them
    # with a row for the class token first: nearly all files have one
    for table in (rows[1:], rows):
        for grid in _grids(len(table)):
            if is_sine_cosine(table, grid=grid):
                return grid
    # trained values say nothing about the grid, so from here on only the number of rows does
    count = len(rows) - 1
    # timm's encoders with registers have no row for them or for the class token, and a few older ones have a row for each
    for patches in (count, *((len(rows), count - registers) if registers else ())):
        side = math.isqrt(patches)
        if side * side == patches:
            return side, side
    without = math.isqrt(len(rows))
    if without * without == len(rows):
        raise ConfigError(
            f"{name} has {len(rows)} trained rows: {without} x {without} patches and no row for the class token, or a row for "
            f"it and {count} patches, which is no square. Give the image_size that the weights were trained with"
        )
    raise ConfigError(
        f"{name} holds trained positions of {count} patches, which is no square: give the image_size that the weights "
        f"were trained with"
    )


def _grids(count: int) -> list[tuple[int, int]]:
    """Return the grids of `count` patches, the most square first."""
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return sorted(grids, key=lambda grid: abs(grid[0] - grid[1]))


def _mlp_ratio(hidden: int, width: int) -> float:
    """Return hidden / width, raised by one float where needed so that int(width * ratio) gives hidden back."""
    ratio = hidden / width
    # the config stores a ratio, and int() truncates: 2047.999... would lose a unit
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
