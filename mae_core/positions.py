"""Fixed two-dimensional sine-cosine positions for any grid of patches.

Shapes: grid (rows, columns) -> table [L, D], L = rows * columns in rows; D a multiple of 4.
Units:  positions count patches from 0; wavelengths run geometrically from 2 pi towards 10000 * 2 pi patches.
Errors: ConfigError when D is not a multiple of 4.
Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5, an axis each; He et al. 2022, arXiv 2111.06377, A.1."""

import torch
from torch import Tensor

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
