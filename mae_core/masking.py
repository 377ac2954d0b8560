"""Which patches the encoder sees: noise in, indices out.

Every masking strategy computes a rank per patch. The K patches with the lowest rank stay visible, and ties go to the
earlier patch. The counts are therefore exact for any ratio and grid, and the mask of a sample depends on nothing but its
own noise.

Shapes: noise [B, L] -> ids_visible [B, K], ids_hidden [B, L - K], mask [B, L]. K = visible_count(L, mask_ratio) is the
same for every image and every strategy; grid is (rows, columns) with L = rows * columns; R rectangles in block masking.

Units: mask_ratio is a fraction; the number of visible patches is rounded down. The caller draws the noise, uniform in [0, 1).

Source: He et al. 2022, arXiv 2111.06377, section 3 ("Simple implementation") and figure 6 (block, grid). Blocks follow
Bao et al. 2022, arXiv 2106.08254, algorithm 1; cells follow Hu et al. 2022, arXiv 2210.07224 (2 x 2), and Pixio (4 x 4)."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.errors import ConfigError

Masking = Literal["random", "block", "grid", "cell"]

MAX_RECTANGLES = 16
"""Most rectangles that block masking draws per image. At 75 % of 14 x 14 patches the first four suffice on average."""
MIN_RECTANGLE_SHARE = 16 / 196
"""Area of the smallest rectangle as a share of the grid: 16 of 14 x 14 patches."""
MAX_ASPECT = 1 / 0.3
"""Largest ratio of a rectangle's longer side to its shorter one."""


class Masked(NamedTuple):
    """The patches of every image, split into visible and hidden ones. Indices are in 0..L-1, in order of rank."""

    ids_visible: Tensor
    """int64 [B, K], the patches the encoder sees."""
    ids_hidden: Tensor
    """int64 [B, L - K], the patches to predict."""
    mask: Tensor
    """float32 [B, L], 1.0 where a patch is hidden."""


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """Return K, the number of visible patches: L * (1 - mask_ratio), cut to a whole number.

    The official code and Hugging Face's ViTMAE compute it by the same expression, so losses can be compared at any ratio.

    Raises:
        ConfigError: The count would leave no patch visible or none hidden.
    """
    # Binary fractions included: 400 * (1 - 0.8) is 79.99..., so 79 patches are visible there and here.
    count = int(num_patches * (1 - mask_ratio)) if math.isfinite(mask_ratio) else -1
    if not 1 <= count < num_patches:
        raise ConfigError(
            f"mask_ratio={mask_ratio} of {num_patches} patches leaves {count} visible: at least one patch must be "
            f"visible and one hidden; write 0.75 for 75 %"
        )
    return count


def mask_patches(
    noise: Tensor, *, grid: tuple[int, int], mask_ratio: float, masking: Masking, mask_cell: int = 1
) -> Masked:
    """Hide patches of every image by the strategy that `masking` names.

    The strategies are `random` (every patch is equally likely), `block` (a few large rectangles), `grid` (the visible
    patches are regularly spaced) and `cell` (whole cells of mask_cell x mask_cell patches; only `cell` reads mask_cell).

    Shapes: noise [B, rows * columns], uniform in [0, 1) -> Masked.

    Raises:
        ConfigError: mask_ratio would leave no patch visible or none hidden.
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
    """Hide a random subset of every image's patches: the K patches with the lowest noise stay visible.

    Equal noise gives equal masks; ties go to the earlier patch.

    Shapes: noise [B, L] -> Masked.

    Source: arXiv 2111.06377, section 3.

    Raises:
        ConfigError: mask_ratio would leave no patch visible or none hidden.
    """
    return _lowest_visible(noise, mask_ratio)


def _lowest_visible(rank: Tensor, mask_ratio: float) -> Masked:
    count = visible_count(rank.shape[1], mask_ratio)
    ids = torch.argsort(rank, dim=1, stable=True)  # [B, L], stable so that ties are resolved alike on every device
    ids_visible, ids_hidden = ids[:, :count], ids[:, count:]
    mask = torch.ones(rank.shape, dtype=torch.float32, device=rank.device).scatter(1, ids_visible, 0.0)
    return Masked(ids_visible, ids_hidden, mask)


def _cell_rank(noise: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Rank [B, L] for cell masking: all patches of a cell share the noise of its first patch.

    Cells at the far edges are smaller where `side` does not divide the grid.
    """
    rows, columns = (torch.arange(length, device=noise.device) // side * side for length in grid)
    first = (rows[:, None] * grid[1] + columns).flatten()  # [L]
    return noise[:, first]


def _grid_rank(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rank [B, L] for grid masking: an ordered dither, shifted by two random offsets per image.

    The lowest quarter is every second patch of every second row, the lowest half is a chequerboard, and any other share
    is spread as evenly as possible.
    """
    bits = max(1, (max(grid) - 1).bit_length())
    side = 1 << bits
    places = torch.arange(side, device=noise.device)
    table = torch.zeros(side, side, dtype=torch.int64, device=noise.device)
    # the lowest bits of row and column get the highest weight, so neighbours differ most in rank
    for bit in range(bits):
        row, column = (places >> bit & 1)[:, None], (places >> bit & 1)[None, :]
        table = table * 4 + 2 * (row ^ column) + row
    offset = (noise[:, :2] * side).long()  # [B, 2]
    rows = (places[: grid[0]] + offset[:, :1]) % side  # [B, rows]
    columns = (places[: grid[1]] + offset[:, 1:]) % side  # [B, columns]
    return table[rows[:, :, None], columns[:, None, :]].flatten(1)  # [B, L]


def _block_rank(noise: Tensor, grid: tuple[int, int], hidden: int) -> Tensor:
    """Rank [B, L] for block masking: patches outside every rectangle come first, in order of noise.

    Those of the last rectangle follow, and so on up to those of the first rectangle, which are hidden first. A rectangle
    takes four numbers of the noise: its area (at most all that is to be hidden), its aspect ratio, its row and its column.
    """
    B, L = noise.shape
    R = max(1, min(MAX_RECTANGLES, L // 4))
    # the noise is reused for the rectangles, so that every strategy takes the same input; tiny grids are padded
    drawn = torch.nn.functional.pad(noise, (0, max(0, 4 - L)), value=0.5)[:, : 4 * R].reshape(B, R, 4)
    area, shape, top, left = drawn.unbind(-1)  # each [B, R]
    smallest = min(float(hidden), MIN_RECTANGLE_SHARE * L)
    area = smallest + area * (hidden - smallest)
    aspect = (math.log(MAX_ASPECT) * (2 * shape - 1)).exp()  # height / width, log-uniform
    rows = _covered(top, (area * aspect).sqrt(), grid[0])  # [B, R, rows]
    columns = _covered(left, (area / aspect).sqrt(), grid[1])  # [B, R, columns]
    inside = (rows[..., None] & columns[..., None, :]).flatten(2)  # [B, R, L]
    first = inside.int().argmax(dim=1)  # [B, L], the first rectangle that covers a patch
    # noise - 1 is negative, so patches outside every rectangle rank below the ranks 1..R of those inside
    return torch.where(inside.any(dim=1), (R - first).to(noise.dtype), noise - 1.0)


def _covered(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """Mask [B, R, length] of the places along an axis that each rectangle covers.

    `start` in [0, 1) picks one of the places where a rectangle of that extent still fits.
    """
    size = extent.round().clamp(1, length)
    begin = (start * (length - size + 1)).floor()
    places = torch.arange(length, device=start.device)
    return (places >= begin[..., None]) & (places < (begin + size)[..., None])
