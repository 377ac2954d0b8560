"""The decoded rows are those of the whole picture, for every JPEG layout that occurs."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.images.jpeg_rows import decode_top


def grain(height, width, channels=3):
    """Noise: every coefficient is used, and a wrong neighbour shows."""
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8).squeeze()


def encoded(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_thumbnail(data):
    """Return an EXIF block that holds another picture, including its frame header."""
    inside = b"Exif\0\0" + encoded(grain(16, 16))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(inside) + 2) + inside + data[2:]


def one_scan_a_component(planes):
    """Return a baseline JPEG whose three components have a scan each, assembled from three grey JPEGs."""
    height, width = planes[0].shape
    grey = [encoded(plane, quality=90) for plane in planes]
    frame, scan = grey[0].index(b"\xff\xc0"), grey[0].index(b"\xff\xda")
    after_frame = frame + 2 + struct.unpack(">H", grey[0][frame + 2 : frame + 4])[0]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = grey[0][:frame] + b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + components
    scans = b"".join(
        b"\xff\xda"
        + struct.pack(">HBBB", 8, 1, number, 0)
        + bytes([0, 63, 0])
        + data[data.index(b"\xff\xda") + 10 : -2]
        for number, data in zip((1, 2, 3), grey, strict=True)
    )
    return head + grey[0][after_frame:scan] + scans + b"\xff\xd9"


SEQUENTIAL = {
    "4:2:0": encoded(grain(200, 150), quality=90),
    "4:2:2": encoded(grain(200, 150), quality=90, subsampling=1),
    "4:4:4": encoded(grain(200, 150), quality=90, subsampling=0),
    "odd sides": encoded(grain(201, 149)),
    "RGB": encoded(grain(200, 150), keep_rgb=True),
    "own tables": encoded(grain(200, 150), optimize=True),
    "restarts": encoded(grain(200, 150), restart_marker_blocks=3),
    "a thumbnail": with_thumbnail(encoded(grain(200, 150))),
    "a comment": encoded(grain(200, 150), comment=b"\xff\xc0 no frame"),
    "fill bytes": (plain := encoded(grain(200, 150)))[:2] + b"\xff\xff" + plain[2:],
}
WHOLE = {
    "progressive": encoded(grain(200, 150), progressive=True),
    "one scan a component": one_scan_a_component([grain(200, 152, 1) for _ in range(3)]),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_top_is_the_whole_pictures_and_not_much_more(name):
    whole = simplejpeg.decode_jpeg(SEQUENTIAL[name], "RGB")
    for rows in (1, 7, 8, 15, 16, 17, 31, 32, 100, 143):
        top = decode_top(SEQUENTIAL[name], rows=rows)
        np.testing.assert_array_equal(top[:rows], whole[:rows])
        assert rows <= len(top) <= rows + 16
    for rows in (190, len(whole)):
        np.testing.assert_array_equal(decode_top(SEQUENTIAL[name], rows=rows), whole)


@pytest.mark.parametrize("name", WHOLE)
def test_what_does_not_come_row_by_row_is_decoded_whole(name):
    np.testing.assert_array_equal(decode_top(WHOLE[name], rows=20), simplejpeg.decode_jpeg(WHOLE[name], "RGB"))


def test_without_the_margin_the_last_row_would_differ():
    """The margin is there because 4:2:0 interpolates with the chroma of the next block."""
    data = SEQUENTIAL["4:2:0"]
    at = data.index(b"\xff\xc0")
    cut = bytearray(data)
    cut[at + 5 : at + 7] = (32).to_bytes(2, "big")
    differ = simplejpeg.decode_jpeg(cut, "RGB", strict=False) != simplejpeg.decode_jpeg(data, "RGB")[:32]
    assert np.flatnonzero(differ.any(axis=(1, 2))).tolist() == [31]


def test_a_damaged_head_is_refused():
    with pytest.raises(ValueError, match="JPEG"):
        decode_top(SEQUENTIAL["4:2:0"][:150], rows=20)
