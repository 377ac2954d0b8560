"""What the model sees and what it reconstructs: a labelled grid as PNG, and coloured half blocks for the terminal.

Shapes: rows [N, 4, H, W, 3] uint8; columns: original, visible patches, reconstruction before training,
after training. With normalised targets the model predicts each hidden patch up to its mean and spread.
A picture that takes those from the original says so below the grid."""

from io import BytesIO
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text

from pipeline.errors import PipelineError

Images = NDArray[np.uint8]

TITLES = ("original", "visible patches", "before training", "after training")
STATISTICS_NOTE = (
    "Hidden patches are drawn with the true mean and contrast of each patch: the model predicts normalised pixels only."
)
INK = (116, 123, 133, 255)
SMALLEST_TILE = 200
GAP = 12


def reconstruction_grid_png(
    rows: Images,
    *,
    titles: tuple[str, ...] = TITLES,
    statistics: Literal["predicted", "true"] = "predicted",
) -> bytes:
    """Return N rows below column titles as PNG bytes.

    Small images are enlarged by a whole factor with hard edges; large ones keep their size. The
    background is transparent and text is mid-grey: one picture for the light page and the dark one.
    Raises PipelineError for rows of another shape or type."""
    if rows.ndim != 5 or rows.shape[1] != len(titles) or rows.shape[4] != 3 or rows.dtype != np.uint8:
        raise PipelineError(
            f"reconstructions are {rows.dtype} {rows.shape}, and uint8 [N, {len(titles)}, H, W, 3] is needed"
        )
    count, columns, height, width, _ = rows.shape
    scale = tile_scale(height)
    tile_width, tile_height = width * scale, height * scale
    title_font, note_font = plain_font("DejaVuSans-Bold", 17), plain_font("DejaVuSans", 14)
    title_font = _fit(title_font, titles, tile_width)
    total_width = columns * tile_width + (columns - 1) * GAP
    notes = _wrap(STATISTICS_NOTE, note_font, total_width) if statistics == "true" else []
    top = tile_top()
    note_top = top + count * (tile_height + GAP)
    canvas = Image.new("RGBA", (total_width, note_top - GAP + (GAP + 20 * len(notes) if notes else 0)))
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        left = column * (tile_width + GAP)
        draw.text((left + tile_width / 2, top / 2), title, font=title_font, fill=INK, anchor="mm")
        for row in range(count):
            tile = Image.fromarray(rows[row, column].repeat(scale, axis=0).repeat(scale, axis=1))
            canvas.paste(tile, (left, top + row * (tile_height + GAP)))
    for line, text in enumerate(notes):
        draw.text((0, note_top + 20 * line), text, font=note_font, fill=INK)
    out = BytesIO()
    canvas.save(out, format="PNG", optimize=True)
    return out.getvalue()


def tile_scale(height: int) -> int:
    """Return the whole factor by which images of this height are enlarged."""
    return max(1, round(SMALLEST_TILE / height))


def tile_top() -> int:
    """Return the first row of pixels below the titles."""
    return 36


def plain_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """Return a font that comes with matplotlib: the same letters as in the figures, on every machine."""
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _fit(font: ImageFont.FreeTypeFont, titles: tuple[str, ...], width: int) -> ImageFont.FreeTypeFont:
    widest = max(font.getlength(title) for title in titles)
    return font if widest <= width else font.font_variant(size=font.size * width / widest)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def half_blocks(image: Images, *, columns: int) -> Text:
    """Return an image [H, W, 3] as coloured half blocks: each character shows two pixels, one above the other."""
    height, width = image.shape[:2]
    if columns > width:
        columns -= columns % width  # a whole factor, so that all pixels get the same width
    rows = max(2, 2 * round(columns * height / width / 2))  # even: a character shows two
    kind = Image.Resampling.NEAREST if columns >= width else Image.Resampling.BOX
    pixels = np.asarray(Image.fromarray(image).resize((columns, rows), kind))
    picture = Text(no_wrap=True, end="")
    for row in range(0, rows, 2):
        for above, below in zip(pixels[row], pixels[row + 1], strict=True):
            picture.append("▀", style=f"{_hex(above)} on {_hex(below)}")
        if row + 2 < rows:
            picture.append("\n")
    return picture


def terminal_reconstruction(original: Images, masked: Images, reconstruction: Images, *, columns: int = 24) -> Table:
    """Return original, visible patches and reconstruction side by side, for terminals with colours."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(justify="center", width=columns)
    grid.add_row(*(Text(title, style="dim") for title in ("original", "visible", "reconstruction")))
    grid.add_row(*(half_blocks(image, columns=columns) for image in (original, masked, reconstruction)))
    return grid


def _hex(pixel: NDArray[np.uint8]) -> str:
    return f"#{pixel[0]:02x}{pixel[1]:02x}{pixel[2]:02x}"
