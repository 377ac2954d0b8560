"""Which patches the encoder sees: noise in, indices out.

Shapes: noise [B, L] -> ids_visible [B, K], ids_hidden [B, L - K], mask [B, L]; K = visible_count(L, mask_ratio), the same for
        every image and every way of masking; grid = (rows, columns), L = rows * columns; R rectangles.
Units:  mask_ratio is a fraction, rounded to whole patches; noise is uniform in [0, 1), drawn by the caller.
Errors: ConfigError when no patch would stay visible or none would be hidden.
Source: He et al. 2022, arXiv 2111.06377, section 3 ("Simple implementation") and figure 6 (block, grid); blocks: Bao et al.
2022, arXiv 2106.08254, algorithm 1; cells: Hu et al. 2022, arXiv 2210.07224 (2 x 2), and Pixio (4 x 4).

Every way of masking is a rank [B, L]: the K patches of lowest rank stay visible, ties go to the earlier patch. So counts are
exact for any ratio and grid, and the mask of a sample depends on nothing but its own noise."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.errors import ConfigError

Masking = Literal["random", "block", "grid", "cell"]

MOST_RECTANGLES = 16
"""Rectangles that block masking draws: at 75 % of 14 x 14 the first four cover what is to be hidden, on average."""
SMALLEST_RECTANGLE = 16 / 196
"""Smallest rectangle as a share of the grid: 16 of 14 x 14 patches."""
WIDEST_ASPECT = 1 / 0.3
"""Rectangles are at most so much wider than high, or higher than wide."""


class Masked(NamedTuple):
    """The two halves of every image's patches; each index is in 0..L-1, in the order of rank."""

    ids_visible: Tensor  # [B, K]      int64, patches the encoder sees
    ids_hidden: Tensor  # [B, L - K]  int64, patches to predict
    mask: Tensor  # [B, L]      float32, 1.0 = hidden


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """K, the patches that stay visible: L * (1 - mask_ratio) rounded to the nearest, halves up.

    The small term absorbs the error of binary fractions: 400 * (1 - 0.8) is 79.99... and means 80.
    Errors: ConfigError when that leaves no visible or no hidden patch. Source: arXiv 2111.06377 (the ratio alone).
    """
    count = math.floor(num_patches * (1.0 - mask_ratio) + 0.5 + 1e-9) if math.isfinite(mask_ratio) else -1
    if not 1 <= count < num_patches:
        raise ConfigError(
            f"mask_ratio={mask_ratio} of {num_patches} patches leaves {count} visible: at least one patch must be "
            f"visible and one hidden; write 0.75 for 75 %"
        )
    return count


def mask_patches(
    noise: Tensor, *, grid: tuple[int, int], mask_ratio: float, masking: Masking, mask_cell: int = 1
) -> Masked:
    """Hide patches of every image in the way that `masking` names; `mask_cell` is read by "cell" alone.

    Shapes: noise [B, rows * columns] -> Masked. Errors: ConfigError, see visible_count. Source: see the module.
    """
    match masking:
        case "random":
            return random_mask(noise, mask_ratio=mask_ratio)
        case "cell":
            return _lowest_visible(_cell_rank(noise, grid, mask_cell), mask_ratio)
        case "grid":
            return _lowest_visible(_grid_rank(noise, grid), mask_ratio)
        case "block":
            hidden = noise.shape[1] - visible_count(noise.shape[1], mask_ratio)
            return _lowest_visible(_block_rank(noise, grid, hidden), mask_ratio)


def random_mask(noise: Tensor, *, mask_ratio: float) -> Masked:
    """Hide a random part of every image's patches: the K patches of least noise stay visible.

    Shapes: noise [B, L] -> Masked. Equal noise gives equal masks; ties go to the earlier patch.
    Errors: ConfigError, see visible_count. Source: arXiv 2111.06377, section 3.
    """
    return _lowest_visible(noise, mask_ratio)


def _lowest_visible(rank: Tensor, mask_ratio: float) -> Masked:
    count = visible_count(rank.shape[1], mask_ratio)
    ids = torch.argsort(rank, dim=1, stable=True)  # [B, L]
    ids_visible, ids_hidden = ids[:, :count], ids[:, count:]
    mask = torch.ones(rank.shape, dtype=torch.float32, device=rank.device).scatter(1, ids_visible, 0.0)
    return Masked(ids_visible, ids_hidden, mask)


def _cell_rank(noise: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """[B, L]: the patches of a cell share the noise of its first one. Cells at the edges of a grid may be smaller."""
    rows, columns = (torch.arange(length, device=noise.device) // side * side for length in grid)
    first = (rows[:, None] * grid[1] + columns).flatten()  # [L]
    return noise[:, first]


def _grid_rank(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, L]: an ordered dither, so that the lowest quarter is every second patch of every second row, the lowest half a
    chequerboard, and any other share as even as can be; moved by two random offsets an image."""
    bits = max(1, (max(grid) - 1).bit_length())
    side = 1 << bits
    places = torch.arange(side, device=noise.device)
    table = torch.zeros(side, side, dtype=torch.int64, device=noise.device)
    for bit in range(bits):  # the lowest bits of row and column weigh most: neighbours lie far apart in rank
        row, column = (places >> bit & 1)[:, None], (places >> bit & 1)[None, :]
        table = table * 4 + 2 * (row ^ column) + row
    offset = (noise[:, :2] * side).long()  # [B, 2]
    rows = (places[: grid[0]] + offset[:, :1]) % side  # [B, rows]
    columns = (places[: grid[1]] + offset[:, 1:]) % side  # [B, columns]
    return table[rows[:, :, None], columns[:, None, :]].flatten(1)  # [B, L]


def _block_rank(noise: Tensor, grid: tuple[int, int], hidden: int) -> Tensor:
    """[B, L]: patches outside all rectangles first, by noise; then those of the last rectangle, ..., the first rectangle last.

    Each rectangle takes four numbers of the noise: area (up to all that is to be hidden), shape, row and column.
    """
    B, L = noise.shape
    R = max(1, min(MOST_RECTANGLES, L // 4))
    drawn = torch.nn.functional.pad(noise, (0, max(0, 4 - L)), value=0.5)[:, : 4 * R].reshape(B, R, 4)
    area, shape, top, left = drawn.unbind(-1)  # each [B, R]
    smallest = min(float(hidden), SMALLEST_RECTANGLE * L)
    area = smallest + area * (hidden - smallest)
    aspect = (math.log(WIDEST_ASPECT) * (2 * shape - 1)).exp()  # height / width
    rows = _covered(top, (area * aspect).sqrt(), grid[0])  # [B, R, rows]
    columns = _covered(left, (area / aspect).sqrt(), grid[1])  # [B, R, columns]
    inside = (rows[..., None] & columns[..., None, :]).flatten(2)  # [B, R, L]
    first = inside.int().argmax(dim=1)  # [B, L], the first rectangle that covers a patch
    return torch.where(inside.any(dim=1), (R - first).to(noise.dtype), noise - 1.0)


def _covered(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """[B, R, length] bool: the places on an axis that a stretch covers; start is a fraction of where it can begin."""
    size = extent.round().clamp(1, length)
    begin = (start * (length - size + 1)).floor()
    places = torch.arange(length, device=start.device)
    return (places >= begin[..., None]) & (places < (begin + size)[..., None])
