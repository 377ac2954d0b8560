"""Pictures decode, have the expected size, and show what was given in its place."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.reporting import reconstructions
from pipeline.reporting.figures import BLUE, GREY, PURPLE, Curves, curve_png, scores_png
from pipeline.reporting.reconstructions import half_blocks, reconstruction_grid_png, terminal_reconstruction
from pipeline.reporting.summaries import Score


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGBA"))


def pixels_of(picture: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns of opaque pixels of exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((picture[..., :3] == wanted).all(-1) & (picture[..., 3] == 255))


def curves(points: int) -> Curves:
    steps = np.arange(1, points + 1)
    return Curves(
        steps=steps.tolist(),
        images_seen=(steps * 256.0).tolist(),
        loss=(1 / steps).tolist(),
        learning_rate=(steps * 1e-5).tolist(),
        images_per_s=np.full(points, 12_400.0).tolist(),
    )


def score(encoder: str, *values: float, protocol: str = "linear", dataset: str = "digits") -> Score:
    return Score(protocol=protocol, dataset=dataset, encoder=encoder, values=values)


@pytest.mark.parametrize("points", [0, 1, 2, 400])
def test_curves_decode_at_any_length_on_a_transparent_ground(points):
    picture = decode(curve_png(curves(points)))
    assert picture.shape == (1312, 1600, 4)
    assert picture[0, -1, 3] == 0


def test_scores_along_the_way_get_a_panel_of_their_own():
    plain = curves(30)
    scored = replace(plain, milestones={"knn": [(10, 0.2), (20, 0.4)], "ridge": [(10, 0.3), (20, 0.5)]})
    below = decode(curve_png(scored))
    assert below.shape[0] > 1.2 * decode(curve_png(plain)).shape[0]
    assert len(pixels_of(below[-400:], BLUE)) > 100
    with_probe = replace(plain, milestones={**scored.milestones, "probe": [(10, 0.5), (20, 0.7)]})
    assert len(pixels_of(below[-400:], PURPLE)) == 0
    assert len(pixels_of(decode(curve_png(with_probe))[-400:], PURPLE)) > 100


def test_a_falling_loss_falls_in_the_picture():
    line = pixels_of(decode(curve_png(curves(30))), BLUE)
    first, last = line[line[:, 1].argmin()], line[line[:, 1].argmax()]
    assert first[0] < last[0]  # rows count downwards


def test_bars_are_as_high_as_their_scores():
    picture = decode(scores_png([score("pretrained", 0.9), score("random", 0.45)]))
    # the fullest column of a colour runs through its bar; the legend's small square is elsewhere
    tall, short = (np.bincount(pixels_of(picture, colour)[:, 1]).max() for colour in (BLUE, GREY))
    # one row of pixels at each edge of a bar may be blended
    assert tall / short == pytest.approx(2, rel=0.02)


def test_each_dataset_has_its_panel_and_a_missing_encoder_leaves_a_gap():
    one = decode(scores_png([score("pretrained", 0.9, 0.91), score("random", 0.5)]))
    two = decode(
        scores_png([score("pretrained", 0.9), score("random", 0.5), score("pretrained", 0.8, dataset="flowers")])
    )
    assert two.shape[0] > 1.5 * one.shape[0]
    assert two.shape[1] == one.shape[1]
    assert decode(scores_png([])).size


# --- reconstructions


def planted(size: int) -> tuple[np.ndarray, tuple[int, int]]:
    rows = np.zeros((2, 4, size, size, 3), np.uint8)
    place = (size // 4, size // 2)
    rows[1, 2][place] = (255, 0, 0)
    return rows, place


@pytest.mark.parametrize("size", [16, 96, 224])
def test_a_planted_pixel_is_where_it_belongs_and_keeps_hard_edges(size):
    rows, (y, x) = planted(size)
    picture = decode(reconstruction_grid_png(rows))
    scale, gap, top = reconstructions.tile_scale(size), reconstructions.GAP, reconstructions.tile_top()
    tile = size * scale
    assert scale == {16: 12, 96: 2, 224: 1}[size]
    assert picture.shape[:2] == (top + 2 * tile + gap, 4 * tile + 3 * gap)
    red = pixels_of(picture, "#ff0000")
    first = (top + (tile + gap) + y * scale, 2 * (tile + gap) + x * scale)
    assert tuple(red.min(0)) == first
    assert tuple(red.max(0)) == (first[0] + scale - 1, first[1] + scale - 1)
    assert len(red) == scale**2


def test_borrowed_patch_statistics_are_said_below_the_grid():
    rows, _ = planted(16)
    plain, labelled = (decode(reconstruction_grid_png(rows, statistics=s)) for s in ("predicted", "true"))
    assert labelled.shape[0] > plain.shape[0]
    assert labelled[plain.shape[0] :, :, 3].any()
    np.testing.assert_array_equal(labelled[: plain.shape[0]], plain)


def test_wrong_rows_are_refused_with_their_shape():
    with pytest.raises(PipelineError, match=r"\(2, 3, 8, 8, 3\)"):
        reconstruction_grid_png(np.zeros((2, 3, 8, 8, 3), np.uint8))


def test_a_half_block_shows_two_pixels_one_above_the_other():
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 1], image[1, 1] = (255, 0, 0), (0, 0, 255)
    text = half_blocks(image, columns=4)
    assert text.plain == "▀▀▀▀\n▀▀▀▀"
    assert str(text.spans[1].style) == "#ff0000 on #0000ff"


def test_the_terminal_shows_three_pictures_side_by_side():
    image = np.zeros((16, 16, 3), np.uint8)
    table = terminal_reconstruction(image, image, image, columns=16)
    assert len(table.columns) == 3
    assert table.row_count == 2
