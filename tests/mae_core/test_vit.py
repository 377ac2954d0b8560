"""The encoder: what it sees, what it does not depend on, how it is initialised."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from mae_core import ConfigError, MAEConfig, MaskedAutoencoder, ViTConfig, ViTEncoder, initialise, sine_cosine_2d
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
    torch.testing.assert_close(kept_and_dropped[0], block(x)[0], rtol=0, atol=1e-6)  # same sums in another batch size


def test_pixels_of_another_size_are_refused(encoder):
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


@pytest.mark.parametrize("encoder_input", ["visible", "all"])
def test_statistics_of_initialised_parameters(encoder_input, generator, vit_config):
    wide = replace(
        vit_config, patch_size=8, image_size=(16, 16), embed_dim=128, depth=1, cls_tokens=2, positions="learned"
    )
    config = MAEConfig(
        encoder=wide, decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=2, encoder_input=encoder_input
    )
    tokens = 0
    for name, value in MaskedAutoencoder(config, generator=generator).state_dict().items():
        if name.endswith("_token"):
            # 128 draws or more: the deviation's own error is 0.02 / sqrt(256) = 0.00125, four of them
            assert value.std().item() == pytest.approx(0.02, abs=0.005)
            tokens += 1
        elif name == "encoder.positions":
            assert torch.equal(value, sine_cosine_2d((2, 2), 128))
        elif value.ndim == 2:
            bound = math.sqrt(6 / (value.shape[0] + value.shape[1]))
            # >= 16384 uniform draws: deviation within 2 %, and the largest within 1 % of the bound but not beyond
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
            assert 0.99 * bound < value.abs().max() <= bound
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert torch.equal(value, torch.full_like(value, expected)), name
    assert tokens == 2


def test_several_class_tokens(vit_config, draw, generator):
    encoder = ViTEncoder(replace(vit_config, cls_tokens=8), generator=generator)
    pixels, _ = draw(vit_config, 2)
    tokens = encoder.encode(pixels, pool="none")
    assert tokens.shape == (2, 8 + 24, 16)
    assert torch.equal(encoder.encode(pixels, pool="cls"), tokens[:, :8].mean(dim=1))
    assert torch.equal(encoder.encode(pixels, pool="mean"), tokens[:, 8:].mean(dim=1))
    assert tokens[0, :8].std(dim=0).min() > 1e-4  # they differ


def test_weights_serve_another_image_size(vit_config, draw, generator):
    encoder = ViTEncoder(vit_config, generator=generator)
    larger = ViTEncoder(replace(vit_config, image_size=(32, 40)))
    larger.load_state_dict(encoder.state_dict())
    pixels, _ = draw(larger.config, 2)
    # the upper left 6 x 4 patches of the larger grid are the smaller image: same positions, same tokens
    ids = (torch.arange(6)[:, None] * 10 + torch.arange(4)).reshape(1, -1).expand(2, -1)
    part = encoder(pixels[:, :, :24, :16])
    # another batch of the same float32 sums
    torch.testing.assert_close(larger(pixels, ids), part, rtol=0, atol=1e-6)


def test_any_number_of_channels(vit_config, draw, generator):
    config = replace(vit_config, in_channels=5, pixel_mean=(0.5,) * 5, pixel_std=(0.2,) * 5)
    encoder = ViTEncoder(config, generator=generator)
    pixels, _ = draw(config, 2)
    assert encoder.encode(pixels, pool="mean").shape == (2, 16)
    with pytest.raises(ConfigError, match="in_channels=5"):
        encoder(pixels[:, :3])


def test_learned_positions_start_as_the_table_and_learn(vit_config, draw, generator):
    fixed = ViTEncoder(vit_config, generator=torch.Generator().manual_seed(1))
    learned = ViTEncoder(replace(vit_config, positions="learned"), generator=torch.Generator().manual_seed(1))
    pixels, _ = draw(vit_config, 2)
    assert torch.equal(learned(pixels), fixed(pixels))
    assert "positions" in dict(learned.named_parameters())
    assert "positions" not in fixed.state_dict()
    learned(pixels).square().sum().backward()
    assert learned.positions.grad.abs().sum() > 0


def test_equals_timm_s_vision_transformer(draw, generator):
    """timm's blocks, norm and embedding with our weights, whose names differ only in the embedding's kernel."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    config = ViTConfig(image_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=4)
    ours = ViTEncoder(config, generator=generator)
    for parameter in ours.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs = timm.VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    weights = {name: value for name, value in ours.state_dict().items() if not name.startswith("patch_embed")}
    kernel = ours.patch_embed.weight.reshape(32, 8, 8, 3).permute(0, 3, 1, 2)
    table = torch.cat([torch.zeros(1, 32), ours.positions])[None]
    theirs.load_state_dict(
        weights
        | {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": ours.patch_embed.bias, "pos_embed": table}
    )
    pixels, _ = draw(config, 2)
    # float32 through three blocks, with products blocked differently: 3e-6 seen on tokens of size 1
    torch.testing.assert_close(ours(pixels), theirs.eval().forward_features(pixels), rtol=0, atol=2e-5)


def test_initialise_refuses_what_it_has_no_rule_for(generator):
    with pytest.raises(ConfigError, match="no rule"):
        initialise(torch.nn.Conv2d(1, 1, 1), generator=generator)
