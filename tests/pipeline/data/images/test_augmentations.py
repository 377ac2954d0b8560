"""RandAugment and random erasing equal timm's for the same draws, and draw nothing from a global generator."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.auto_augment
import timm.data.random_erasing
import torch
from PIL import Image

from mae_core.config import IMAGENET_MEAN, IMAGENET_STD
from mae_core.randomness import uniform_rows
from pipeline.data.images.augmentations import _OPERATIONS, ERASE_UNIFORMS, RandAugment, erase, rand_augment
from pipeline.data.images.pictures import AUGMENT_UNIFORMS, AugmentConfig, augment
from pipeline.errors import ConfigError

OFFICIAL = RandAugment.parse("rand-m9-mstd0.5-inc1")
NAMES = timm.data.auto_augment._RAND_INCREASING_TRANSFORMS
FILL = tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN)


def scene(seed: int, side: int = 48) -> np.ndarray:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((side, side))
    return np.clip(np.asarray(coarse) + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)


def drawn(count: int, numbers: int) -> np.ndarray:
    return uniform_rows(0, [0] * count, range(count), "augment", numbers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("direction", "normal"), [(0.2, 0.3), (0.8, 0.95)])
def test_every_operation_is_timms(monkeypatch, name, direction, normal):
    """timm is given our draws: a magnitude, and a number that decides the sign."""
    image = scene(NAMES.index(name))
    layer = [(NAMES.index(name) + 0.5) / len(NAMES), 0.0, normal, 0.1, direction]
    ours = rand_augment(image, np.array([*layer, 0.0, 0.9, 0.0, 0.0, 0.0]), OFFICIAL)
    gauss = np.sqrt(-2 * np.log(1 - normal)) * np.cos(2 * np.pi * 0.1)
    numbers = iter([0.0, direction])  # whether it is applied, then the sign
    fake = SimpleNamespace(random=lambda: next(numbers), gauss=lambda mean, deviation: mean + deviation * gauss)
    monkeypatch.setattr(timm.data.auto_augment, "random", fake)
    parameters = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "magnitude_std": 0.5}
    theirs = timm.data.auto_augment.AugmentOp(name, prob=0.5, magnitude=9, hparams=parameters)(Image.fromarray(image))
    assert np.array_equal(ours, np.asarray(theirs))


def test_the_policy_is_timms():
    assert list(_OPERATIONS) == NAMES
    assert RandAugment(9.0, 2, 0.5) == OFFICIAL
    theirs = timm.data.auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    assert theirs.num_layers == OFFICIAL.layers
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in theirs.ops} == {(0.5, 9, 0.5)}
    assert RandAugment.parse("rand-m7-n3-inc1") == RandAugment(7.0, 3, 0.0)


def test_pictures_change_as_often_and_as_much_as_timms():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    theirs = timm.data.auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1",
        # below 10, where timm asks Pillow for pictures of 0 bits, which it refuses
        {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC, "magnitude_max": 9.99},
    )
    images = [scene(seed) for seed in range(600)]
    mine = [rand_augment(*pair, OFFICIAL) for pair in zip(images, drawn(600, OFFICIAL.uniforms), strict=True)]
    other = [np.asarray(theirs(Image.fromarray(image))) for image in images]

    def change(changed):
        return np.array([np.abs(a.astype(int) - b).mean() for a, b in zip(changed, images, strict=True)])

    assert (change(mine) == 0).mean() == pytest.approx((change(other) == 0).mean(), abs=0.07)
    assert change(mine).mean() == pytest.approx(change(other).mean(), rel=0.12)


@pytest.mark.parametrize("row", range(40))
def test_erased_boxes_are_timms(monkeypatch, row):
    image, numbers = scene(row, side=32), drawn(40, ERASE_UNIFORMS)[row]
    ours = erase(image, numbers, probability=0.7)
    tries, place = iter(numbers[1:21]), iter(numbers[-3:-1])
    fake = SimpleNamespace(
        random=lambda: numbers[0],
        uniform=lambda low, high: low + (high - low) * next(tries),
        randint=lambda low, high: low + int(next(place) * (high - low + 1)),
    )
    monkeypatch.setattr(timm.data.random_erasing, "random", fake)
    marked = torch.zeros(3, 32, 32)
    eraser = timm.data.random_erasing.RandomErasing(0.7, mode="pixel", device="cpu")
    torch.manual_seed(0)
    expected = eraser(marked).numpy().any(axis=0)
    assert (ours[~expected] == image[~expected]).all()
    if expected.any():
        assert (ours != image).any(axis=-1)[expected].mean() > 0.9


def test_the_noise_is_normal_after_normalisation():
    values = []
    for numbers in drawn(200, ERASE_UNIFORMS):
        numbers[0] = 0.0
        black = erase(np.zeros((64, 64, 3), np.uint8), numbers, probability=1.0)
        values.append(black[black.any(axis=-1)])
    pixels = (np.concatenate(values) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    clipped = np.random.default_rng(0).normal(size=(200_000, 3))
    clipped = (np.clip(clipped * IMAGENET_STD + IMAGENET_MEAN, 0, 1) - IMAGENET_MEAN) / IMAGENET_STD
    assert pixels.mean(axis=0) == pytest.approx(clipped.mean(axis=0), abs=0.02)
    assert pixels.std(axis=0) == pytest.approx(clipped.std(axis=0), abs=0.02)
    assert np.corrcoef(pixels[:-1, 0], pixels[1:, 0])[0, 1] == pytest.approx(0, abs=0.02)


def test_nothing_is_drawn_from_a_global_generator():
    config = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    rows = drawn(50, config.uniforms)
    pictures = [augment(scene(0), row, config, (32, 32)) for row in rows]
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert np.array_equal(before[1][1], after[1][1])
    assert torch.equal(before[2], after[2])
    again = [augment(scene(0), row, config, (32, 32)) for row in rows[::-1]]  # in another order
    assert all(np.array_equal(one, other) for one, other in zip(pictures, again[::-1], strict=True))


def test_the_crop_does_not_depend_on_what_follows_it():
    plain, strong = AugmentConfig(), AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    assert np.array_equal(drawn(3, strong.uniforms)[:, :AUGMENT_UNIFORMS], drawn(3, plain.uniforms))
    calm = strong.for_evaluation()
    assert (calm.kind, calm.flip, calm.rand_augment, calm.erasing) == ("center", False, None, 0.0)


@pytest.mark.parametrize("text", ["rand-m9", "rand-m9-mstd0.5", "rand-m11-inc1", "augmix-m5-w4-d2", "original"])
def test_other_policies_are_answered(text):
    with pytest.raises(
        ConfigError, match=r"rand_augment='.*' is not of the form .*: write rand-m9-mstd0.5-inc1, or null"
    ):
        AugmentConfig(rand_augment=text)


def test_an_impossible_probability_is_answered():
    with pytest.raises(ConfigError, match=r"erasing=1.5 is not in \[0, 1\]: write 0 for none"):
        AugmentConfig(erasing=1.5)
