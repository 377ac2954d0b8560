"""From JPEG bytes to the pixels the model sees: decode, choose a box, resize, flip, and augment further if asked to.

`picture` equals `augment(decode(data), ...)` pixel for pixel, but does not decode the rows below the box.

Shapes: image [H, W, 3] uint8 RGB; size = (height, width). Boxes are in pixels of the decoded image; uniforms are
    [AugmentConfig.uniforms].
Hot path: simplejpeg, then torch's antialiased bicubic on uint8, channels last: twice Pillow's speed on one core, and integers
    end to end, so equal on every CPU kernel tried. torch's float kernel is slower and differs between kernels.
Errors: DataError for bytes that are not an RGB picture, ConfigError for settings that cannot work.
Source: the box follows torchvision's RandomResizedCrop (Szegedy et al. 2015, arXiv 1409.4842)."""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage

from mae_core.config import ADDED_LATER
from pipeline.data.images.augmentations import ERASE_UNIFORMS, RandAugment, erase, rand_augment
from pipeline.data.images.jpeg_rows import decode_top
from pipeline.errors import ConfigError, DataError

Image = npt.NDArray[np.uint8]
Uniforms = npt.NDArray[np.float64]

_TRIES = 10
AUGMENT_UNIFORMS = 2 * _TRIES + 3
"""Random numbers of one crop: area and aspect ratio of each try, then top, left and flip."""


class Box(NamedTuple):
    """A rectangle of an image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a training picture is cut out of a stored image."""

    kind: Literal["random_resized_crop", "clipped_crop", "random_crop", "shift", "center"] = "random_resized_crop"
    """random_resized_crop: as in MAE's pretraining; clipped_crop: as in its linear probe, where a box that does not fit is clipped
    and not drawn again; random_crop: of one size, anywhere; shift: pad and crop, for images of a few dozen pixels; center: only the
    flip is random."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop."""
    shift_pixels: int = 4
    """Most pixels by which `shift` moves the image; the border is mirrored."""
    crop_ratio: float = 0.875
    """Share of the short side that `center` and `random_crop` keep: 224 of 256. A centre crop uses an image of the target size
    whole."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rand_augment: str | None = field(default=None, metadata=ADDED_LATER)
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1; null for none. For supervised training."""
    erasing: float = field(default=0.0, metadata=ADDED_LATER)
    """Probability that a rectangle of the picture is replaced by noise (random erasing, mode `pixel`). For supervised training."""

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            RandAugment.parse(self.rand_augment)
        if not 0 <= self.erasing <= 1:
            raise ConfigError(f"erasing={self.erasing} is not in [0, 1]: write 0 for none")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"scale={self.scale} is not a range within (0, 1]: write (0.2, 1.0)")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"ratio={self.ratio} is not a range of width / height above 0: write (0.75, 1.3333)")
        if self.shift_pixels < 0:
            raise ConfigError(f"shift_pixels={self.shift_pixels} is negative: write 0 or more")
        if not 0 < self.crop_ratio <= 1:
            raise ConfigError(f"crop_ratio={self.crop_ratio} is not in (0, 1]: write 0.875 for 224 of 256")

    @property
    def uniforms(self) -> int:
        """Random numbers of one picture: those of the crop come first, and do not depend on the rest."""
        policy = RandAugment.parse(self.rand_augment).uniforms if self.rand_augment else 0
        return AUGMENT_UNIFORMS + policy + (ERASE_UNIFORMS if self.erasing else 0)

    def for_evaluation(self) -> "AugmentConfig":
        """Return the same without anything random: a crop from the centre."""
        return replace(self, kind="center", flip=False, rand_augment=None, erasing=0.0)


