"""Images to patches and back, bytes to pixels and back.

Shapes: B images, C channels, H x W pixels, patches of side P. An image has L = (H/P) * (W/P) patches, row by row. A patch
has N = P * P * C values, ordered by row in the patch, column in the patch, channel.

Units: "images" are bytes, uint8 0..255. "Pixels" are normalised by the mean and standard deviation of each channel, which
are given on the 0..1 scale.

Source: Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1; He et al. 2022, arXiv 2111.06377, A.1."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

from collections.abc import Sequence

import torch
from torch import Tensor

from mae_core.constants import Constants
from mae_core.errors import ConfigError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches, row by row.

    Shapes: [B, C, H, W] -> [B, L, P * P * C], any dtype.

    Raises:
        ConfigError: patch_size does not divide the height and the width.
    """
    return _squares(images, patch_size).flatten(3).flatten(1, 2)  # [B, L, N]


def cut_patches(images: Tensor, patch_size: int, ids: Tensor) -> Tensor:
    """Cut some patches out of every image: `gather_patches(patchify(images, patch_size), ids)`, copying only those.

    Shapes: images [B, C, H, W], ids int64 [B, K] in 0..L-1 -> [B, K, P * P * C], any dtype.

    Raises:
        ConfigError: patch_size does not divide the height and the width.
    """
    squares = _squares(images, patch_size)
    columns = squares.shape[2]
    image = torch.arange(len(ids), device=ids.device)[:, None]  # [B, 1]
    return squares[image, ids // columns, ids % columns].flatten(2)  # [B, K, N]


def _squares(images: Tensor, patch_size: int) -> Tensor:
    """View images [B, C, H, W] as the patches of a grid, [B, h, w, P, P, C]."""
    B, C, H, W = images.shape
    P = patch_size
    if H % P or W % P:
        raise ConfigError(
            f"patch_size={P} does not divide an image of {H} x {W}: crop or resize it to multiples of {P}"
        )
    x = images.reshape(B, C, H // P, P, W // P, P)  # [B, C, h, p, w, q]
    return x.permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, q, C]


def unpatchify(patches: Tensor, *, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches back together into images; the inverse of `patchify`.

    Shapes: [B, L, P * P * C] -> [B, C, rows * P, columns * P], with grid = (rows, columns).

    Raises:
        ConfigError: The patches do not fill the grid, or their size does not fit patch_size.
    """
    B, L, N = patches.shape
    (h, w), P = grid, patch_size
    if h * w != L or N % (P * P):
        raise ConfigError(
            f"patches of shape {(B, L, N)} do not fill grid={grid} with patch_size={P}: pass the grid they were cut from"
        )
    x = patches.reshape(B, h, w, P, P, -1)  # [B, h, w, p, q, C]
    x = x.permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, q]
    return x.reshape(B, -1, h * P, w * P)  # [B, C, H, W]


def gather_patches(patches: Tensor, ids: Tensor) -> Tensor:
    """Select patches, or tokens, by index.

    Shapes: patches [B, L, N], ids int64 [B, K] in 0..L-1 -> [B, K, N].
    """
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[2]))


class PixelScale:
    """Mean and standard deviation of each channel, on the 0..1 scale. A model holds one; `normalise_pixels` is for single calls."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._constants = Constants(*(torch.tensor(values, dtype=torch.float32) for values in (mean, std)))

    def normalise(self, images: Tensor) -> Tensor:
        """Return `normalise_pixels` of images uint8 [B, H, W, C]."""
        mean, std = self._constants.on(images.device)  # [C]
        return normalise_pixels(images, mean=mean, std=std)


def normalise_pixels(images: Tensor, *, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Turn image bytes into the pixels that a model reads: (x / 255 - mean) / std, per channel.

    Shapes: uint8 [B, H, W, C] -> float32 [B, C, H, W]; mean and std hold C numbers on the 0..1 scale.

    Source: arXiv 2111.06377, A.1.

    Raises:
        TypeError: The images are not uint8; this keeps pixels from being normalised twice.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}, not uint8: normalise_pixels takes bytes 0..255, channels last")
    # scaled to 0..1 first and then normalised, the order of torchvision's ToTensor and Normalize
    x = images.permute(0, 3, 1, 2).div(255.0)  # [B, C, H, W], float32: bytes are cast as they are divided
    return x.sub(_by_channel(mean, x)).div(_by_channel(std, x))


def denormalise_pixels(pixels: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map pixels back to the 0..1 scale for display, clipping what lies outside.

    This inverts `normalise_pixels` except for its division by 255 and the move of the channels.

    Shapes: [B, C, H, W] -> float32 [B, C, H, W]; mean and std are those given to `normalise_pixels`.
    """
    x = pixels.to(torch.float32)
    return x.mul(_by_channel(std, x)).add(_by_channel(mean, x)).clamp(0.0, 1.0)


def _by_channel(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)
