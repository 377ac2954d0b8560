"""Encoders and autoencoders of timm, transformers and official MAE give the same outputs here, and there after a round trip.

Tolerance: float32 on CPU, the same sums in another order. Tokens and predictions are as large as 6. Over 20 seeds and the layouts
and sizes below, they differed by at most 7e-6 and the loss by 2e-7. A slip to bfloat16 would show as 5e-2; a wrong epsilon, a
swapped pair of names or a shifted position would show as more."""

from dataclasses import replace

import pytest
import torch
from peer_kit import hf_vit_peer, hf_vitmae_peer, official_names, timm_peer

from mae_core import (
    MAEConfig,
    MaskedAutoencoder,
    ViTConfig,
    ViTEncoder,
    autoencoder_from,
    detect_layout,
    encoder_from,
    infer_autoencoder_config,
    infer_encoder_config,
    resized_encoder,
    to_hf_vit,
    to_hf_vitmae,
    to_official_mae,
    to_timm,
)

TOLERANCE = {"rtol": 0, "atol": 3e-5}
SIZES = {"224": (224, 224), "160": (160, 160), "96 x 160": (96, 160)}


def encoder_config(image_size, **changes):
    shape = {"image_size": image_size, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 3.0}
    return ViTConfig(**{**shape, **changes})


def mae_config(image_size, **changes):
    decoder = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2, "decoder_mlp_ratio": 2.5}
    return MAEConfig(**{"encoder": encoder_config(image_size), **decoder, **changes})


def pixels_for(config, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, config.in_channels, *config.image_size, generator=generator)


