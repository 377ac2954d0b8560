"""Reconstruction targets: computed by hand, kept in float32, and turned back into patches."""

import pytest
import torch

from mae_core import ConfigError, normalise_pixels, patch_basis, patchify, target_of
from mae_core.targets import patch_statistics, patches_of


def test_normalised_target_by_hand():
    # mean 2.5, unbiased variance (2.25 + 0.25 + 0.25 + 2.25) / 3 = 5 / 3; the biased one, 5 / 4, would give 1.34 at the end
    patches = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [7.0, 7.0, 7.0, 7.0], [0.0, 0.001, 0.002, 0.003]]])
    deviation = (5 / 3 + 1e-6) ** 0.5
    small = (
        5e-6 / 3 + 1e-6
    ) ** 0.5  # 1.633e-3: adding 1e-6 to the variance matters here; adding it to the deviation would not
    expected = torch.tensor(
        [
            [-1.5 / deviation, -0.5 / deviation, 0.5 / deviation, 1.5 / deviation],
            [0.0, 0.0, 0.0, 0.0],
            [-0.0015 / small, -0.0005 / small, 0.0005 / small, 0.0015 / small],
        ]
    )
    # float32 arithmetic on numbers below 2: a few times 2**-23
    torch.testing.assert_close(target_of(patches, target="normalised")[0], expected, rtol=0, atol=1e-6)


def test_golden_target_from_image_bytes():
    # one 2 x 2 patch, one channel, mean 0.5 and deviation 0.25: bytes 51, 102, 153, 204 are pixels -1.2, -0.4, 0.4, 1.2
    images = torch.tensor([[51, 102], [153, 204]], dtype=torch.uint8).reshape(1, 2, 2, 1)
    patches = patchify(normalise_pixels(images, mean=(0.5,), std=(0.25,)), 2)
    raw = torch.tensor([[[-1.2, -0.4, 0.4, 1.2]]])
    torch.testing.assert_close(target_of(patches, target="raw"), raw, rtol=0, atol=1e-6)
    # variance (1.44 + 0.16 + 0.16 + 1.44) / 3 = 3.2 / 3, deviation 1.0327960; -1.2 / 1.0327960 = -1.1618946
    normalised = torch.tensor([[[-1.1618946, -0.3872982, 0.3872982, 1.1618946]]])
    torch.testing.assert_close(target_of(patches, target="normalised"), normalised, rtol=0, atol=2e-6)


def test_a_flat_colour_is_not_a_zero_target():
    # grey 124 in all channels: ImageNet's means put the channels 0.28 apart, so the patch has a deviation of its own
    images = torch.full((1, 16, 16, 3), 124, dtype=torch.uint8)
    patches = patchify(normalise_pixels(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)), 16)
    _, deviation = patch_statistics(patches)
    assert 0.1 < deviation.item() < 0.2
    assert target_of(patches, target="normalised").abs().max() > 1.0


def test_float32_is_kept_and_half_is_refused(generator):
    patches = torch.randn(1, 4, 48, generator=generator)
    assert torch.equal(target_of(patches, target="raw"), patches)
    assert target_of(patches.double(), target="normalised").dtype == torch.float32
    basis = patch_basis(torch.randn(64, 48, generator=generator), components=5)
    for target in ("normalised", "pca"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = target_of(patches, target=target, basis=basis)
        assert torch.equal(under_autocast, target_of(patches, target=target, basis=basis))
    with pytest.raises(TypeError, match="float32"):
        target_of(patches.bfloat16(), target="raw")


def test_why_half_is_refused():
    # bright and nearly flat: bfloat16 has steps of 1/64 at 2, against a deviation of 0.15 (channels) and noise of 0.01
    generator = torch.Generator().manual_seed(1)
    patches = torch.tensor([2.0, 2.1, 2.3]).repeat(256) + 0.01 * torch.randn(8, 768, generator=generator)
    exact = target_of(patches, target="normalised")
    rounded = target_of(patches.bfloat16().float(), target="normalised")
    assert (exact - rounded).square().mean().sqrt() > 0.02


def test_principal_components_against_an_independent_svd(generator):
    patches = torch.randn(300, 12, generator=generator) @ torch.diag(torch.linspace(3, 0.1, 12)) + 5.0
    basis = patch_basis(patches, components=4)
    _, _, rows = torch.linalg.svd((patches - patches.mean(dim=0)).double(), full_matrices=False)
    cosines = (basis.components.double() * rows[:4]).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(4).double(), rtol=0, atol=1e-6)  # float32 entries of unit vectors
    assert (basis.components.gather(1, basis.components.abs().argmax(dim=1, keepdim=True)) > 0).all()
    coefficients = target_of(patches, target="pca", basis=basis)
    assert coefficients.shape == (300, 4)
    torch.testing.assert_close(coefficients.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-5)  # sums of 300 float32
    assert (coefficients.var(dim=0).diff() < 0).all()


@pytest.mark.parametrize("target", ["raw", "normalised", "pca"])
def test_a_perfect_prediction_gives_the_patch_back(target, generator):
    patches = torch.randn(2, 7, 12, generator=generator)
    basis = patch_basis(torch.randn(64, 12, generator=generator), components=12)  # all directions, so nothing is lost
    prediction = target_of(patches, target=target, basis=basis)
    back = patches_of(prediction, true_patches=patches, target=target, basis=basis)
    torch.testing.assert_close(back, patches, rtol=0, atol=2e-6)  # two float32 products of 12 numbers below 4


def test_a_missing_or_impossible_basis_is_refused(generator):
    patches = torch.randn(5, 12, generator=generator)
    with pytest.raises(ConfigError, match="patch_basis"):
        target_of(patches, target="pca")
    with pytest.raises(ConfigError, match="components=5 of 5 patches"):
        patch_basis(patches, components=5)
