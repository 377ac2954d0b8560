"""HEIC and AVIF, which Pillow reads only with a decoder that is not installed everywhere.

HEIC needs pillow-heif (the extra `heif`), AVIF a Pillow built with libavif, as its wheels are from 11.3. pillow-heif is imported
at the first HEIC image, because loading it takes time that most sources need not spend."""

from functools import cache

from PIL import features

_ALWAYS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_WAYS_OUT = {
    "HEIF": "pillow-heif is not installed here. Install it on all machines (pip install 'mae-pipeline[heif]'), or convert the "
    "images to JPEG",
    "AVIF": "this Pillow has no AVIF decoder. Install Pillow 11.3 or later from PyPI on all machines, or convert the images "
    "to JPEG",
}


class MissingDecoder(Exception):
    """An image of a format for which no decoder is installed."""


def formats_of(data: bytes) -> tuple[str, ...]:
    """Return Pillow's names of the formats that an image may have. Raises MissingDecoder."""
    kind = optional_format(data)
    if kind is None:
        return _ALWAYS
    if not _installed(kind):
        raise MissingDecoder(f"it is {kind}, and {_WAYS_OUT[kind]}")
    return (kind,)


def optional_format(data: bytes) -> str | None:
    """Return HEIF or AVIF, judging by the brands in the image's first box, or None for other formats."""
    if data[4:8] != b"ftyp":
        return None
    # 256: brands are few, and a damaged length must not make us scan the image
    box = data[: min(int.from_bytes(data[:4], "big"), 256)]
    # bytes 12 to 15 are the minor version, not a brand
    brands = {data[8:12], *(box[at : at + 4] for at in range(16, len(box), 4))}
    # AVIF first: its files name HEIF's general brand mif1 as well
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


@cache
def _installed(kind: str) -> bool:
    if kind == "AVIF":
        return bool(features.check("avif"))
    try:
        import pillow_heif
    except ImportError:
        return False
    # Pillow finds the plugin only once it is registered
    pillow_heif.register_heif_opener()
    return True
