"""Boxes are checked by arithmetic, pixels against Pillow."""

import io
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_core.randomness import uniform_rows, uniforms
from pipeline.data.images.pictures import (
    AUGMENT_UNIFORMS,
    AugmentConfig,
    Box,
    augment,
    center_box,
    clipped_crop,
    decode,
    picture,
    random_crop,
    random_resized_crop,
    reference_picture,
    shift_crop,
)
from pipeline.errors import ConfigError, DataError

sides = st.integers(1, 700)


def scene(seed, height, width):
    """A picture like a photograph: smooth fields, some edges, a little grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    layers = [
        sum(
            rng.normal(0, 20) * np.sin(rng.uniform(1, 25) * (x * a + y * b) + rng.uniform(0, 6))
            for a, b in rng.normal(0, 1, (6, 2))
        )
        for _ in range(3)
    ]
    picture = np.stack(layers, -1) + rng.uniform(90, 160)
    for _ in range(6):
        top, left = rng.integers(0, height), rng.integers(0, width)
        picture[top : top + height // 4, left : left + width // 5] = picture[
            top : top + height // 4, left : left + width // 5
        ] * 0.5 + rng.uniform(0, 127, 3)
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def keyed(id_):
    return uniforms(0, 0, id_, "augment", AUGMENT_UNIFORMS)


@given(st.integers(0, 10**6), sides, sides)
def test_a_clipped_crop_is_the_first_try_with_its_sides_cut(id_, height, width):
    """Where the first try of the other crop fits, both are the same box."""
    numbers, scale, ratio = keyed(id_), (0.08, 1.0), (3 / 4, 4 / 3)
    area = height * width * np.interp(numbers[0], (0, 1), scale)
    aspect = np.exp(np.interp(numbers[1], (0, 1), np.log(ratio)))
    asked = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    box = clipped_crop(numbers, height, width, scale=scale, ratio=ratio)
    assert (box.width, box.height) == (max(1, min(asked[0], width)), max(1, min(asked[1], height)))
    if 0 < asked[0] <= width and 0 < asked[1] <= height:
        assert box == random_resized_crop(numbers, height, width, scale=scale, ratio=ratio)


@given(st.integers(0, 10**6), sides, sides)
def test_crops_stay_inside(id_, height, width):
    for box in (
        random_resized_crop(keyed(id_), height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
        clipped_crop(keyed(id_), height, width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        center_box(height, width, target=(224, 160), crop_ratio=0.875),
        random_crop(keyed(id_), height, width, target=(224, 160), crop_ratio=0.875),
    ):
        assert box.top >= 0
        assert box.left >= 0
        assert box.height >= 1
        assert box.width >= 1
        assert box.top + box.height <= height
        assert box.left + box.width <= width


def test_areas_and_aspects_fill_their_ranges():
    rows = uniform_rows(1, np.zeros(4000, np.int64), np.arange(4000), "augment", AUGMENT_UNIFORMS)
    boxes = np.array([random_resized_crop(row, 400, 400, scale=(0.2, 0.5), ratio=(3 / 4, 4 / 3)) for row in rows])
    shares, aspects = boxes[:, 2] * boxes[:, 3] / 400**2, boxes[:, 3] / boxes[:, 2]
    # sides are rounded to a pixel in about 200: 0.5 % of area or aspect
    assert 0.199 < shares.min() < 0.205
    assert 0.495 < shares.max() < 0.503
    assert abs(shares.mean() - 0.35) < 0.007  # standard error 0.0014
    assert 0.745 < aspects.min() < 0.76
    assert 1.31 < aspects.max() < 1.34
    assert abs(np.log(aspects).mean()) < 0.013  # symmetric in log; standard error 0.0026
    # places are uniform over what the box leaves free
    for start, size in ((0, 2), (1, 3)):
        places = boxes[:, start] / (400 - boxes[:, size])
        assert places.min() < 0.01
        assert places.max() > 0.99
        assert abs(places.mean() - 0.5) < 0.025


@pytest.mark.parametrize(("height", "width", "box"), [(10, 400, Box(0, 193, 10, 13)), (400, 10, Box(193, 0, 13, 10))])
def test_a_strip_no_try_fits_is_cropped_in_the_middle(height, width, box):
    assert random_resized_crop(keyed(0), height, width, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)) == box


def test_center_box_is_resize_256_crop_224():
    assert center_box(256, 256, target=(224, 224), crop_ratio=0.875) == Box(16, 16, 224, 224)
    assert center_box(512, 640, target=(224, 224), crop_ratio=0.875) == Box(32, 96, 448, 448)
    assert center_box(300, 500, target=(100, 200), crop_ratio=1.0) == Box(25, 0, 250, 500)


def test_a_random_crop_is_the_centre_crop_moved_anywhere():
    rows = uniform_rows(1, np.zeros(2000, np.int64), np.arange(2000), "augment", AUGMENT_UNIFORMS)
    boxes = [random_crop(row, 256, 320, target=(224, 224), crop_ratio=0.875) for row in rows]
    assert {(box.height, box.width) for box in boxes} == {(224, 224)}
    assert {box.top for box in boxes} == set(range(33))
    assert {box.left for box in boxes} == set(range(97))


def differences(pictures, config, size=(224, 224)):
    """Return the worst and mean difference in grey levels between the hot path and Pillow alone, over encoded pictures."""
    worst, means = 0, []
    for id_, data in enumerate(pictures):
        found = picture(data, keyed(id_), config, size)
        expected = reference_picture(data, keyed(id_), config, size)
        difference = np.abs(found.astype(int) - expected)
        worst, means = max(worst, int(difference.max())), [*means, difference.mean()]
    return worst, float(np.mean(means))


@pytest.mark.parametrize("kind", ["random_resized_crop", "random_crop", "center"])
def test_the_hot_path_is_close_to_pillow(kind):
    """Measured on these: worst 2 levels, mean 0.05 (0.004 in most, 0.2 at a few crop widths, where rounding differs).
    Without antialiasing: 30 and 0.8 on these; torch's float kernel: mean 0.18."""
    pictures = [encoded(scene(seed, *((375, 500), (500, 333))[seed % 2]), quality=90) for seed in range(8)]
    worst, mean = differences(pictures, AugmentConfig(kind=kind))
    assert worst <= 5
    assert mean < 0.1


