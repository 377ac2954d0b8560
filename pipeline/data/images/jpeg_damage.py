"""Whether a JPEG is intact, damaged, or has a fault that costs no pixel.

libjpeg decodes damaged data without an error: it makes up the missing blocks and only warns, which Pillow does not pass on.
simplejpeg stops at the first warning, so it is the judge here, for images that are re-encoded as well as for those that keep
their bytes. Bytes after the end marker give no warning.
Harmless are stray bytes between the segments of the header, and filler between the last block and the end marker. Other bytes
left over there are the usual sign of a flipped bit: the decoder took it for shorter blocks and ran out of blocks before it ran
out of data. The two can be told apart only roughly, see `_FEW`.
Errors: ValueError for damage, with the decoder's words."""

import re

import simplejpeg
from PIL import Image, TiffImagePlugin

_FEW = 8
"""Bytes left over before the end marker that are harmless whatever they are: less than the codes of most blocks."""
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes? before marker (0x\w+)")
_START_OF_SCAN, _END = 0xDA, 0xD9
_COMPRESSION, _JPEG_STRIPS, _TABLES = 259, 7, 347
_OFFSETS, _LENGTHS = (273, 324), (279, 325)
"""Tags of strips and of tiles."""
_RESTARTS = range(0xD0, 0xD8)


def decoded_luma(data: bytes) -> Image.Image:
    """Decode a three-component JPEG strictly; for YCbCr only the luma, which is less work.

    The decoder still reads the codes of all components, so damage to chroma is found too.
    """
    if simplejpeg.decode_jpeg_header(data)[2] == "YCbCr":
        return Image.fromarray(simplejpeg.decode_jpeg(data, "GRAY", strict=True)[..., 0])
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))


def check_codes(data: bytes) -> None:
    """Read all codes of a JPEG strictly without computing more than an eighth of its pixels per side."""
    space = simplejpeg.decode_jpeg_header(data)[2]
    target = {"YCbCr": "GRAY", "Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB")
    simplejpeg.decode_jpeg(data, target, strict=True, min_factor=8)


def check_strips(data: bytes, image: TiffImagePlugin.TiffImageFile) -> None:
    """Read all codes of a TIFF's strips or tiles strictly if they are JPEGs; libtiff passes over damage as Pillow does."""
    tags = image.tag_v2
    if tags.get(_COMPRESSION) != _JPEG_STRIPS:
        return
    tables: bytes = tags.get(_TABLES, b"")
    offsets, lengths = (tags.get(strips) or tags.get(tiles, ()) for strips, tiles in (_OFFSETS, _LENGTHS))
    for offset, length in zip(offsets, lengths, strict=True):
        strip = data[offset : offset + length]
        # the strips share the tables, which are a JPEG without an image: end marker and start marker in between go
        check_codes(tables[:-2] + strip[2:] if tables else strip)


def harmless_fault(data: bytes, error: ValueError) -> str:
    """Return what is wrong with a JPEG that strict decoding refused with `error`. Raise that error if it is damage."""
    if not _EXTRANEOUS.search(str(error)):
        raise error
    cleaned = _without_strays(data)
    try:
        check_codes(cleaned)
    except ValueError as still:
        left_over = _EXTRANEOUS.search(str(still))
        if left_over is None:
            raise
        if left_over[2] != "0xd9" or not _ends_in_filler(cleaned, int(left_over[1])):
            raise ValueError(f"{still}, left over when its last block was decoded: earlier ones are damaged") from error
    return "a JPEG with extraneous bytes"


def _ends_in_filler(data: bytes, left_over: int) -> bool:
    """Return whether the bytes left over before the end marker are no codes: a few, or a run of one value.

    The decoder has read ahead, so `left_over` is a little too small. Without the filler there must be no warning: this proves
    that the whole run was filler rather than the end of a hole, and finds other damage, as only the first warning is reported.
    """
    codes = data[:-2]
    run = len(codes) - len(codes.rstrip(codes[-1:]))
    return any(
        _is_intact(codes[:-count] + data[-2:]) for count in {run, *(range(1, _FEW + 1) if left_over <= _FEW else ())}
    )


def _is_intact(data: bytes) -> bool:
    try:
        check_codes(data)
    except ValueError:
        return False
    return True


def _without_strays(data: bytes) -> bytes:
    """Return the JPEG up to its end marker, without what lies between the segments before its first scan."""
    kept, at = [data[:2]], 2
    while True:
        at = _next_marker(data, at)
        marker = data[at + 1]
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            break
        if marker == _END or end >= len(data):
            raise ValueError("Corrupt JPEG data: no scan")
        kept.append(data[at:end])
        at = end
    # up to the end marker: a progressive JPEG has several scans, with tables in between
    while data[(end := _next_marker(data, end)) + 1] != _END:
        end += 2
    return b"".join([*kept, data[at : end + 2]])


def _next_marker(data: bytes, at: int) -> int:
    """Return where the next marker starts, passing over stuffed bytes, fill bytes and restart markers."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        # 0xFF00 is a data byte 0xFF, 0xFFFF is fill, and restart markers have no length to skip by
        if data[at + 1] not in {0x00, 0xFF, *_RESTARTS}:
            return at
        at += 1
    raise ValueError("Corrupt JPEG data: it ends without an end marker")
