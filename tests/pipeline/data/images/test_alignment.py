"""The pixel comparison: copies of a photograph are near 1 however they were treated, other photographs are far from it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipeline.data.dataset.near_duplicates import SAME
from pipeline.data.images.alignment import SIDE, coarse, same_pixels, similarity, thumbnail
from pipeline.data.images.photos import synthetic
from pipeline.errors import DataError

PHOTOS = [synthetic(number) for number in range(6)]


def opened(number=0):
    return Image.open(io.BytesIO(PHOTOS[number])).convert("RGB")


def saved(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut(image, left, top, right, bottom):
    return image.crop((left, top, image.width - right, image.height - bottom))


TREATMENTS = {
    "re-encoded": lambda image: saved(image, quality=30),
    "as a PNG": lambda image: saved(image, "PNG"),
    "at a fifth of the size": lambda image: saved(image.resize((100, 75))),
    "brighter": lambda image: saved(ImageEnhance.Brightness(image).enhance(1.3)),
    "half the contrast": lambda image: saved(ImageEnhance.Contrast(image).enhance(0.5)),
    "grey": lambda image: saved(image.convert("L").convert("RGB")),
    "cut by one pixel of a thumbnail": lambda image: saved(cut(image, 15, 12, 0, 0)),
    "cut by two": lambda image: saved(cut(image, 0, 24, 31, 0)),
    "stretched": lambda image: saved(cut(image, 30, 0, 30, 0)),
}


@pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS)
def test_a_treated_photograph_is_the_same_and_others_are_not(treatment):
    for number in range(3):
        own = thumbnail(treatment(opened(number)))
        assert similarity(own, thumbnail(PHOTOS[number])) >= SAME
        assert similarity(thumbnail(PHOTOS[number]), own) >= SAME
        assert max(similarity(own, thumbnail(data)) for data in PHOTOS if data is not PHOTOS[number]) < 0.7


def test_a_mirrored_photograph_is_not_found():
    assert similarity(thumbnail(saved(opened().transpose(Image.Transpose.FLIP_LEFT_RIGHT))), thumbnail(PHOTOS[0])) < 0.7


def test_an_image_is_itself_and_a_plain_one_is_like_nothing():
    photo = thumbnail(PHOTOS[0])
    grey = np.full((SIDE, SIDE), 90, np.uint8)
    noise = np.random.default_rng(0).normal(90, 0.4, (2, SIDE, SIDE)).round().astype(np.uint8)
    assert similarity(photo, photo) == pytest.approx(1, abs=0.01)
    assert max(similarity(grey, grey), similarity(grey, photo), similarity(photo, grey)) < 0.001
    assert similarity(noise[0], noise[1]) < 0.5


def test_coarse_vectors_tell_photographs_apart():
    vectors = coarse(np.stack([thumbnail(data) for data in (*PHOTOS, saved(opened(), quality=30))]))
    likeness = vectors @ vectors[-1]
    assert likeness[0] > 0.95
    assert likeness[1:6].max() < 0.55


def test_pixels_are_equal_across_formats_and_damage_is_named():
    png = saved(opened(), "PNG")
    assert same_pixels(png, saved(opened(), "PNG", compress_level=1))
    assert not same_pixels(png, saved(opened(1), "PNG"))
    for data in (b"\xff\xd8 no more", b"words"):
        with pytest.raises(DataError, match="does not decode"):
            thumbnail(data)
