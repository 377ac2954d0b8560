"""The encoder: what it sees, what it does not depend on, how it starts."""

import copy
import math

import pytest
import torch

from mae_core import ConfigError, ViTEncoder, initialise
from mae_core.vit import Block


@pytest.fixture
def encoder(vit_config, generator):
    return ViTEncoder(vit_config, generator=generator)


def test_parameter_names_are_pinned(encoder):
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["patch_embed", *(f"blocks.{i}.{name}" for i in range(2) for name in block), "norm"]
    assert set(encoder.state_dict()) == {"cls_token", *(f"{m}.{kind}" for m in modules for kind in ("weight", "bias"))}


def test_encode_draws_nothing_and_equals_forward_with_all_ids(encoder, draw):
    pixels, noise = draw(encoder.config, 3)
    before = torch.get_rng_state()
    tokens = encoder.encode(pixels, pool="none")
    assert torch.equal(tokens, encoder.encode(pixels, pool="none"))
    assert torch.equal(before, torch.get_rng_state())
    everything = torch.arange(encoder.config.num_patches).expand(3, -1)
    assert torch.equal(tokens, encoder(pixels, everything))
    shuffled = noise.argsort(dim=1)
    order = torch.cat([torch.zeros(3, 1, dtype=torch.int64), shuffled + 1], dim=1)
    again = encoder(pixels, shuffled)
    # another order of the same sums in attention: float32 rounding of unit-sized tokens
    torch.testing.assert_close(again, tokens.gather(1, order[..., None].expand_as(tokens)), rtol=0, atol=1e-5)


def test_pools(encoder, draw):
    pixels, _ = draw(encoder.config, 2)
    tokens = encoder.encode(pixels, pool="none")
    assert tokens.shape == (2, 25, 16)
    assert torch.equal(encoder.encode(pixels, pool="cls"), tokens[:, 0])
    assert torch.equal(encoder.encode(pixels, pool="mean"), tokens[:, 1:].mean(dim=1))
    assert torch.equal(encoder.norm(encoder.tokens(pixels)), tokens)
    with pytest.raises(ConfigError, match="pool='max'"):
        encoder.encode(pixels, pool="max")


def test_hidden_patches_are_not_seen(encoder, draw):
    pixels, _ = draw(encoder.config, 1)
    ids = torch.tensor([[0, 5, 7]])
    changed = pixels.clone()
    changed[:, :, 20:, 12:] += 1.0  # the last patch, index 23
    assert torch.equal(encoder(pixels, ids), encoder(changed, ids))


def test_drop_scales(encoder, draw, generator):
    pixels, _ = draw(encoder.config, 2)
    assert torch.equal(encoder(pixels, None, torch.ones(2, 2, 2)), encoder(pixels))
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 5, 16, generator=generator)
    kept_and_dropped = block(x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(kept_and_dropped[1], x[1])
    torch.testing.assert_close(kept_and_dropped[0], block(x)[0], rtol=0, atol=1e-6)  # another batch size, same sums


def test_pixels_of_another_size_are_answered(encoder):
    with pytest.raises(ConfigError, match=r"image_size=\(24, 16\)"):
        encoder(torch.zeros(1, 3, 16, 24))


def test_weights_are_nan_until_filled_and_construction_draws_nothing(vit_config):
    before = torch.get_rng_state()
    encoder = ViTEncoder(vit_config)
    assert torch.equal(before, torch.get_rng_state())
    assert encoder.encode(torch.zeros(1, 3, 24, 16), pool="mean").isnan().all()


def test_initialisation_is_a_function_of_the_generator(vit_config):
    first, second = (ViTEncoder(vit_config, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    other = ViTEncoder(vit_config, generator=torch.Generator().manual_seed(2)).state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, other[name]) == (value.ndim == 1), name
    half = copy.deepcopy(second).bfloat16()
    initialise(half, generator=torch.Generator().manual_seed(1))
    assert torch.equal(half.cls_token, first.cls_token.bfloat16())


def test_statistics_of_initialised_parameters(generator, vit_config):
    wide = type(vit_config)(image_size=(16, 16), patch_size=8, embed_dim=128, depth=1, num_heads=2)
    for name, value in ViTEncoder(wide, generator=generator).state_dict().items():
        if name == "cls_token":
            # 128 draws: the deviation's own error is 0.02 / sqrt(256) = 0.00125, four of them
            assert value.std().item() == pytest.approx(0.02, abs=0.005)
        elif value.ndim == 2:
            bound = math.sqrt(6 / (value.shape[0] + value.shape[1]))
            # >= 16384 uniform draws: deviation within 2 %, and the largest within 1 % of the bound but not beyond
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert 0.99 * bound < value.abs().max() <= bound
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert torch.equal(value, torch.full_like(value, expected)), name


def test_initialise_refuses_what_it_has_no_rule_for(generator):
    with pytest.raises(ConfigError, match="no rule"):
        initialise(torch.nn.Conv2d(1, 1, 1), generator=generator)
