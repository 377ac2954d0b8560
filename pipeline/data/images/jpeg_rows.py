"""The top of a JPEG, without decoding the rest: its header is told that the picture is less high, and the decoder stops there.

Only for bytes that were decoded whole and without a warning before (intake does that, a checksum holds them to it): a decoder
that is stopped early finds data left over, so its warnings, which tell of damage too, must be let pass.
Shapes: [rows or more, W, 3] uint8 RGB. Units: rows of pixels, bytes.
Source: ITU-T T.81, B.2 (markers, frame header, scan header)."""

import numpy as np
import numpy.typing as npt
import simplejpeg

_MARGIN_ROWS = 16
"""One row of blocks more, at two rows of luma to one of chroma: the last wanted row is interpolated with the chroma below it."""
_ONE_SCAN = (0xC0, 0xC1)
"""Baseline and extended sequential frames, Huffman coded."""
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""DHT, JPG and DAC lie among the numbers of the frames."""


def decode_top(data: bytes, *, rows: int) -> npt.NDArray[np.uint8]:
    """At least the uppermost `rows`, equal to the whole picture's. Errors: ValueError, by simplejpeg."""
    at = _frame_offset(data)
    height = data[at + 5] << 8 | data[at + 6] if at else 0
    kept = rows + _MARGIN_ROWS
    if kept >= height:
        whole: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        return whole
    less_high = bytearray(data)
    less_high[at + 5], less_high[at + 6] = kept >> 8, kept & 0xFF
    top: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(less_high, "RGB", strict=False)
    return top


def _frame_offset(data: bytes) -> int:
    """Where the frame header begins, if all components come row by row in one scan; 0: they do not."""
    frame, at, end = 0, 2, len(data) - 20
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _ONE_SCAN:
            frame = at
        elif marker == 0xDA:
            return frame if frame and data[at + 4] == data[frame + 9] and _rows_of_chroma(data, frame) <= 2 else 0
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return 0
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _rows_of_chroma(data: bytes, frame: int) -> int:
    """Most rows of luma that share one of chroma."""
    return max(data[frame + 11 + 3 * component] & 15 for component in range(data[frame + 9]))