@pytest.mark.skipif("MAE_TEST_IMAGES" not in os.environ, reason="MAE_TEST_IMAGES names no folder of real photographs")
def test_the_hot_path_is_close_to_pillow_on_real_photographs():
    """On 295 JPEGs of ImageNet: worst 14, mean 0.031."""
    paths = sorted(
        path for path in Path(os.environ["MAE_TEST_IMAGES"]).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
    )
    assert paths
    pictures = []
    for path in paths[:500]:
        with suppress(DataError):  # grey and CMYK ones, which are made RGB when they are sharded
            decode(data := path.read_bytes())
            pictures.append(data)
    worst, mean = differences(pictures, AugmentConfig())
    assert worst <= 20
    assert mean < 0.1


def test_shift_moves_by_at_most_n_and_mirrors_the_border():
    pixels = scene(0, 16, 16)
    padded = np.pad(pixels, ((3, 3), (3, 3), (0, 0)), mode="reflect")
    windows = {padded[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(7) for x in range(7)}
    seen = {windows[shift_crop(keyed(id_), pixels, pixels=3).tobytes()] for id_ in range(600)}
    assert len(seen) == 49  # each of 49 places is missed with probability 4e-6
    np.testing.assert_array_equal(shift_crop(keyed(0), pixels, pixels=0), pixels)


def test_center_at_its_own_size_is_the_identity():
    pixels = scene(1, 16, 16)
    config = AugmentConfig(kind="center", flip=False)
    np.testing.assert_array_equal(augment(pixels, keyed(3), config, (16, 16)), pixels)


@pytest.mark.parametrize("kind", ["random_resized_crop", "shift", "center"])
def test_equal_keys_give_equal_pictures_and_half_are_mirrored(kind):
    pixels = scene(2, 40, 50)
    config = AugmentConfig(kind=kind)
    plain = AugmentConfig(kind=kind, flip=False)
    mirrored = 0
    for id_ in range(200):
        out = augment(pixels, keyed(id_), config, (32, 32))
        assert out.shape == (32, 32, 3)
        np.testing.assert_array_equal(out, augment(pixels, keyed(id_), config, (32, 32)))
        straight = augment(pixels, keyed(id_), plain, (32, 32))
        mirrored += np.array_equal(out, straight[:, ::-1])
        assert np.array_equal(out, straight) or np.array_equal(out, straight[:, ::-1])
    assert 65 <= mirrored <= 135  # five standard deviations of 7


@pytest.mark.parametrize("kind", ["random_resized_crop", "shift", "center"])
def test_a_picture_is_its_file_decoded_and_augmented(kind):
    pixels, config = scene(5, 90, 120), AugmentConfig(kind=kind)
    files = [encoded(pixels), encoded(pixels, quality=95, subsampling=0, progressive=True), encoded(pixels, "PNG")]
    for id_ in range(60):
        data = files[id_ % 3]
        np.testing.assert_array_equal(
            picture(data, keyed(id_), config, (48, 40)), augment(decode(data), keyed(id_), config, (48, 40))
        )


def test_decode_is_exact_and_takes_other_formats():
    pixels = scene(3, 33, 47)
    for options in ({"quality": 95}, {"quality": 80, "subsampling": 0, "progressive": True}, {"keep_rgb": True}):
        data = encoded(pixels, **options)
        np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(encoded(pixels, "PNG")), pixels)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not decode"),
        (b"not a picture", "does not decode"),
        (encoded(scene(4, 40, 40))[:-300], "does not decode"),
        (encoded(scene(4, 40, 40), "PNG")[:-300], "does not decode"),
        (encoded(scene(4, 40, 40)[..., 0]), "JPEG of Gray"),
        (encoded(scene(4, 40, 40)[..., 0], "PNG"), "mode is L"),
        (encoded(np.zeros((4, 4, 4), np.uint8), "PNG"), "mode is RGBA"),
    ],
)
def test_what_is_not_an_rgb_picture_is_refused(data, words):
    with pytest.raises(DataError, match=words):
        decode(data)
    whole = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    with pytest.raises(DataError, match=words):
        picture(data, keyed(0), whole, (16, 16))


@pytest.mark.parametrize(
    "field",
    [{"scale": (0.0, 1.0)}, {"scale": (0.5, 0.2)}, {"ratio": (0.0, 1.0)}, {"shift_pixels": -1}, {"crop_ratio": 1.5}],
)
def test_wrong_settings_are_refused(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        AugmentConfig(**field)
