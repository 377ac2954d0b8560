"""One image's bytes, accepted or refused when its shard is written. Every accepted image decodes to upright RGB.

Upright three-component JPEGs whose short side is at most `image_max_short_side` keep their bytes (after simplejpeg, the
training reader, has decoded them strictly). Everything else that Pillow can read is re-encoded once: turned as its EXIF
says, converted to RGB (alpha over white, 16 bit scaled, first frame of an animation), its short side reduced to
`image_max_short_side` with antialiased bicubic, JPEG quality 95, 4:4:4. `Accepted.policy` says which: "kept", or
"reencoded:" and the reasons. A JPEG in which the strict reader finds damage is refused, never re-encoded from what a
lenient reader makes of it; a few named faults outside its coded data are harmless (`jpeg_damage.py`), and it is stored
"reencoded:repaired". Values whose meaning Pillow does not apply (white is zero, 12 bits in 16) are given it or refused
(`sample_meaning.py`). Tars of other authors are indexed in place and not rewritten, so there an image is accepted
unchanged or refused (`accept_unchanged`).
Units: pixels. Pure: the same bytes give the same result.
Errors: a bad image is a Refused with its reason, not an exception; MemoryError propagates."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from pipeline.data.images.jpeg_damage import check_codes, check_strips, decoded_luma, harmless_fault
from pipeline.data.images.optional_formats import MissingDecoder, formats_of, optional_format
from pipeline.data.images.sample_meaning import Unsupported, grey_scale
from pipeline.errors import ConfigError

INTAKE_VERSION = 3
"""Part of every plan's digest. Raise it by hand when stored bytes, refusals or hashes change."""
REENCODED = "reencoded:"
REPAIRED = "repaired"
_QUALITY = 95
_ORIENTATION = 0x0112
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BAD_BYTES = (
    OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on damaged or hostile bytes."""

# `image_max_pixels` is checked before any decoding. Pillow's own guard would warn below that bound, and its refusal names no
# limit that a user can set.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, kw_only=True)
class IntakePolicy:
    """Limits on the images that a dataset stores. The configuration and the shard stage take fields and defaults from here."""

    image_max_short_side: int = 512
    """Pixels. A larger image is resized to this short side once, when it is stored."""
    image_max_pixels: int = 100_000_000
    """An image with more pixels is quarantined without being decoded."""

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the policy in a configuration that has these fields among others."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        for field in fields(IntakePolicy):
            if (value := getattr(self, field.name)) < 1:
                raise ConfigError(
                    f"{field.name}={value} is not positive: write a number of pixels, such as {field.default}"
                )


@dataclass(frozen=True)
class Accepted:
    """An image as it will be stored."""

    data: bytes
    width: int
    height: int
    original_width: int
    """Width of the upright original, before any resize."""
    original_height: int
    dhash64: int
    policy: str


@dataclass(frozen=True)
class Refused:
    """An image that goes to quarantine."""

    reason: str
    """empty, unreadable, truncated, too_many_pixels, unsupported, no_decoder or needs_reencoding; readers of sources add
    missing, denied, not_a_file, too_many_bytes, no_image, several_images and bad_label."""
    detail: str


def accept_image(data: bytes, policy: IntakePolicy) -> Accepted | Refused:
    """Decode an image completely and return it as it will be stored, re-encoded if it must be, or the refusal."""
    return _opened(data, policy, partial(_accept, data, max_side=policy.image_max_short_side))


def accept_unchanged(data: bytes, policy: IntakePolicy) -> Accepted | Refused:
    """Accept an image of a tar indexed in place, or refuse it: upright, RGB, not animated, and JPEG, PNG or WebP.

    Its bytes stay where they are, so `image_max_short_side` does not apply. Damage is judged as by `accept_image`.
    """
    if kind := optional_format(data):  # refused in any case, so no decoder is needed
        return _would_reencode([kind])
    return _opened(data, policy, partial(_unchanged, data))


def _opened(
    data: bytes, policy: IntakePolicy, accept: Callable[[Image.Image], Accepted | Refused]
) -> Accepted | Refused:
    if not data:
        return Refused("empty", "0 bytes")
    try:
        # a closed list: Pillow would try all its plugins, and the one for EPS runs Ghostscript
        with Image.open(io.BytesIO(data), formats=formats_of(data)) as image:
            return _too_large(image, policy) or accept(image)
    except MissingDecoder as error:
        return Refused("no_decoder", str(error))
    except Unsupported as error:
        return Refused("unsupported", str(error))
    except _BAD_BYTES as error:
        return _bad(error)


def dhash64(image: Image.Image) -> int:
    """Return the perceptual difference hash: whether each pixel of a 9 x 8 grey thumbnail is darker than its right neighbour.

    The bits are stored in manifests, so they must never change without INTAKE_VERSION: see docs/decisions/015.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=2.0))
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


