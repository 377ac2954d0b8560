"""Register tokens: encoders of DINOv2's kind equal timm's and transformers', and pretraining equals the reference."""

import pytest
import timm
import torch
import transformers
from peer_kit import moved

from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, ViTEncoder
from mae_core.cost import parameter_count
from mae_core.errors import ConfigError
from mae_core.interop import detect_layout, encoder_from, infer_encoder_config, to_timm
from mae_core.reference import reference_forward

WIDTH, DEPTH, HEADS, SIDE, PATCH = 32, 2, 4, 28, 7
HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}


def timm_dinov2(**options):
    """timm's DINOv2 with registers, shrunk; LayerScale starts at 0.1 so that the blocks matter."""
    torch.manual_seed(0)
    peer = timm.create_model(
        "vit_small_patch14_reg4_dinov2",
        **{
            "img_size": SIDE,
            "patch_size": PATCH,
            "embed_dim": WIDTH,
            "depth": DEPTH,
            "num_heads": HEADS,
            "num_classes": 0,
            "init_values": 0.1,
            **options,
        },
    )
    moved(peer, width=WIDTH)
    return peer.eval()


def hf_dinov2(*, registers):
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**HF, num_register_tokens=registers)
        peer = transformers.Dinov2WithRegistersModel(config)
    else:
        peer = transformers.Dinov2Model(transformers.Dinov2Config(**HF))
    moved(peer, width=WIDTH)
    return peer.eval()


def official_names(timm_weights):
    """The same weights as DINOv2's own files name them: a row of the table for the class token, none for registers."""
    found = dict(timm_weights)
    found["register_tokens"] = found.pop("reg_token")
    row = torch.full((1, 1, WIDTH), 0.25)
    found["cls_token"] = found["cls_token"] - row
    found["pos_embed"] = torch.cat([row, found["pos_embed"]], dim=1)
    return found | {"mask_token": torch.zeros(1, WIDTH)}


def pixels():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def imported(weights):
    layout = detect_layout(weights)
    config = infer_encoder_config(weights, layout=layout, num_heads=HEADS)
    found = encoder_from(weights, config, layout=layout)
    encoder = ViTEncoder(config)
    encoder.load_state_dict(found.weights)
    return layout, encoder.eval(), found.left_out


@pytest.mark.parametrize("case", ["timm", "official", "rows for registers too", "no LayerScale", "no registers"])
@torch.inference_mode()
def test_timms_dinov2(case):
    options = {
        "no LayerScale": {"init_values": None},
        "rows for registers too": {"no_embed_class": False},
        "no registers": {"reg_tokens": 0, "no_embed_class": False},
    }
    peer = timm_dinov2(**options.get(case, {}))
    weights = peer.state_dict()
    layout, encoder, left_out = imported(official_names(weights) if case == "official" else weights)
    assert layout == "timm"
    assert left_out == (("mask_token",) if case == "official" else ())
    assert encoder.config.num_register_tokens == (0 if case == "no registers" else 4)
    # fp32, features of order 1: worst 2e-6 over the cases; without LayerScale or with registers in the mean it is above 0.1
    torch.testing.assert_close(encoder(pixels()), peer.forward_features(pixels()), rtol=0, atol=2e-5)
    torch.testing.assert_close(
        encoder.encode(pixels(), pool="mean"),
        peer.forward_features(pixels())[:, peer.num_prefix_tokens :].mean(dim=1),
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("registers", [0, 3])
@torch.inference_mode()
def test_hugging_faces_dinov2(registers, tmp_path):
    peer = hf_dinov2(registers=registers)
    expected = peer(pixel_values=pixels()).last_hidden_state
    peer.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    for weights in (peer.state_dict(), load_file(tmp_path / "model.safetensors")):
        layout, encoder, left_out = imported(weights)
        assert layout == "hf_dinov2"
        assert set(left_out) <= {"embeddings.mask_token"}
        torch.testing.assert_close(encoder(pixels()), expected, rtol=0, atol=2e-5)


def test_a_layer_scale_of_some_blocks_is_incomplete():
    weights = timm_dinov2().state_dict()
    del weights["blocks.1.ls2.gamma"]
    with pytest.raises(ConfigError, match=r"missing \['blocks\.1\.ls2\.gamma'\]"):
        imported(weights)


def test_registers_take_part_in_pretraining_and_no_patch_is_lost():
    encoder = ViTConfig(
        image_size=(SIDE, SIDE), patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_register_tokens=3
    )
    config = MAEConfig(encoder=encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, loss_on="all")
    model = MaskedAutoencoder(config, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, encoder.num_patches, generator=torch.Generator().manual_seed(2))
    ours, reference = model(pixels(), noise), reference_forward(model, pixels(), noise)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.prediction, reference.prediction, rtol=0, atol=1e-5)
    ours.loss.sum().backward()
    assert model.encoder.register_tokens.grad.abs().max() > 0
    assert parameter_count(encoder) == parameter_count(ViTConfig(**{**vars(encoder), "num_register_tokens": 0})) + 96


def test_registers_are_not_written_into_layouts_without_them():
    config = ViTConfig(image_size=(28, 28), patch_size=7, embed_dim=32, depth=1, num_heads=4, num_register_tokens=4)
    weights = ViTEncoder(config, generator=torch.Generator().manual_seed(0)).state_dict()
    with pytest.raises(ConfigError, match="num_register_tokens=4 cannot be converted"):
        to_timm(weights, config)
    with pytest.raises(ConfigError, match="num_register_tokens=-1 is negative"):
        ViTConfig(embed_dim=32, depth=1, num_heads=4, num_register_tokens=-1)
