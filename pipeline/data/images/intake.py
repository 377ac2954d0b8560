"""One image's bytes, taken in or refused: afterwards every stored image is an upright RGB JPEG that decodes.

Upright three-component JPEGs whose short side is at most `max_side` keep their bytes (after simplejpeg, the training
reader, has decoded them strictly). Everything else that Pillow can read is encoded once more: turned as EXIF says, made
RGB (alpha on white, 16 bit scaled, first frame of an animation), its short side reduced to `max_side` with antialiased
bicubic, quality 95, 4:4:4. The policy says which: "kept", or "reencoded:" and reasons.
Tars of others are not written anew: there an image is taken as it is, or refused (`check_in_place`).
Units: pixels; `max_pixels` bounds what is decoded, before decoding. Pure: the same bytes give the same result.
Errors: none for bad images (Refused, with a reason); MemoryError passes."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

INTAKE_VERSION = 2
"""Part of every plan's digest; bumped by hand when stored bytes, refusals or hashes change."""
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_QUALITY = 95
_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BAD_BYTES = (
    OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on damaged or hostile bytes."""

# Ours is the bound (`max_pixels`), checked before any decoding; Pillow's own would warn below it and refuse without numbers.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Taken:
    """An image as it will be stored."""

    data: bytes
    width: int
    height: int
    original_width: int
    """Of the upright original, before any resize."""
    original_height: int
    dhash64: int
    policy: str


@dataclass(frozen=True)
class Refused:
    """An image that goes to quarantine."""

    reason: str
    """empty, unreadable, truncated, too_many_pixels, unsupported, needs_reencoding; who reads adds: missing, denied, ..."""
    detail: str


def take_in(data: bytes, *, max_side: int, max_pixels: int) -> Taken | Refused:
    """Decodes fully, and decides."""
    if not data:
        return Refused("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _too_large(image, max_pixels) or _keep(data, image, max_side) or _reencode(image, max_side)
    except _BAD_BYTES as error:
        return _bad(error)


def check_in_place(data: bytes, *, max_pixels: int) -> Taken | Refused:
    """Takes an image of a tar of others as it is, or not at all: upright, RGB, still, and JPEG, PNG or WebP.

    Its bytes stay where they are, so no side is too long; `max_pixels` bounds it.
    """
    if not data:
        return Refused("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return _too_large(image, max_pixels) or _as_it_is(data, image)
    except _BAD_BYTES as error:
        return _bad(error)


def dhash64(image: Image.Image) -> int:
    """Perceptual difference hash: is a pixel of the 9 x 8 grey miniature darker than its right neighbour."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


def _as_it_is(data: bytes, image: Image.Image) -> Taken | Refused:
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    wrong = [
        *(["turned by EXIF"] if _turned(image) else []),
        *([f"{image.mode}, not RGB"] if image.mode != "RGB" or image.has_transparency_data else []),
        *([kind] if kind not in {"JPEG", "PNG", "WEBP"} else []),
        *(["animated"] if kind != "JPEG" and getattr(image, "is_animated", False) else []),
    ]
    if wrong:
        what = f"it is {', '.join(wrong)}, and would have to be encoded anew, which is not done in an indexed tar. "
        return Refused("needs_reencoding", f"{what}Unpack the tars and point data.source at the folder")
    if kind == "JPEG":
        pixels = _decoded(data)
    else:
        image.load()
        pixels = image
    return Taken(data, *pixels.size, *pixels.size, dhash64(pixels), "indexed")


def _too_large(image: Image.Image, max_pixels: int) -> Refused | None:
    width, height = image.size
    if width * height <= max_pixels:
        return None
    detail = f"{width} x {height} = {width * height} pixels, allowed are {max_pixels} (image_max_pixels)"
    return Refused("too_many_pixels", detail)


def _bad(error: BaseException) -> Refused:
    text = str(error)
    cut = any(word in text.lower() for word in ("truncated", "premature", "not enough", "broken png"))
    # "cannot identify image file <_io.BytesIO object at 0x7f...>" would differ at every run
    return Refused(
        "truncated" if cut else "unreadable", f"{type(error).__name__}: {text.split(' <_io', maxsplit=1)[0]}"
    )


def _keep(data: bytes, image: Image.Image, max_side: int) -> Taken | None:
    if image.format not in {"JPEG", "MPO"} or image.mode != "RGB" or _turned(image) or min(image.size) > max_side:
        return None
    try:
        grey = _decoded(data)
    except ValueError:
        return None  # Pillow may still read it; then it is stored repaired
    width, height = image.size
    return Taken(data, width, height, width, height, dhash64(grey), "kept")


def _decoded(data: bytes) -> Image.Image:
    """A JPEG that the training reader takes; of luma and chroma, the luma alone: less work.

    The codes of all components are read, so no damage passes. Errors: ValueError for one that the reader does not take.
    """
    if simplejpeg.decode_jpeg_header(data)[2] == "YCbCr":
        return Image.fromarray(simplejpeg.decode_jpeg(data, "GRAY", strict=True)[..., 0])
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))


def _reencode(image: Image.Image, max_side: int) -> Taken | Refused:
    reasons = []
    jpeg = image.format in {"JPEG", "MPO"}
    if not jpeg:
        reasons.append(str(image.format).lower())
    turned = _turned(image)  # before load: TIFF turns itself there, and forgets
    if turned:
        reasons.append("exif")
    if not jpeg and getattr(image, "is_animated", False):
        reasons.append("animated")
    image.load()
    upright = ImageOps.exif_transpose(image) if turned else image
    if upright.mode in _SIXTEEN_BIT:
        grey = _eight_bit(np.asarray(upright))
        if grey is None:
            return Refused(
                "unsupported", f"mode {upright.mode} with values outside 0 to 65535. Convert it to 8 or 16 bit"
            )
        upright = Image.fromarray(grey)
        reasons.append("16bit")
    elif upright.mode == "F":
        return Refused("unsupported", "floating-point pixels have no agreed range. Convert it to 8 or 16 bit")
    names = {"CMYK": "cmyk", "P": "palette", "PA": "palette", "1": "grayscale", "L": "grayscale", "LA": "grayscale"}
    if upright.mode in names:
        reasons.append(names[upright.mode])
    elif upright.mode not in {"RGB", "RGBA"}:
        reasons.append(f"mode_{upright.mode.lower()}")
    if upright.has_transparency_data:
        reasons.append("alpha")
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    rgb = upright.convert("RGB")
    stored = _shrunk(rgb, max_side)
    if stored.size != rgb.size:
        reasons.append("resized")
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    policy = f"reencoded:{','.join(reasons or ['repaired'])}"
    return Taken(buffer.getvalue(), *stored.size, *rgb.size, dhash64(stored), policy)


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except _BAD_BYTES:
        return False  # a damaged EXIF block says nothing, and hides no pixels


def _eight_bit(values: NDArray[np.generic]) -> NDArray[np.uint8] | None:
    """16-bit grey scaled (65535 -> 255), not clipped."""
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        return None
    return ((wide * 255 + 32767) // 65535).astype(np.uint8)


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    short = min(image.size)
    if short <= max_side:
        return image
    width, height = ((side * max_side + short // 2) // short for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
