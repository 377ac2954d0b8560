"""Two-dimensional position embeddings: the fixed sine-cosine table, and learned tables resized to another grid.

Shapes: grid (rows, columns) -> table [L, D] with L = rows * columns, row by row. D is a multiple of 4 for the fixed table.

Units: positions count patches from 0. Wavelengths grow geometrically from 2 pi towards 10000 * 2 pi patches.

Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5, applied to each axis; He et al. 2022, arXiv 2111.06377, A.1."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mae_core.config import ViTConfig
from mae_core.errors import ConfigError
from mae_core.patches import gather_patches


def sine_cosine_2d(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Return the fixed position table of a grid.

    The first half of each row encodes the patch's column and the second half its row; each half holds sines, then
    cosines. The table is computed for the grid at hand, so another image size needs no interpolation. The class token has
    no entry, because its position is zero.

    Shapes: grid (rows, columns) -> float32 [rows * columns, embed_dim].

    Raises:
        ConfigError: embed_dim is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ConfigError(f"embed_dim={embed_dim} is not divisible by 4: write a multiple of 4")
    quarter = embed_dim // 4
    rows, columns = grid
    # float64 to the end: angles in float32 would put entries off by up to 4e-6 at 64 patches per side
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    angle_row = torch.arange(rows, dtype=torch.float64)[:, None] * frequency  # [rows, D/4]
    angle_column = torch.arange(columns, dtype=torch.float64)[:, None] * frequency  # [columns, D/4]
    along_row = torch.cat([angle_row.sin(), angle_row.cos()], dim=1)  # [rows, D/2]
    along_column = torch.cat([angle_column.sin(), angle_column.cos()], dim=1)  # [columns, D/2]
    # columns first, as in the official code (its meshgrid puts the width first): imported weights expect it
    table = torch.cat([along_column.repeat(rows, 1), along_row.repeat_interleave(columns, dim=0)], dim=1)
    return table.to(torch.float32)  # [L, D]


def positions_of(table: Tensor, ids: Tensor) -> Tensor:
    """Return the table's rows of some patches of every image.

    Shapes: table [L, D], ids int64 [B, K] in 0..L-1 -> [B, K, D].
    """
    if table.requires_grad:
        # a row's gradients are added image by image and then over the batch: no two of them meet in an unordered sum
        return gather_patches(table.expand(len(ids), -1, -1), ids)
    return table[ids]  # whole rows; a gather would look up every value


def interpolate_positions(table: Tensor, *, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a learned position table to another grid, by antialiased bicubic interpolation.

    An unchanged grid returns the table itself. The fixed table needs no interpolation: call `sine_cosine_2d` for the new
    grid. timm resizes learned tables in the same way.

    Shapes: [rows * columns, D] of old_grid -> the same of new_grid, computed in float32 and returned in the table's dtype.

    Raises:
        ConfigError: The number of positions is not that of old_grid.
    """
    rows, columns = old_grid
    if table.shape[0] != rows * columns:
        raise ConfigError(
            f"a table of {table.shape[0]} positions does not fit old_grid={old_grid}: pass the grid it was made for"
        )
    if old_grid == new_grid:
        return table
    image = table.float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    image = torch.nn.functional.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)  # [L', D]


def resized_encoder(
    state_dict: Mapping[str, Tensor], config: ViTConfig, *, image_size: tuple[int, int]
) -> tuple[dict[str, Tensor], ViTConfig]:
    """Return an encoder's weights and config for images of another size.

    Learned positions are interpolated, everything else is unchanged. `state_dict` is that of ViTEncoder(config), and
    image_size is (height, width) in pixels.

    Source: arXiv 2010.11929, section 3.2.

    Raises:
        ConfigError: patch_size does not divide image_size.
    """
    weights, resized = dict(state_dict), replace(config, image_size=image_size)
    if config.positions == "learned":
        weights["positions"] = interpolate_positions(weights["positions"], old_grid=config.grid, new_grid=resized.grid)
    return weights, resized
