"""Whether two pictures come from one photograph, by their grey thumbnails: correlation after alignment.

A thumbnail is reduced to the detail between two Gaussian blurs, which drops brightness and the colour of the light. The middle
of one is stretched a little in each direction and moved over the other, and the best normalised correlation counts: 1 for a
copy, about 0.25 for two unrelated photographs. It is a pixel measure rather than an embedding, so it needs no trained model.
The dot product of two results of `coarse` is the same without alignment, which is cheap and good enough to choose pairs by.
Not seen: mirrored copies, turns, and crops to less than 85 % of a side.

Shapes: thumbnail [SIDE, SIDE] uint8; T = templates, W = places of a template.   Units: Gaussians and shifts in thumbnail pixels.
Source: docs/decisions/026-near-duplicates-by-pixels.md has the curves that chose the constants."""

from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image as PillowImage

from pipeline.data.images.pictures import decode
from pipeline.errors import DataError

SIDE = 32
Thumbnail = NDArray[np.uint8]
Floats = NDArray[np.float32]

_MIDDLE = 24
"""Side of the part that is moved: by up to 4 pixels either way, 12 % of the picture."""
_FINE = (0.7, 2.0)
_COARSE = (2.0, 4.0)
_ZOOMS = (0.85, 0.925, 1.0, 1.08, 1.17)
_STRETCH_MAX = 1.2
"""Largest ratio of the two zooms."""
_NOISE = 0.5
"""Standard deviation of detail that is taken for noise, in grey levels, so that plain areas correlate with nothing."""
_ALIGNED_FROM = 0.4
"""Correlation without zoom below which no zoom is tried: of ciFAIR's pairs that are found at all, all but 1 % are above."""


class _Blurs(NamedTuple):
    narrow: Floats  # [zooms, _MIDDLE, SIDE]
    wide: Floats


def thumbnail(data: bytes) -> Thumbnail:
    """Return the [SIDE, SIDE] grey thumbnail of a stored image; its aspect ratio is dropped. Raises DataError for damage."""
    if data[:2] == b"\xff\xd8":
        try:
            # libjpeg halves the picture while it decodes, as long as it stays this large
            grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=2 * SIDE, min_width=2 * SIDE)[:, :, 0]
        except ValueError as error:
            raise DataError(f"it does not decode ({error})") from error
        image = PillowImage.fromarray(grey)
    else:
        image = PillowImage.fromarray(decode(data)).convert("L")
    return np.asarray(image.resize((SIDE, SIDE), PillowImage.Resampling.BILINEAR))


def same_pixels(one: bytes, other: bytes) -> bool:
    """Return whether two stored images decode to equal pixels."""
    return one == other or np.array_equal(decode(one), decode(other))


def coarse(thumbnails: Thumbnail) -> Floats:
    """Return [n, (SIDE / 2)^2] unit vectors of coarse detail; the dot product of two is their correlation without alignment."""
    # every other pixel holds all of it after a blur of two pixels
    detail = _detail(thumbnails, _COARSE)[:, ::2, ::2]
    return _unit(detail.reshape(len(thumbnails), (SIDE // 2) ** 2))


def similarity(one: Thumbnail, other: Thumbnail) -> float:
    """Return the best correlation of the middle of `one`, zoomed, with any place of `other`."""
    # row by row of places, as products this small stay on one thread: BLAS's threads would wait for each other here
    places = _places(other)  # [rows, columns, _MIDDLE^2]
    templates = _templates(one)  # [zooms, zooms, _MIDDLE^2]
    whole = _ZOOMS.index(1.0)
    unzoomed = float((places @ templates[whole, whole, :, None]).max())
    if unzoomed < _ALIGNED_FROM:
        return unzoomed
    return float((places @ templates[_zoom_pairs()].T).max())


def _templates(thumbnail: Thumbnail) -> Floats:
    blurs, image = _blurs(), thumbnail.astype(np.float32)
    # a picture zoomed, blurred and cut is a product from both sides, one matrix per zoom of each axis
    narrow = (blurs.narrow @ image)[:, None] @ blurs.narrow.transpose(0, 2, 1)[None]
    wide = (blurs.wide @ image)[:, None] @ blurs.wide.transpose(0, 2, 1)[None]
    return _unit(np.asarray(narrow - wide, np.float32).reshape(len(_ZOOMS), len(_ZOOMS), -1))


def _places(thumbnail: Thumbnail) -> Floats:
    windows = np.lib.stride_tricks.sliding_window_view(_detail(thumbnail, _FINE), (_MIDDLE, _MIDDLE))
    return _unit(windows.reshape(*windows.shape[:2], _MIDDLE * _MIDDLE))


def _detail(thumbnails: Thumbnail, blurs: tuple[float, float]) -> Floats:
    """Return the difference of two blurs of one thumbnail or of several."""
    narrow, wide = map(_gaussian, blurs)
    images = thumbnails.astype(np.float32)
    return np.asarray(narrow @ images @ narrow.T - wide @ images @ wide.T, np.float32)


def _unit(rows: Floats) -> Floats:
    rows = rows - rows.mean(-1, keepdims=True)
    energy = (rows * rows).sum(-1, keepdims=True)
    unit: Floats = rows / np.sqrt(energy + np.float32(_NOISE**2 * rows.shape[-1]))
    return unit


@cache
def _zoom_pairs() -> NDArray[np.bool_]:
    zooms = np.array(_ZOOMS)
    allowed: NDArray[np.bool_] = zooms[:, None] <= _STRETCH_MAX * zooms
    return allowed & allowed.T


@cache
def _blurs() -> _Blurs:
    cut = slice((SIDE - _MIDDLE) // 2, (SIDE + _MIDDLE) // 2)
    zooms = [_zoom(zoom) for zoom in _ZOOMS]
    return _Blurs(*(np.stack([(_gaussian(sigma) @ zoom)[cut] for zoom in zooms]) for sigma in _FINE))


@cache
def _gaussian(sigma: float) -> Floats:
    """Return the matrix [SIDE, SIDE] that blurs a column; what lies beyond the border has no weight."""
    at = np.arange(SIDE)
    weights = np.exp(-0.5 * ((at[:, None] - at[None]) / sigma) ** 2)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def _zoom(factor: float) -> Floats:
    """Return the matrix [SIDE, SIDE] that enlarges a column about its middle, linearly; the border is repeated."""
    middle = (SIDE - 1) / 2
    at = np.clip((np.arange(SIDE) - middle) / factor + middle, 0, SIDE - 1)
    below = np.minimum(at.astype(np.int64), SIDE - 2)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    matrix[np.arange(SIDE), below] = 1 - (at - below)
    matrix[np.arange(SIDE), below + 1] = at - below
    return matrix
