"""Groups: which parameters decay and how fast each layer learns, pinned by name and on a live optimiser."""

from dataclasses import replace

import pytest
import torch

from mae_core import (
    AttentiveProbe,
    Classifier,
    ConfigError,
    MaskedAutoencoder,
    ViTEncoder,
    parameter_groups,
    warmup_cosine,
)

BLOCK_DECAYED = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
BLOCK_EXEMPT = [
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.bias",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.bias",
    "mlp.fc2.bias",
]


def in_blocks(prefix, names):
    return {f"{prefix}.blocks.{index}.{name}" for index in range(2) for name in names}


def test_weight_decay_membership_of_the_autoencoder(mae_config, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    decayed, exempt = parameter_groups(model, weight_decay=0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert (decayed["name"], exempt["name"]) == ("decay", "no_decay")
    assert set(decayed["names"]) == {
        "encoder.patch_embed.weight",
        "decoder.embed.weight",
        "decoder.head.weight",
        *in_blocks("encoder", BLOCK_DECAYED),
        *in_blocks("decoder", BLOCK_DECAYED),
    }
    assert set(exempt["names"]) == {
        "encoder.cls_token",
        "encoder.patch_embed.bias",
        "encoder.norm.weight",
        "encoder.norm.bias",
        "decoder.mask_token",
        "decoder.embed.bias",
        "decoder.norm.weight",
        "decoder.norm.bias",
        "decoder.head.bias",
        *in_blocks("encoder", BLOCK_EXEMPT),
        *in_blocks("decoder", BLOCK_EXEMPT),
    }


def test_no_learnt_token_and_no_position_decays(mae_config, generator):
    """Also with learned positions, eight class tokens and mask tokens in the encoder."""
    encoder = replace(mae_config.encoder, positions="learned", cls_tokens=8)
    model = MaskedAutoencoder(replace(mae_config, encoder=encoder, encoder_input="all"), generator=generator)
    decayed, exempt = parameter_groups(model, weight_decay=0.05)
    matrices = {name for name in exempt["names"] if model.get_parameter(name).ndim > 1}
    assert matrices == {"encoder.cls_token", "encoder.positions", "mask_token"}
    assert set(decayed["names"]) == {
        "encoder.patch_embed.weight",
        "decoder.embed.weight",
        "decoder.head.weight",
        *in_blocks("encoder", BLOCK_DECAYED),
        *in_blocks("decoder", BLOCK_DECAYED),
    }
    first = parameter_groups(model, weight_decay=0.05, layer_decay=0.5, depth=2)[:2]
    assert {name for group in first for name in group["names"]} == matrices | {
        "encoder.patch_embed.weight",
        "encoder.patch_embed.bias",
    }
    probe = AttentiveProbe(16, 5, num_heads=2, generator=generator)
    assert {group["name"]: set(group["names"]) for group in parameter_groups(probe, weight_decay=0.1)} == {
        "decay": {"keys.weight", "values.weight", "head.weight"},
        "no_decay": {"queries", "head.bias"},
    }


def test_the_decoders_mask_token_learns_like_the_decoder(mae_config, generator):
    groups = parameter_groups(
        MaskedAutoencoder(mae_config, generator=generator), weight_decay=0.0, layer_decay=0.5, depth=2
    )
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["decoder.mask_token"] == scales["decoder.blocks.0.attn.qkv.weight"] == 1.0


def test_weight_decay_membership_of_the_classifier(vit_config, generator):
    encoder = ViTEncoder(replace(vit_config, positions="learned"), generator=generator)
    decayed, exempt = parameter_groups(Classifier(encoder, num_classes=5, generator=generator), weight_decay=0.05)
    assert set(decayed["names"]) == {"encoder.patch_embed.weight", "head.weight", *in_blocks("encoder", BLOCK_DECAYED)}
    assert set(exempt["names"]) == {
        "encoder.cls_token",
        "encoder.positions",
        "encoder.patch_embed.bias",
        "fc_norm.weight",
        "fc_norm.bias",
        "head.bias",
        *in_blocks("encoder", BLOCK_EXEMPT),
    }


def test_layer_decay_of_the_classifier(vit_config, generator):
    model = Classifier(ViTEncoder(vit_config, generator=generator), num_classes=5, generator=generator)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5, depth=2)
    found = {group["name"]: (group["lr_scale"], group["weight_decay"], set(group["names"])) for group in groups}
    expected = {
        "layer_0/decay": (0.125, 0.05, {"encoder.patch_embed.weight"}),
        "layer_0/no_decay": (0.125, 0.0, {"encoder.patch_embed.bias", "encoder.cls_token"}),
        "layer_3/decay": (1.0, 0.05, {"head.weight"}),
        "layer_3/no_decay": (1.0, 0.0, {"head.bias", "fc_norm.weight", "fc_norm.bias"}),
    }
    for index, scale in ((0, 0.25), (1, 0.5)):
        block = f"encoder.blocks.{index}."
        expected[f"layer_{index + 1}/decay"] = (scale, 0.05, {block + name for name in BLOCK_DECAYED})
        expected[f"layer_{index + 1}/no_decay"] = (scale, 0.0, {block + name for name in BLOCK_EXEMPT})
    assert found == expected
    assert len(groups) <= 2 * (2 + 2)


def test_the_final_norm_of_a_cls_classifier_learns_like_the_head(vit_config, generator):
    encoder = ViTEncoder(vit_config, generator=generator)
    model = Classifier(encoder, num_classes=5, pool="cls", generator=generator)
    groups = parameter_groups(model, weight_decay=0.0, layer_decay=0.5, depth=2)
    assert set(groups[-1]["names"]) == {"encoder.norm.weight", "encoder.norm.bias", "head.bias"}


def test_layer_decay_moves_a_live_optimiser(vit_config, draw, generator):
    """A group's scale has no effect until a rate is multiplied by it; this is the loop that does so, one AdamW step long."""
    decay, depth = 0.75, 2
    encoder = ViTEncoder(replace(vit_config, positions="learned"), generator=generator)
    model = Classifier(encoder, num_classes=5, generator=generator).double()
    groups = parameter_groups(model, weight_decay=0.0, layer_decay=decay, depth=depth)
    optimiser = torch.optim.AdamW(groups, lr=0.0, eps=1e-40)
    schedule = {"peak_lr": 1e-3, "warmup_images": 100, "total_images": 1000, "min_lr": 1e-5}

    def set_rates(images):
        for group in optimiser.param_groups:
            group["lr"] = warmup_cosine(images, **schedule) * group["lr_scale"]
        return {name: group["lr"] for group in optimiser.param_groups for name in group["names"]}

    rates = set_rates(images=400)
    head = rates["head.weight"]
    assert head == rates["fc_norm.weight"] == warmup_cosine(400, **schedule)
    for name in ("encoder.patch_embed.weight", "encoder.patch_embed.bias", "encoder.cls_token", "encoder.positions"):
        assert rates[name] / head == pytest.approx(decay ** (depth + 1))
    for index in range(depth):
        assert rates[f"encoder.blocks.{index}.attn.qkv.weight"] / head == pytest.approx(decay ** (depth - index))

    # Adam's first step is rate * g / |g|, so a parameter moves by its rate wherever it has a gradient
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.nn.functional.cross_entropy(model(draw(encoder.config, 4)[0]), torch.arange(4)).backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - before[name]).abs()[parameter.grad != 0]
        assert len(moved) > 0
        # differences of doubles near 1: 2e-16 against a rate of 3e-4
        torch.testing.assert_close(moved, torch.full_like(moved, rates[name]), rtol=1e-10, atol=0)

    # at the ends of the schedule: nothing moves at the start, and early layers end below min_lr
    assert set(set_rates(images=0).values()) == {0.0}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert set_rates(images=1000)["encoder.patch_embed.weight"] == pytest.approx(1e-5 * decay ** (depth + 1))


