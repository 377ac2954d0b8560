"""What the numbers in an image mean, where Pillow hands them over as they are stored.

Grey of more than 8 bits: white may be zero, and the range may be smaller than 16 bits. Both are told by tags of a TIFF. Colour is
converted by Pillow. What has no agreed meaning is refused as unsupported, with the way out.
Not considered: ICC profiles and PNG's chunks gAMA and cHRM; the numbers are taken as sRGB.
Units: sample values. Source: TIFF 6.0, sections 8 (baseline fields) and 16 (CMYK)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _COLOUR_MAP, _INK_SET, _SAMPLE_FORMAT = 258, 262, 281, 320, 332, 339
_WHITE_IS_ZERO, _SIGNED, _CMYK_INKS = 0, 2, 1
_WAY_OUT = "Convert it to 8 or 16 bit"


class Unsupported(ValueError):
    """An image whose numbers have no meaning that is known here."""


@dataclass(frozen=True)
class GreyScale:
    """How grey of more than 8 bits is to be read."""

    white: int | None = 65535
    """The value of the brightest grey, or None if nothing tells it."""
    white_is_zero: bool = False

    def eight_bit(self, values: NDArray[np.generic], *, transparent: int | None = None) -> NDArray[np.uint8]:
        """Scale to 8 bit (`white` -> 255) rather than clip. `transparent`: a value that becomes white."""
        # room for the product with 255, which 16 bits overflow
        wide = values.astype(np.int64)
        if self.white is None:
            raise Unsupported(f"32-bit whole numbers have no agreed range. {_WAY_OUT}")
        # a tag that the values contradict says nothing about them
        white = self.white if wide.max() <= self.white else 65535
        if wide.min() < 0 or wide.max() > white:
            raise Unsupported(f"it has values outside 0 to {white}. {_WAY_OUT}")
        light = white - wide if self.white_is_zero else wide
        grey: NDArray[np.uint8] = ((light * 255 + white // 2) // white).astype(np.uint8)
        if transparent is not None:
            grey[wide == transparent] = 255
        return grey


def grey_scale(image: Image.Image) -> GreyScale:
    """Return how to read the image if it has more than 8 bits of grey. Raises Unsupported for any image without meaning.

    Call it before the image is turned, which drops the tags.
    """
    if image.format in {"JPEG", "MPO"} and image.mode == "CMYK" and "adobe" not in image.info:
        raise Unsupported("a CMYK JPEG without Adobe's marker may be inverted or not. Convert it to RGB")
    if image.mode == "F":
        raise Unsupported(f"floating-point pixels have no agreed range. {_WAY_OUT}")
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return GreyScale()
    bits = _values(image, _BITS) or (1,)
    if _SIGNED in _values(image, _SAMPLE_FORMAT):
        raise Unsupported(f"signed pixels have no agreed black. {_WAY_OUT}, without a sign")
    if image.mode == "CMYK" and (_values(image, _INK_SET) or (_CMYK_INKS,)) != (_CMYK_INKS,):
        raise Unsupported("its four inks are not cyan, magenta, yellow and black. Convert it to RGB")
    if image.mode in {"P", "PA"} and 0 < max(_values(image, _COLOUR_MAP), default=0) < 256:
        raise Unsupported(
            "its palette holds 8-bit values where TIFF has 16-bit ones, so it would be black. Convert it to RGB"
        )
    # writers put either the largest possible or the largest present value there, so it tells only the number of bits
    told = max(_values(image, _MAX_SAMPLE), default=0).bit_length()
    depth = min(told or bits[0], bits[0])
    if len(bits) > 1 and bits[0] > 8 and depth < bits[0]:
        raise Unsupported(
            f"its {bits[0]}-bit colours use only {depth} bits and would be almost black. Convert it to 8 bit"
        )
    white = None if bits[0] > 16 and not told else 2**depth - 1
    return GreyScale(white, white_is_zero=_values(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,))


def _values(image: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[int, ...]:
    """Return the values of a tag, or an empty tuple if the image does not have it."""
    found = image.tag_v2.get(tag, ())
    return tuple(found) if isinstance(found, tuple) else (found,)