def loaded(config, weights):
    encoder = ViTEncoder(config)
    encoder.load_state_dict(weights, strict=True)
    return encoder.eval()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("image_size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("positions", ["fixed", "trained"])
@torch.no_grad()
def test_timm_encoder(positions, image_size):
    config = encoder_config(image_size, positions="sine_cosine" if positions == "fixed" else "learned")
    peer = timm_peer(config, positions=positions)
    theirs = peer.state_dict()
    assert detect_layout(theirs) == "timm"
    size = None if positions == "fixed" else image_size  # the fixed table reveals its grid
    assert infer_encoder_config(theirs, layout="timm", num_heads=4, image_size=size) == config

    weights, left_out = encoder_from(theirs, config, layout="timm")
    assert left_out == ()
    pixels = pixels_for(config)
    tokens = loaded(config, weights)(pixels)
    torch.testing.assert_close(tokens, peer.forward_features(pixels), **TOLERANCE)

    back = to_timm(weights, config)
    other = timm_peer(replace(config, layer_norm_eps=1e-6), positions="trained")
    other.load_state_dict(back, strict=True)
    torch.testing.assert_close(other.forward_features(pixels), tokens, **TOLERANCE)
    assert equal(encoder_from(back, config, layout="timm").weights, weights)


@pytest.mark.parametrize("image_size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("positions", ["fixed", "trained"])
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
@torch.no_grad()
def test_hugging_face_encoder(kind, positions, image_size):
    learned = "sine_cosine" if positions == "fixed" else "learned"
    config = encoder_config(image_size, positions=learned, layer_norm_eps=1e-2)  # so large that a wrong one would show
    peer = hf_vit_peer(config, kind=kind, positions=positions)
    theirs = peer.state_dict()
    assert detect_layout(theirs) == "hf_vit"
    size = None if positions == "fixed" else image_size
    inferred = infer_encoder_config(theirs, layout="hf_vit", num_heads=4, layer_norm_eps=1e-2, image_size=size)
    assert inferred == config

    weights, left_out = encoder_from(theirs, config, layout="hf_vit")
    extra = "pooler.dense" if kind == "ViTModel" else "classifier"
    assert left_out == (f"{extra}.bias", f"{extra}.weight")
    pixels = pixels_for(config)
    tokens = loaded(config, weights)(pixels)
    torch.testing.assert_close(tokens, peer.base_model(pixels).last_hidden_state, **TOLERANCE)

    back = to_hf_vit(weights, config)
    other = type(peer.base_model)(peer.config, add_pooling_layer=False).eval()
    other.load_state_dict(back, strict=True)
    torch.testing.assert_close(other(pixels).last_hidden_state, tokens, **TOLERANCE)
    assert equal(encoder_from(back, config, layout="hf_vit").weights, weights)


@pytest.mark.parametrize("image_size", [(224, 224), (160, 160)], ids=["224", "160"])
@pytest.mark.parametrize("target", ["raw", "normalised"])
@pytest.mark.parametrize("layout", ["hf_vitmae", "official_mae"])
@torch.no_grad()
def test_autoencoder(layout, target, image_size):
    config = mae_config(image_size, target=target)
    peer = hf_vitmae_peer(config)
    theirs = peer.state_dict() if layout == "hf_vitmae" else official_names(peer.state_dict())
    assert detect_layout(theirs) == layout
    said = {"num_heads": 4, "decoder_num_heads": 2, "target": target}
    assert infer_autoencoder_config(theirs, layout=layout, **said) == config

    weights, left_out = autoencoder_from(theirs, config, layout=layout)
    assert left_out == ()
    model = MaskedAutoencoder(config, generator=torch.Generator().manual_seed(0))
    model.load_state_dict(weights, strict=True)
    pixels = pixels_for(config.encoder)
    noise = torch.rand(2, config.encoder.num_patches, generator=torch.Generator().manual_seed(2))
    ours, expected = model(pixels, noise), peer(pixels, noise=noise)
    assert torch.equal(ours.masked.mask, expected.mask)
    ids = ours.masked.ids_hidden[..., None].expand_as(ours.prediction)
    torch.testing.assert_close(ours.prediction, expected.logits.gather(1, ids), **TOLERANCE)
    torch.testing.assert_close(ours.loss.mean(), expected.loss, rtol=2e-6, atol=0)

    back = (to_hf_vitmae if layout == "hf_vitmae" else to_official_mae)(weights, config)
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # position tables are computed on both sides, so they may differ by one step of float32 at 1
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1.2e-7 if "pos" in name else 0)
    assert equal(autoencoder_from(back, config, layout=layout).weights, weights)
    if layout == "hf_vitmae":
        peer.load_state_dict(back, strict=True)
        torch.testing.assert_close(peer(pixels, noise=noise).logits, expected.logits, **TOLERANCE)

    # importing only the encoder of the same file reports its decoder
    encoder, left_out = encoder_from(theirs, config.encoder, layout=layout)
    assert equal(encoder, {name[8:]: value for name, value in weights.items() if name.startswith("encoder.")})
    assert set(left_out) == {name for name in theirs if name.startswith(("decoder", "mask_token"))}


@torch.no_grad()
def test_official_encoder_alone_has_the_names_of_timm():
    config = encoder_config((224, 224))
    official = official_names(hf_vitmae_peer(mae_config((224, 224))).state_dict())
    released = {name: value for name, value in official.items() if not name.startswith(("decoder", "mask_token"))}
    assert detect_layout(released) == "timm"
    assert detect_layout(official) == "official_mae"
    peer = timm_peer(config, positions="trained")
    peer.load_state_dict(released, strict=True)
    weights = encoder_from(released, config, layout="timm").weights
    pixels = pixels_for(config)
    torch.testing.assert_close(loaded(config, weights)(pixels), peer.forward_features(pixels), **TOLERANCE)


@torch.no_grad()
def test_trained_positions_follow_timm_to_another_size():
    config = encoder_config((224, 224), positions="learned")
    peer = timm_peer(config, positions="trained", dynamic_img_size=True)
    weights = encoder_from(peer.state_dict(), config, layout="timm").weights
    for image_size in ((320, 320), (160, 288), (224, 224)):
        resized, at_size = resized_encoder(weights, config, image_size=image_size)
        pixels = pixels_for(at_size)
        torch.testing.assert_close(loaded(at_size, resized)(pixels), peer.forward_features(pixels), **TOLERANCE)


@torch.no_grad()
def test_half_precision_weights_keep_their_values():
    config = encoder_config((64, 64))
    theirs = {name: value.bfloat16() for name, value in timm_peer(config, positions="fixed").state_dict().items()}
    assert infer_encoder_config(theirs, layout="timm", num_heads=4) == config  # the table is the fixed one, rounded
    weights = encoder_from(theirs, config, layout="timm").weights
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["blocks.1.mlp.fc1.weight"], theirs["blocks.1.mlp.fc1.weight"])
