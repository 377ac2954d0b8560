"""Two-dimensional positions for any grid of patches: the fixed sine-cosine table, and learned tables at another grid.

Shapes: grid (rows, columns) -> table [L, D], L = rows * columns in rows; D a multiple of 4 for the fixed one.
Units:  positions count patches from 0; wavelengths run geometrically from 2 pi towards 10000 * 2 pi patches.
Errors: ConfigError when D is not a multiple of 4, or when a table does not have its grid's rows.
Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5, an axis each; He et al. 2022, arXiv 2111.06377, A.1."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.errors import ConfigError


def sine_cosine_2d(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """The position of each patch: the first half of the width says its column, the second half its row.

    Shapes: grid (rows, columns) -> float32 [rows * columns, embed_dim]; each half is sines, then cosines. Computed for the
    grid at hand, so another image size needs no interpolation. The class token has no row here: its position is zero.
    Errors: ConfigError when embed_dim is not a multiple of 4. Source: see the module.
    """
    if embed_dim % 4:
        raise ConfigError(f"embed_dim={embed_dim} is not divisible by 4: write a multiple of 4")
    quarter = embed_dim // 4
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    angle_row = torch.arange(rows, dtype=torch.float64)[:, None] * frequency  # [rows, D/4]
    angle_column = torch.arange(columns, dtype=torch.float64)[:, None] * frequency  # [columns, D/4]
    along_row = torch.cat([angle_row.sin(), angle_row.cos()], dim=1)  # [rows, D/2]
    along_column = torch.cat([angle_column.sin(), angle_column.cos()], dim=1)  # [columns, D/2]
    table = torch.cat([along_column.repeat(rows, 1), along_row.repeat_interleave(columns, dim=0)], dim=1)
    return table.to(torch.float32)  # [L, D]


def interpolate_positions(table: Tensor, *, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A learned table at another grid: bicubic in both directions, antialiased. The fixed table is computed instead.

    Shapes: [rows * columns, D] of old_grid -> the same of new_grid, in the table's dtype (computed in float32); the same grid
    gives the table itself. Errors: ConfigError when the table has other than old_grid's rows. Source: timm resizes so too.
    """
    rows, columns = old_grid
    if table.shape[0] != rows * columns:
        raise ConfigError(f"a table of {table.shape[0]} positions is not of old_grid={old_grid}: give its own grid")
    if old_grid == new_grid:
        return table
    image = table.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    image = torch.nn.functional.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)  # [L', D]


def resized_encoder(
    state_dict: Mapping[str, Tensor], config: ViTConfig, *, image_size: tuple[int, int]
) -> tuple[dict[str, Tensor], ViTConfig]:
    """An encoder for images of another size: learned positions are interpolated, all else stays.

    Shapes: state_dict of ViTEncoder(config); image_size (height, width) in pixels -> its weights and config at that size.
    Errors: ConfigError when patch_size does not divide image_size. Source: arXiv 2010.11929, section 3.2.
    """
    weights, resized = dict(state_dict), replace(config, image_size=image_size)
    if config.positions == "learned":
        weights["positions"] = interpolate_positions(weights["positions"], old_grid=config.grid, new_grid=resized.grid)
    return weights, resized
