"""Sizes are the paper's, wrong values are refused with a way out, and plain values from YAML make the same objects."""

import pytest
from pydantic import TypeAdapter, ValidationError

from mae_core import SIZES, ConfigError, MAEConfig, ViTConfig, base, huge, tiny


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("tiny", (192, 12, 3, 16)),
        ("small", (384, 12, 6, 16)),
        ("base", (768, 12, 12, 16)),
        ("large", (1024, 24, 16, 16)),
        ("huge", (1280, 32, 16, 14)),
    ],
)
def test_named_sizes(size, expected):
    config = SIZES[size]()
    assert (config.embed_dim, config.depth, config.num_heads, config.patch_size) == expected


def test_derived_numbers():
    assert base().grid == (14, 14)
    assert base().patch_dim == 768
    assert base(image_size=(224, 448)).grid == (14, 28)
    assert MAEConfig(encoder=base()).visible_patches == 49
    assert MAEConfig(encoder=huge()).visible_patches == 64
    assert MAEConfig(encoder=base()).predicted_patches == 147
    assert MAEConfig(encoder=base(), loss_on="all").predicted_patches == 196
    assert MAEConfig(encoder=base(), target="pca").target_dim == 96
    assert MAEConfig(encoder=base()).target_dim == 768
    assert MAEConfig(encoder=base(), decoder_mlp_ratio=2.5).decoder_mlp_dim == 1280


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"image_size": (224, 220)}, ["image_size=(224, 220)", "width 220", "patch_size=16", "write 224"]),
        ({"embed_dim": 190}, ["embed_dim=190", "num_heads=3"]),
        ({"embed_dim": 6, "num_heads": 3}, ["embed_dim=6", "divisible by 4", "write 8"]),
        ({"depth": 0}, ["depth=0", "above 0"]),
        ({"in_channels": 1}, ["pixel_mean=", "3 values", "in_channels=1"]),
        ({"cls_tokens": 0}, ["cls_tokens=0", "above 0"]),
        ({"positions": "none"}, ["positions='none'", "sine_cosine, learned"]),
        ({"pixel_std": (1.0, 0.0, 1.0)}, ["pixel_std=", "not positive"]),
    ],
)
def test_wrong_encoder_is_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        tiny(**overrides)
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"mask_ratio": 1.0}, ["mask_ratio=1.0", "196 patches", "0 visible"]),
        ({"mask_ratio": 0.0}, ["mask_ratio=0.0", "one hidden"]),
        ({"mask_ratio": float("nan")}, ["mask_ratio=nan"]),
        ({"masking": "blocks"}, ["masking='blocks'", "random, block, grid, cell"]),
        ({"target": "pixels"}, ["target='pixels'", "raw, normalised, pca"]),
        ({"encoder_input": "everything"}, ["encoder_input='everything'", "visible, all"]),
        ({"loss_on": False}, ["loss_on=False", "hidden, all"]),
        ({"mask_cell": 15}, ["mask_cell=15", "[1, 14]"]),
        ({"target": "pca", "pca_components": 769}, ["pca_components=769", "768"]),
        ({"decoder_mlp_ratio": 0.0}, ["decoder_mlp_ratio=0.0", "above 0"]),
        ({"decoder_embed_dim": 500}, ["decoder_embed_dim=500", "decoder_num_heads=16"]),
    ],
)
def test_wrong_autoencoder_is_refused(overrides, parts):
    with pytest.raises(ConfigError) as error:
        MAEConfig(encoder=tiny(), **overrides)
    assert all(part in str(error.value) for part in parts), error.value


def test_pydantic_reads_plain_values():
    plain = {"encoder": {"embed_dim": 16, "depth": 1, "num_heads": 2, "image_size": [32, 16]}, "mask_ratio": 0.5}
    config = TypeAdapter(MAEConfig).validate_python(plain)
    assert config == MAEConfig(
        encoder=ViTConfig(embed_dim=16, depth=1, num_heads=2, image_size=(32, 16)), mask_ratio=0.5
    )
    with pytest.raises(ValidationError, match=r"mask_ratio=2\.0"):
        TypeAdapter(MAEConfig).validate_python({**plain, "mask_ratio": 2.0})
