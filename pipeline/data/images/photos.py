"""Photographs for benchmarks: those of a folder, or synthetic ones if there is no folder.

Synthetic: noise whose amplitude falls with frequency as in photographs, with polygons, ellipses and grain over it, as JPEGs of
quality 90, four of five with 4:2:0 chroma: about 500 x 375 pixels and 88 KB, as in ImageNet. A decoder's time depends on
dimensions and bytes, and hardly on the content.
Shapes: pixels [H, W, 3].   Units: pixels, bytes.   Errors: ConfigError for a folder without photographs.
Source: Field 1987, JOSA A 4(12) for the 1/f amplitude; Russakovsky et al. 2015, arXiv 1409.0575 for dimensions and bytes."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.data.images.intake import Accepted, IntakePolicy, accept_image
from pipeline.errors import ConfigError

_SIZES = ((500, 375),) * 6 + ((375, 500),) * 2 + ((500, 333),) * 2
_QUALITY = 90
_GRAIN = 8.0
"""Standard deviation in grey levels; chosen so that 500 x 375 pixels take 88 KB."""
_POLICY = IntakePolicy()


@dataclass(frozen=True)
class Photos:
    """JPEGs that a shard stores unchanged."""

    files: tuple[bytes, ...]
    origin: str
    """For the header of a table."""

    @property
    def words(self) -> str:
        """Number, origin and average size, for the header of a table."""
        return f"{len(self.files)} {self.origin}, {mean(map(len, self.files)) / 1000:.0f} KB on average"


def photos(folder: Path | None, *, count: int) -> Photos:
    """Return up to `count` photographs from a folder, or `count` synthetic ones if there is no folder.

    Only upright RGB JPEGs within the default IntakePolicy count: a shard keeps their bytes, so a benchmark that decodes the
    file decodes what training would. Raises ConfigError for a folder without such a JPEG.
    """
    if folder is None:
        return Photos(
            tuple(synthetic(number) for number in range(count)), "synthetic JPEGs (give your own with --images DIR)"
        )
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is not a folder. Give a folder that holds JPEGs")
    # sorted: the file system's order would make two measurements differ
    found = tuple(islice(_kept(sorted(folder.rglob("*"))), count))
    if not found:
        raise ConfigError(
            f"--images {folder} holds no upright RGB JPEG with a short side of at most {_POLICY.image_max_short_side} pixels. "
            "Give another folder, or leave --images out"
        )
    return Photos(found, f"JPEGs of {folder}")


def synthetic(number: int) -> bytes:
    """Return a JPEG that is determined by the number."""
    rng = np.random.default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    light = _field(rng, height, width, fall=rng.uniform(1.0, 1.5)) * rng.uniform(28, 50)
    warm, cool = (_field(rng, height, width, fall=1.6) * rng.uniform(8, 22) for _ in range(2))
    pixels = np.stack([light + warm, light - 0.4 * (warm + cool), light + cool], axis=-1) + rng.uniform(80, 170)
    ground = Image.fromarray(_bytes(pixels))
    picture = Image.blend(ground, _with_shapes(rng, ground), float(rng.uniform(0.35, 0.8)))
    # luma and chroma grain: it decides the size in bytes, and so the time that a decoder takes
    grain = rng.normal(0, _GRAIN, (height, width, 1)) + rng.normal(0, _GRAIN / 2, (height, width, 3))
    buffer = io.BytesIO()
    colour = 0 if number % 5 == 4 else 2  # 4:4:4, 4:2:0
    Image.fromarray(_bytes(np.asarray(picture) + grain)).save(buffer, "JPEG", quality=_QUALITY, subsampling=colour)
    return buffer.getvalue()


def _kept(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        if path.suffix.lower() in {".jpg", ".jpeg"} and path.is_file():
            accepted = accept_image(path.read_bytes(), _POLICY)
            if isinstance(accepted, Accepted) and accepted.policy == "kept":
                yield accepted.data


def _field(rng: np.random.Generator, height: int, width: int, *, fall: float) -> npt.NDArray[np.float64]:
    """Return [H, W] noise whose amplitude is frequency ** -fall; mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no mean
    phase = rng.uniform(0, 2 * np.pi, frequency.shape)
    field: npt.NDArray[np.float64] = np.fft.irfft2(frequency**-fall * np.exp(1j * phase), s=(height, width))
    standard: npt.NDArray[np.float64] = (field - field.mean()) / field.std()
    return standard


def _with_shapes(rng: np.random.Generator, ground: Image.Image) -> Image.Image:
    """Return a copy with a dozen polygons and ellipses drawn on it."""
    picture = ground.copy()
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(6, 22)):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, ground.width), rng.uniform(0, ground.height)
        radius = rng.uniform(0.03, 0.3) * min(ground.size)
        if rng.random() < 0.5:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)
        else:
            draw.ellipse((x - radius, y - 0.6 * radius, x + radius, y + 0.6 * radius), fill=colour)
    return picture


def _bytes(pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return np.clip(pixels, 0, 255).astype(np.uint8)