def decode(data: bytes) -> Image:
    """Return [H, W, 3] pixels: JPEGs by simplejpeg, which refuses a damaged file, other formats by Pillow.

    Raises DataError for damage and for anything but RGB. It does not name the file, which only the caller knows.
    """
    with _decoding_errors():
        if not _is_jpeg(data):
            with PillowImage.open(io.BytesIO(data)) as file:
                if file.mode != "RGB":
                    raise DataError(f"its mode is {file.mode}, not RGB")
                return np.array(file)  # a copy: Pillow's own buffer is read-only, which torch.from_numpy warns of
        _jpeg_size(data)  # for its check of the colours
        image: Image = simplejpeg.decode_jpeg(data, "RGB")
    return image


def _is_jpeg(data: bytes) -> bool:
    return data[:2] == b"\xff\xd8"


def _jpeg_size(data: bytes) -> tuple[int, int]:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space not in {"YCbCr", "RGB"}:
        raise DataError(f"it is a JPEG of {space}, not RGB")
    return height, width


@contextmanager
def _decoding_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise DataError(f"it does not decode ({error})") from error


def random_resized_crop(
    uniforms: Uniforms, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return a box of random area, aspect ratio and position: the first of ten tries that fits, else the largest central box."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_share, aspect in uniforms[: 2 * _TRIES].reshape(_TRIES, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_share)
        stretch = math.exp(low + (high - low) * aspect)
        box_width, box_height = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        if 0 < box_width <= width and 0 < box_height <= height:
            # the same numbers place the box whichever try fits, so that every sample draws equally many
            top = int(uniforms[2 * _TRIES] * (height - box_height + 1))
            left = int(uniforms[2 * _TRIES + 1] * (width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def clipped_crop(
    uniforms: Uniforms, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Return a box of random area, aspect ratio and position, with sides that are cut to those of the image.

    Source: `util/crop.py` of the official MAE, after BYOL's TensorFlow code.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[0])
    stretch = math.exp(low + (high - low) * uniforms[1])
    box_width, box_height = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
    box_width, box_height = max(1, min(width, box_width)), max(1, min(height, box_height))
    top = int(uniforms[2 * _TRIES] * (height - box_height + 1))
    left = int(uniforms[2 * _TRIES + 1] * (width - box_width + 1))
    return Box(top, left, box_height, box_width)


def center_box(height: int, width: int, *, target: tuple[int, int], crop_ratio: float) -> Box:
    """Return the central box with the target's aspect ratio, `crop_ratio` times the largest one that fits.

    An image of the target's size is used whole. Up to rounding, the box covers what "resize the short side to 256, crop 224"
    covers, with one resize.
    """
    if (height, width) == target:
        return Box(0, 0, height, width)
    box_height, box_width = _crop_sides(height, width, target=target, crop_ratio=crop_ratio)
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def random_crop(uniforms: Uniforms, height: int, width: int, *, target: tuple[int, int], crop_ratio: float) -> Box:
    """Return a box of the target's aspect ratio, `crop_ratio` times the largest one that fits, at a random position."""
    box_height, box_width = _crop_sides(height, width, target=target, crop_ratio=crop_ratio)
    top = int(uniforms[2 * _TRIES] * (height - box_height + 1))
    left = int(uniforms[2 * _TRIES + 1] * (width - box_width + 1))
    return Box(top, left, box_height, box_width)


def _crop_sides(height: int, width: int, *, target: tuple[int, int], crop_ratio: float) -> tuple[int, int]:
    zoom = crop_ratio * min(height / target[0], width / target[1])
    return max(1, round(target[0] * zoom)), max(1, round(target[1] * zoom))


def shift_crop(uniforms: Uniforms, image: Image, *, pixels: int) -> Image:
    """Return the image moved by up to `pixels` in each direction, with a mirrored border; the size stays the same."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    top, left = (int(u * (2 * pixels + 1)) for u in uniforms[2 * _TRIES : 2 * _TRIES + 2])
    return padded[top : top + height, left : left + width]


def resize(image: Image, box: Box, size: tuple[int, int]) -> Image:
    """Return the box resized to `size`; a box that already has this size keeps its pixels."""
    part = image[box.top : box.top + box.height, box.left : box.left + box.width]
    if part.shape[:2] == size:
        return part  # a view: the loader copies it into the batch
    # numpy copies the box, because torch would copy it with all its threads: 7 ms instead of 0.1 with two of them. And the
    # batch axis is added before the others move, or torch does not recognise channels last: 0.4 ms instead of 0.3.
    tensor = torch.from_numpy(np.ascontiguousarray(part))[None].permute(0, 3, 1, 2)  # [1, 3, h, w], channels last
    resized = F.interpolate(tensor, size=size, mode="bicubic", antialias=True, align_corners=False)
    out: Image = resized[0].permute(1, 2, 0).numpy()  # [*size, 3]
    return out


def augment(image: Image, uniforms: Uniforms, config: AugmentConfig, size: tuple[int, int]) -> Image:
    """Return a [*size, 3] training picture. All randomness is in `uniforms`, which the caller draws by the sample's key."""
    if config.kind == "shift":
        image = shift_crop(uniforms, image, pixels=config.shift_pixels)
    height, width, _ = image.shape
    return _cut(image, box_of(height, width, uniforms, config, size), uniforms, config, size)


def picture(data: bytes, uniforms: Uniforms, config: AugmentConfig, size: tuple[int, int]) -> Image:
    """Return `augment(decode(data), ...)`, [*size, 3], for bytes that were decoded before: damage below the box goes unnoticed.

    Raises DataError, without the name of the file, which only the caller knows.
    """
    # a shift mirrors the lower border, so it needs every row
    if config.kind == "shift" or not _is_jpeg(data):
        return augment(decode(data), uniforms, config, size)
    with _decoding_errors():
        height, width = _jpeg_size(data)
        box = box_of(height, width, uniforms, config, size)
        image = decode_top(data, rows=box.top + box.height)
    return _cut(image, box, uniforms, config, size)


def _cut(image: Image, box: Box, uniforms: Uniforms, config: AugmentConfig, size: tuple[int, int]) -> Image:
    out = resize(image, box, size)
    if is_mirrored(uniforms, config):
        out = torch.from_numpy(out).flip(1).numpy()  # 40 us, where copying numpy's [:, ::-1] takes 300
    if config.rand_augment:
        policy = RandAugment.parse(config.rand_augment)
        out = rand_augment(out, uniforms[AUGMENT_UNIFORMS : AUGMENT_UNIFORMS + policy.uniforms], policy)
    return erase(out, uniforms[-ERASE_UNIFORMS:], probability=config.erasing) if config.erasing else out


def reference_picture(data: bytes, uniforms: Uniforms, config: AugmentConfig, size: tuple[int, int]) -> Image:
    """Return what `picture` is compared with: Pillow throughout, with the calls that torchvision makes.

    For tests and benchmarks. `kind` may be anything but "shift".
    """
    with PillowImage.open(io.BytesIO(data)) as file:
        whole = file.convert("RGB")
    box = box_of(whole.height, whole.width, uniforms, config, size)
    part = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    resized = part.resize(size[::-1], PillowImage.Resampling.BICUBIC)
    if is_mirrored(uniforms, config):
        resized = resized.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)
    return np.array(resized)


def box_of(height: int, width: int, uniforms: Uniforms, config: AugmentConfig, size: tuple[int, int]) -> Box:
    """Return the part of an image (already moved if kind is "shift") that becomes the training picture."""
    if config.kind == "random_resized_crop":
        return random_resized_crop(uniforms, height, width, scale=config.scale, ratio=config.ratio)
    if config.kind == "clipped_crop":
        return clipped_crop(uniforms, height, width, scale=config.scale, ratio=config.ratio)
    if config.kind == "random_crop":
        return random_crop(uniforms, height, width, target=size, crop_ratio=config.crop_ratio)
    return center_box(height, width, target=size, crop_ratio=1.0 if config.kind == "shift" else config.crop_ratio)


def is_mirrored(uniforms: Uniforms, config: AugmentConfig) -> bool:
    """Return whether the picture is flipped left to right."""
    return bool(config.flip and uniforms[AUGMENT_UNIFORMS - 1] < 0.5)