def _accept(data: bytes, image: Image.Image, *, max_side: int) -> Accepted | Refused:
    # MPO: a JPEG with more pictures behind it, as phones write them; the first one counts
    if image.format not in {"JPEG", "MPO"}:
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            check_strips(data, image)
        return _reencode(image, max_side)
    keep = image.mode == "RGB" and not _turned(image) and min(image.size) <= max_side
    try:
        if keep:
            # the hash needs the pixels anyway, so this is the strict decoding as well
            return Accepted(data, *image.size, *image.size, dhash64(decoded_luma(data)), "kept")
        # before re-encoding: Pillow would decode the damage without a word
        check_codes(data)
    except ValueError as error:
        harmless_fault(data, error)
        return _reencode(image, max_side, repaired=True)
    return _reencode(image, max_side)


def _unchanged(data: bytes, image: Image.Image) -> Accepted | Refused:
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    fault = ""
    if kind == "JPEG":
        try:
            check_codes(data)
        except ValueError as error:
            fault = harmless_fault(data, error)
    wrong = [
        *([fault] if fault else []),
        *(["turned by EXIF"] if _turned(image) else []),
        *([f"{image.mode}, not RGB"] if image.mode != "RGB" or image.has_transparency_data else []),
        *([kind] if kind not in {"JPEG", "PNG", "WEBP"} else []),
        # Pillow calls an MPO animated; only its first picture is ever read
        *(["animated"] if kind != "JPEG" and getattr(image, "is_animated", False) else []),
    ]
    if wrong:
        return _would_reencode(wrong)
    if kind == "JPEG":
        pixels = decoded_luma(data)
    else:
        image.load()
        pixels = image
    return Accepted(data, *pixels.size, *pixels.size, dhash64(pixels), "indexed")


def _would_reencode(wrong: Sequence[str]) -> Refused:
    what = f"it is {', '.join(wrong)} and would have to be re-encoded, which an indexed tar does not allow. "
    return Refused("needs_reencoding", f"{what}Unpack the tars and point data.source at the folder")


def _too_large(image: Image.Image, policy: IntakePolicy) -> Refused | None:
    width, height = image.size
    if width * height <= policy.image_max_pixels:
        return None
    detail = (
        f"{width} x {height} = {width * height} pixels, more than the {policy.image_max_pixels} of image_max_pixels"
    )
    return Refused("too_many_pixels", detail)


def _bad(error: BaseException) -> Refused:
    text = str(error)
    cut = any(word in text.lower() for word in ("truncated", "premature", "not enough", "broken png"))
    # without the cut, "cannot identify image file <_io.BytesIO object at 0x7f...>" would differ in every run
    return Refused(
        "truncated" if cut else "unreadable", f"{type(error).__name__}: {text.split(' <_io', maxsplit=1)[0]}"
    )


def _reencode(image: Image.Image, max_side: int, *, repaired: bool = False) -> Accepted:
    reasons = []  # in a fixed order: `policy` is part of the dataset's digest
    jpeg = image.format in {"JPEG", "MPO"}
    if not jpeg:
        reasons.append(str(image.format).lower())
    turned = _turned(image)  # before load(), in which Pillow turns a TIFF and drops its EXIF tag
    if turned:
        reasons.append("exif")
    if not jpeg and getattr(image, "is_animated", False):
        reasons.append("animated")
    scale = grey_scale(image)
    image.load()
    upright = ImageOps.exif_transpose(image) if turned else image
    if upright.mode in _DEEP_GREY:
        # of PNG: the one grey value that is transparent, in 16 bits like the pixels, so it is used before these are scaled
        transparent = upright.info.get("transparency")
        upright = Image.fromarray(scale.eight_bit(np.asarray(upright), transparent=transparent))
        reasons.append("16bit")
        if transparent is not None:
            reasons.append("alpha")
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
    if repaired:
        reasons.append(REPAIRED)
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return Accepted(buffer.getvalue(), *stored.size, *rgb.size, dhash64(stored), f"{REENCODED}{','.join(reasons)}")


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except _BAD_BYTES:
        return False  # a damaged EXIF block gives no orientation, and the pixels are intact


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    short = min(image.size)
    if short <= max_side:
        return image
    width, height = ((side * max_side + short // 2) // short for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
