"""Photographs to measure with: those of a folder, or made up where there are none.

Made up: fields whose amplitude falls with frequency as that of photographs does, polygons and ellipses over them, and grain,
as JPEGs of quality 90, four of five with halved colour: 500 x 375 pixels or so and 88 KB, as ImageNet's are. A decoder's time
depends on size and bytes, hardly on what is seen.
Shapes: pixels [H, W, 3].   Units: pixels, bytes.   Errors: ConfigError for a folder without photographs.
Source: amplitude as 1/f: Field 1987, JOSA A 4(12); Russakovsky et al. 2015, arXiv 1409.0575 for size and bytes."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.data.images.intake import Taken, take_in
from pipeline.errors import ConfigError

_SIZES = ((500, 375),) * 6 + ((375, 500),) * 2 + ((500, 333),) * 2
_QUALITY = 90
_GRAIN = 8.0
"""Deviation in grey levels: what brings 500 x 375 pixels to 88 KB."""
_MAX_SIDE, _MAX_PIXELS = 512, 100_000_000


@dataclass(frozen=True)
class Photos:
    """JPEGs that a shard stores as they are."""

    files: tuple[bytes, ...]
    origin: str
    """In words, for the head of a table."""

    @property
    def words(self) -> str:
        """How many, where from, how large."""
        return f"{len(self.files)} {self.origin}, {mean(map(len, self.files)) / 1000:.0f} KB on average"


def photos(folder: Path | None, *, count: int) -> Photos:
    """Up to `count` photographs of a folder; as many made-up ones where there is no folder.

    A folder's are the upright RGB JPEGs with a short side of at most 512, which keep their bytes in a shard: what is decoded is the
    file. Errors: ConfigError for a folder that has none.
    """
    if folder is None:
        return Photos(
            tuple(made_up(number) for number in range(count)), "made-up JPEGs (give your own with --images DIR)"
        )
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is no folder: name one that holds JPEGs")
    found = tuple(islice(_kept(sorted(folder.rglob("*"))), count))
    if not found:
        raise ConfigError(
            f"--images {folder} holds no upright RGB JPEG with a short side of at most {_MAX_SIDE} pixels: name another "
            "folder, or leave --images out"
        )
    return Photos(found, f"JPEGs of {folder}")


def made_up(number: int) -> bytes:
    """A JPEG, another for every number and always the same for one."""
    rng = np.random.default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    light = _field(rng, height, width, fall=rng.uniform(1.0, 1.5)) * rng.uniform(28, 50)
    warm, cool = (_field(rng, height, width, fall=1.6) * rng.uniform(8, 22) for _ in range(2))
    pixels = np.stack([light + warm, light - 0.4 * (warm + cool), light + cool], axis=-1) + rng.uniform(80, 170)
    ground = Image.fromarray(_bytes(pixels))
    picture = Image.blend(ground, _with_shapes(rng, ground), float(rng.uniform(0.35, 0.8)))
    grain = rng.normal(0, _GRAIN, (height, width, 1)) + rng.normal(0, _GRAIN / 2, (height, width, 3))
    buffer = io.BytesIO()
    colour = 0 if number % 5 == 4 else 2  # 4:4:4, 4:2:0
    Image.fromarray(_bytes(np.asarray(picture) + grain)).save(buffer, "JPEG", quality=_QUALITY, subsampling=colour)
    return buffer.getvalue()


def _kept(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        if path.suffix.lower() in {".jpg", ".jpeg"} and path.is_file():
            taken = take_in(path.read_bytes(), max_side=_MAX_SIDE, max_pixels=_MAX_PIXELS)
            if isinstance(taken, Taken) and taken.policy == "kept":
                yield taken.data


def _field(rng: np.random.Generator, height: int, width: int, *, fall: float) -> npt.NDArray[np.float64]:
    """[H, W] noise whose amplitude falls with frequency to the power of `fall`; mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no mean
    phase = rng.uniform(0, 2 * np.pi, frequency.shape)
    field: npt.NDArray[np.float64] = np.fft.irfft2(frequency**-fall * np.exp(1j * phase), s=(height, width))
    standard: npt.NDArray[np.float64] = (field - field.mean()) / field.std()
    return standard


def _with_shapes(rng: np.random.Generator, ground: Image.Image) -> Image.Image:
    """The picture with a dozen polygons and ellipses on it."""
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
