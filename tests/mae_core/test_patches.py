"""Patches and pixel scales: exact inverses, and the order of values in a patch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core import ConfigError, denormalise_pixels, normalise_pixels, patchify, unpatchify
from mae_core.patches import cut_patches, gather_patches


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_unpatchify_undoes_patchify(batch, channels, rows, columns, side):
    images = torch.arange(batch * channels * rows * columns * side**2).reshape(
        batch, channels, rows * side, columns * side
    )
    patches = patchify(images, side)
    assert patches.shape == (batch, rows * columns, side * side * channels)
    assert torch.equal(unpatchify(patches, grid=(rows, columns), patch_size=side), images)


def test_patch_order_is_row_column_channel():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    second = patchify(images, 2)[0, 1]
    assert second.tolist() == [images[0, c, r, q].item() for r in (0, 1) for q in (2, 3) for c in (0, 1)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_cut_out_are_those_gathered_from_all(channels_last, generator):
    images = torch.randn(3, 2, 8, 12, generator=generator)  # 2 rows of 3 patches
    images = images.to(memory_format=torch.channels_last) if channels_last else images
    ids = torch.rand(3, 6, generator=generator).argsort(dim=1)[:, :4]
    assert torch.equal(cut_patches(images, 4, ids), gather_patches(patchify(images, 4), ids))


def test_patch_embedding_equals_strided_convolution(generator):
    images = torch.randn(2, 3, 8, 12, generator=generator)
    kernel = torch.randn(5, 3, 4, 4, generator=generator)
    by_convolution = torch.nn.functional.conv2d(images, kernel, stride=4).flatten(2).mT
    by_patches = patchify(images, 4) @ kernel.permute(0, 2, 3, 1).flatten(1).T
    # float32 sums of 48 products of unit normals: rounding stays below 48 * 2**-24 * 30, about 1e-4
    torch.testing.assert_close(by_patches, by_convolution, rtol=0, atol=1e-4)


def test_pixel_scales_are_inverse():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    pixels = normalise_pixels(images, mean=mean, std=std)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels[0, 1, 0, 3].item() == pytest.approx((3 / 255 - 0.456) / 0.224, abs=1e-6)  # one float32 step at 2
    back = denormalise_pixels(pixels, mean=mean, std=std)
    assert torch.equal((back * 255).round().to(torch.uint8), images.permute(0, 3, 1, 2))
    with pytest.raises(TypeError, match="uint8"):
        normalise_pixels(pixels, mean=mean, std=std)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="patch_size=4 does not divide an image of 8 x 6"):
        patchify(torch.zeros(1, 3, 8, 6), 4)
    with pytest.raises(ConfigError, match="patch_size=4 does not divide"):
        cut_patches(torch.zeros(1, 3, 8, 6), 4, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"grid=\(2, 2\)"):
        unpatchify(torch.zeros(1, 6, 48), grid=(2, 2), patch_size=4)
