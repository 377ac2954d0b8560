"""Stronger augmentations for supervised training, on pictures that have been cut out: RandAugment, then random erasing.

Both are timm's. RandAugment runs timm's operations, and erasing chooses its boxes as timm does; only the random numbers come from
the caller, who draws them by the sample's key. timm draws from the global generators of Python and numpy, so what it makes of an
image depends on which thread or process made the others.
timm is imported for the first picture that needs it: that takes 3 s and 200 MB, torchvision included.

Shapes: pictures [H, W, 3] uint8 RGB, uniforms [RandAugment.uniforms] and [ERASE_UNIFORMS].
Source: Cubuk et al. 2019, arXiv 1909.13719; Zhong et al. 2017, arXiv 1708.04896; timm.data for the names and the magnitudes."""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from mae_core.config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import ConfigError

Image = npt.NDArray[np.uint8]
Uniforms = npt.NDArray[np.float64]

_TRIES = 10
ERASE_UNIFORMS = 1 + 2 * _TRIES + 3
"""Random numbers of one erasing: whether, area and aspect ratio of each try, then top, left and the key of the noise."""
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_LAYER_UNIFORMS = 5
_MOST = 10.0
"""The largest magnitude."""
_FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""The colour of what a rotation, a shear or a shift uncovers."""

_OPERATIONS: Mapping[str, Callable[[float, float], tuple[float, ...]]] = {
    "AutoContrast": lambda m, sign: (),
    "Equalize": lambda m, sign: (),
    "Invert": lambda m, sign: (),
    "Rotate": lambda m, sign: (sign * (m / _MOST * 30.0),),
    "PosterizeIncreasing": lambda m, sign: (max(1, 4 - int(m / _MOST * 4)),),  # Pillow refuses 0 bits, timm's strongest
    "SolarizeIncreasing": lambda m, sign: (256 - min(256, int(m / _MOST * 256)),),
    "SolarizeAdd": lambda m, sign: (min(128, int(m / _MOST * 110)),),
    "ColorIncreasing": lambda m, sign: (_enhancement(m, sign),),
    "ContrastIncreasing": lambda m, sign: (_enhancement(m, sign),),
    "BrightnessIncreasing": lambda m, sign: (_enhancement(m, sign),),
    "SharpnessIncreasing": lambda m, sign: (_enhancement(m, sign),),
    "ShearX": lambda m, sign: (sign * (m / _MOST * 0.3),),
    "ShearY": lambda m, sign: (sign * (m / _MOST * 0.3),),
    "TranslateXRel": lambda m, sign: (sign * (m / _MOST * 0.45),),
    "TranslateYRel": lambda m, sign: (sign * (m / _MOST * 0.45),),
}
"""timm's names of the operations of `inc1`, and their arguments at a magnitude, with a sign where there are two directions."""


class RandAugment(NamedTuple):
    """How many operations, and how strong ones."""

    magnitude: float
    """Of 10."""
    layers: int
    """Operations per picture, each of which is left out half of the time."""
    deviation: float
    """Standard deviation of the magnitude."""

    @property
    def uniforms(self) -> int:
        """Random numbers of one picture."""
        return self.layers * _LAYER_UNIFORMS

    @classmethod
    @cache
    def parse(cls, text: str) -> "RandAugment":
        """Read timm's notation. Raises ConfigError for anything else, and for policies other than `inc1`."""
        found = re.fullmatch(r"rand-m(\d+(?:\.\d+)?)(?:-n([1-9]))?(?:-mstd(\d+(?:\.\d+)?))?-inc1", text)
        if not found or float(found[1]) > _MOST:
            raise ConfigError(
                f"rand_augment={text!r} is not of the form rand-m9-n2-mstd0.5-inc1, with a magnitude m of at most 10: write "
                "rand-m9-mstd0.5-inc1, or null for none"
            )
        return cls(float(found[1]), int(found[2] or 2), float(found[3] or 0.0))


def rand_augment(image: Image, uniforms: Uniforms, policy: RandAugment) -> Image:
    """Return the picture after the operations that the uniforms choose."""
    from timm.data.auto_augment import NAME_TO_OP

    changed = PillowImage.fromarray(image)
    for which, whether, normal, turn, direction in uniforms.reshape(policy.layers, _LAYER_UNIFORMS):
        if whether >= 0.5:
            continue
        name = list(_OPERATIONS)[int(which * len(_OPERATIONS))]
        # Box and Muller's normal number
        drawn = math.sqrt(-2 * math.log(1 - normal)) * math.cos(2 * math.pi * turn)
        magnitude = min(_MOST, max(0.0, policy.magnitude + policy.deviation * drawn))
        arguments = _OPERATIONS[name](magnitude, 1.0 if direction < 0.5 else -1.0)
        changed = NAME_TO_OP[name](changed, *arguments, fillcolor=_FILL, resample=PillowImage.Resampling.BICUBIC)
    return np.asarray(changed)


def erase(image: Image, uniforms: Uniforms, *, probability: float) -> Image:
    """Return the picture, with a rectangle of it replaced by noise at this probability.

    Once the pixels are normalised with ImageNet's statistics, each is a standard normal number (timm's mode `pixel`), except that
    those beyond black and white are clipped: 2.5 % below and 0.8 % above.
    """
    if uniforms[0] >= probability:
        return image
    height, width, _ = image.shape
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    for area_share, aspect in uniforms[1 : 1 + 2 * _TRIES].reshape(_TRIES, 2):
        area = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * area_share)
        stretch = math.exp(low + (high - low) * aspect)
        box_height, box_width = round(math.sqrt(area * stretch)), round(math.sqrt(area / stretch))
        if box_height < height and box_width < width:
            top, left = int(uniforms[-3] * (height - box_height + 1)), int(uniforms[-2] * (width - box_width + 1))
            erased = image.copy()
            erased[top : top + box_height, left : left + box_width] = _noise(uniforms[-1], box_height, box_width)
            return erased
    return image


def _enhancement(magnitude: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * (magnitude / _MOST * 0.9))


def _noise(key: float, height: int, width: int) -> Image:
    # A generator of its own, from the 53 bits of the uniform, since a box takes up to 50,000 numbers at 224 pixels.
    count = height * width * 3
    words = np.random.Philox(key=int(key * 2**53)).random_raw(-(-count // 4))
    # "<": the four numbers of a word come in the same order on machines of either byte order
    drawn = words.astype("<u8").view("<u2")[:count].reshape(height, width, 3)
    table = _noise_table()
    return np.stack([table[channel][drawn[..., channel]] for channel in range(3)], axis=-1)


@cache
def _noise_table() -> Image:
    """Return the 8-bit value of a normal number for each 16-bit uniform and channel, [3, 65536].

    A table of whole numbers, because logarithms and cosines may differ by a bit between processors."""
    uniforms = (np.arange(2**16) + 0.5) / 2**16
    ends = (np.arange(255) + 0.5) / 255  # between one 8-bit value and the next
    rows = []
    for mean, deviation in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True):
        below = [NormalDist(mean, deviation).cdf(end) for end in ends]
        rows.append(np.searchsorted(below, uniforms).astype(np.uint8))
    return np.stack(rows)
