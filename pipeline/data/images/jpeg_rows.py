"""Decode only the top rows of a JPEG: its header is changed to claim a lower height, and the decoder stops there.

Only for bytes that were decoded completely and without a warning before (intake does that, and a checksum holds the bytes to
it): a decoder that is stopped early reports leftover data, so `strict` must be off, and then real damage goes unreported too.
Shapes: [rows or more, W, 3] uint8 RGB. Units: rows of pixels, bytes.
Source: ITU-T T.81, B.2 (markers, frame header, scan header)."""

import numpy as np
import numpy.typing as npt
import simplejpeg

_MARGIN_ROWS = 16
"""One more row of blocks, at two rows of luma per row of chroma: chroma of the last wanted row is interpolated with the row
below it."""
_ONE_SCAN = (0xC0, 0xC1)
"""Baseline and extended sequential frames, Huffman coded."""
_NO_FRAME = (0xC4, 0xC8, 0xCC)
"""DHT, JPG and DAC: their numbers are in the range of the frame markers."""


def decode_top(data: bytes, *, rows: int) -> npt.NDArray[np.uint8]:
    """Return at least the top `rows` rows, equal to those of the whole picture. Raises ValueError through simplejpeg."""
    at = _frame_offset(data)
    # frame header: marker (2 bytes), length (2), precision (1), height (2), width (2), components (1), 3 bytes for each
    height = data[at + 5] << 8 | data[at + 6] if at else 0
    kept = rows + _MARGIN_ROWS
    if kept >= height:  # also without a frame header, when height is 0
        whole: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        return whole
    cropped = bytearray(data)
    cropped[at + 5], cropped[at + 6] = kept >> 8, kept & 0xFF
    top: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(cropped, "RGB", strict=False)
    return top


def _frame_offset(data: bytes) -> int:
    """Return the offset of the frame header if one scan holds all components row by row, else 0.

    A progressive JPEG, or one with a scan per component, cannot be stopped early: every row needs the whole file.
    """
    frame, at, end = 0, 2, len(data) - 20
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _ONE_SCAN:
            frame = at
        elif marker == 0xDA:
            # byte 4 of the scan header and byte 9 of the frame's: the number of components in each
            return frame if frame and data[at + 4] == data[frame + 9] and _rows_of_chroma(data, frame) <= 2 else 0
        elif 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return 0
        # 0xFF before a marker is fill
        at += 1 if marker == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def _rows_of_chroma(data: bytes, frame: int) -> int:
    """Return the largest number of luma rows that share a row of chroma."""
    return max(data[frame + 11 + 3 * component] & 15 for component in range(data[frame + 9]))