def test_frozen_parameters_are_left_out_and_no_group_is_empty(vit_config, generator):
    model = Classifier(ViTEncoder(vit_config, generator=generator), num_classes=5, generator=generator)
    model.encoder.requires_grad_(requires_grad=False)
    model.head.bias.requires_grad_(requires_grad=False)
    model.fc_norm.requires_grad_(requires_grad=False)
    (only,) = parameter_groups(model, weight_decay=0.05)
    assert only["names"] == ["head.weight"]
    model.head.requires_grad_(requires_grad=False)
    assert parameter_groups(model, weight_decay=0.05) == []


def test_every_parameter_is_in_one_group_and_adamw_takes_them(mae_config, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.75, depth=2)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr_scale"] for group in optimiser.param_groups] == [group["lr_scale"] for group in groups]


def test_wrong_values_are_refused(vit_config, generator):
    encoder = ViTEncoder(vit_config, generator=generator)
    with pytest.raises(ConfigError, match="give both or neither"):
        parameter_groups(encoder, weight_decay=0.0, layer_decay=0.75)
    with pytest.raises(ConfigError, match=r"layer_decay=1\.5"):
        parameter_groups(encoder, weight_decay=0.0, layer_decay=1.5, depth=2)
    with pytest.raises(ConfigError, match=r"depth=1.*blocks\.1"):
        parameter_groups(encoder, weight_decay=0.0, layer_decay=0.75, depth=1)
