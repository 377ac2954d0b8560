"""Weights of others: there and back without a changed bit, and strict about names."""

import pytest
import torch
from safetensors.torch import load_file

from mae_core import ConfigError, MAEConfig, MaskedAutoencoder, ViTConfig, from_hf_vitmae, to_hf_vitmae


@pytest.fixture
def config():
    encoder = ViTConfig(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return MAEConfig(encoder=encoder, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def peer(config, hugging_face_peer):
    return hugging_face_peer(config)


def released_spelling(name: str) -> str:
    """The name as the released facebook/vit-mae-* files have it (transformers 4)."""
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    for new, old in (("q", "query"), ("k", "key"), ("v", "value")):
        name = name.replace(f"attention.{new}_proj", f"attention.attention.{old}")
    name = name.replace("attention.o_proj", "attention.output.dense")
    return name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


def test_round_trip_changes_no_bit(config, peer, generator):
    ours = from_hf_vitmae(peer.state_dict(), config)
    MaskedAutoencoder(config, generator=generator).load_state_dict(ours, strict=True)
    back = to_hf_vitmae(ours, config)
    assert back.keys() == peer.state_dict().keys()
    for name, tensor in peer.state_dict().items():
        # position tables are computed on both sides: one step of float32 at 1
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1.2e-7 if "pos" in name else 0)
    peer.load_state_dict(back, strict=True)


def test_names_of_released_and_of_saved_files_are_read(config, peer, tmp_path):
    expected = from_hf_vitmae(peer.state_dict(), config)
    peer.save_pretrained(tmp_path)
    released = {released_spelling(name): tensor for name, tensor in peer.state_dict().items()}
    for spelling in (load_file(tmp_path / "model.safetensors"), released):
        found = from_hf_vitmae(spelling, config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_and_unknown_names_are_listed(config, peer):
    weights = peer.state_dict()
    weights["vit.extra"] = weights.pop("vit.layernorm.weight")
    with pytest.raises(ConfigError, match=r"missing \['vit.layernorm.weight'\], unknown \['vit.extra'\]"):
        from_hf_vitmae(weights, config)
    with pytest.raises(ConfigError, match="missing"):
        to_hf_vitmae({}, config)


def test_other_positions_are_refused(config, peer):
    weights = peer.state_dict()
    weights["decoder.decoder_pos_embed"] = weights["decoder.decoder_pos_embed"] + 0.01
    with pytest.raises(ConfigError, match=r"decoder_pos_embed.*trained positions"):
        from_hf_vitmae(weights, config)
