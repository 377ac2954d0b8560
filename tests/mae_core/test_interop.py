"""Weights of other projects: a round trip changes no bit, and names are checked strictly."""

from dataclasses import replace

import pytest
import torch
from peer_kit import hf_vit_peer, official_names, table_by_definition, timm_peer
from safetensors.torch import load_file

from mae_core import (
    ConfigError,
    MAEConfig,
    MaskedAutoencoder,
    ViTConfig,
    ViTEncoder,
    autoencoder_from,
    detect_layout,
    encoder_from,
    from_hf_vitmae,
    hf_file_names,
    huge,
    infer_autoencoder_config,
    infer_encoder_config,
    initialise,
    to_hf_vit,
    to_hf_vitmae,
    to_official_mae,
    to_timm,
)
from mae_core.interop import encoder_prefixes


@pytest.fixture
def config():
    encoder = ViTConfig(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return MAEConfig(encoder=encoder, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def peer(config, hugging_face_peer):
    return hugging_face_peer(config)


def released_spelling(name: str) -> str:
    """The name that the released facebook/vit-mae-* files use (transformers 4)."""
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
        # position tables are computed on both sides, so they may differ by one step of float32 at 1
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


def test_an_unknown_layout_is_refused_and_the_known_ones_are_listed(config, peer):
    with pytest.raises(ConfigError, match=r"conv1.weight.*official_mae.*timm.*hf_vit .*hf_vitmae"):
        detect_layout(["conv1.weight", "layer1.0.conv1.weight"])
    ours = from_hf_vitmae(peer.state_dict(), config)
    with pytest.raises(ConfigError, match="no known layout"):
        detect_layout(ours)


def test_prefixes_of_wrappers_are_removed_when_all_names_carry_them(config, peer):
    official = official_names(peer.state_dict())
    expected = autoencoder_from(official, config, layout="official_mae").weights
    wrapped = {f"module.model.{name}": value for name, value in official.items()}
    assert detect_layout(wrapped) == "official_mae"
    found = autoencoder_from(wrapped, config, layout="official_mae").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    half = {f"module.{name}" if index % 2 else name: value for index, (name, value) in enumerate(official.items())}
    with pytest.raises(ConfigError, match="missing"):
        autoencoder_from(half, config, layout="official_mae")


def test_what_compilers_and_fsdp_add_inside_names_is_removed(config, peer):
    official = official_names(peer.state_dict())
    expected = autoencoder_from(official, config, layout="official_mae").weights
    wrapped = {f"module._orig_mod.{name.replace('s.0.', 's.0._orig_mod.')}": value for name, value in official.items()}
    found = autoencoder_from(wrapped, config, layout="official_mae").weights
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"norm\.bias twice"):
        detect_layout([*official, "_orig_mod.norm.bias"])


def test_prefixes_lead_to_each_encoder(config, peer, generator):
    hf, official = peer.state_dict(), official_names(peer.state_dict())
    ours = from_hf_vitmae(hf, config)
    for names, prefixes in (
        (official, [""]),
        ([f"a.b.{name}" for name in official], ["a.b."]),
        ([f"{part}.{name}" for part in ("teacher", "student") for name in official], ["student.", "teacher."]),
        (hf, [""]),  # an autoencoder's decoder stays with its encoder
        ([name for name in hf if not name.startswith("decoder.")], ["vit."]),
        ([*(name.replace("vit.", "encoder.") for name in hf if "decoder" not in name), "decoder.x"], ["encoder."]),
        (ours, [""]),
        ([name for name in ours if name.startswith("encoder.")], ["encoder."]),
        (["conv1.weight", "my_patch_embed.proj.weight"], []),
    ):
        assert list(encoder_prefixes(names)) == prefixes


def test_a_forged_block_number_is_refused_at_once(config):
    weights = timm_peer(config.encoder, positions="fixed").state_dict() | {"blocks.999999999.x": torch.zeros(1)}
    with pytest.raises(ConfigError, match=r"name block 999999999 of blocks and hold \d+ tensors"):
        infer_encoder_config(weights, layout="timm", num_heads=2)


def test_one_tensor_under_two_names_is_refused(config, peer):
    weights = hf_vit_peer(config.encoder).state_dict()
    weights["encoder.layer.0.output.dense.bias"] = weights["layers.0.mlp.fc2.bias"] + 1
    with pytest.raises(ConfigError, match=r"layers.0.mlp.fc2.bias twice"):
        encoder_from(weights, config.encoder, layout="hf_vit")


def test_a_missing_decoder_is_never_replaced(config, peer):
    official = official_names(peer.state_dict())
    encoder = {name: value for name, value in official.items() if not name.startswith(("decoder", "mask"))}
    for attempt in (
        lambda: autoencoder_from(encoder, config, layout="official_mae"),
        lambda: infer_autoencoder_config(encoder, layout="official_mae", num_heads=2),
    ):
        with pytest.raises(
            ConfigError, match=r"missing \['decoder_blocks.0.*a decoder with random weights is never added"
        ):
            attempt()
    with pytest.raises(ConfigError, match="layout timm holds an encoder alone"):
        autoencoder_from(encoder, config, layout="timm")
    half = {name: value for name, value in official.items() if name != "decoder_pred.bias"}
    with pytest.raises(ConfigError, match=r"missing \['decoder_pred.bias'\], unknown \[\]; give the config"):
        autoencoder_from(half, config, layout="official_mae")


@pytest.mark.parametrize(
    ("layout", "name"), [("timm", "reg_token"), ("hf_vit", "decoder.decoder_norm.bias"), ("timm", "blocks.0.gamma_1")]
)
def test_only_declared_names_may_accompany_an_encoder(config, layout, name):
    peer = timm_peer(config.encoder, positions="fixed") if layout == "timm" else hf_vit_peer(config.encoder)
    weights = peer.state_dict() | {name: torch.zeros(16)}
    with pytest.raises(ConfigError, match=rf"missing \[\], unknown \['{name}'\]"):
        encoder_from(weights, replace(config.encoder, positions="learned"), layout=layout)


def test_heads_are_left_out_and_reported(config):
    weights = timm_peer(config.encoder, positions="fixed", num_classes=5).state_dict()
    assert encoder_from(weights, config.encoder, layout="timm").left_out == ("head.bias", "head.weight")
    pooled = timm_peer(config.encoder, positions="fixed", global_pool="avg").state_dict()
    with pytest.raises(ConfigError, match=r"missing \['norm.bias', 'norm.weight'\].*fc_norm normalises the mean"):
        encoder_from(pooled, config.encoder, layout="timm")


def test_shapes_and_dtypes_must_fit_the_config(config):
    weights = timm_peer(config.encoder, positions="fixed").state_dict()
    with pytest.raises(ConfigError, match=r"mlp.fc1.weight of shape \(64, 16\) should be \(32, 16\)"):
        encoder_from(weights, replace(config.encoder, mlp_ratio=2.0), layout="timm")
    with pytest.raises(ConfigError, match=r"proj.weight of shape \(16, 3, 4, 4\) should be \(16, 3, 8, 8\)"):
        encoder_from(weights, replace(config.encoder, patch_size=8), layout="timm")
    with pytest.raises(ConfigError, match=r"missing \[\], unknown \['blocks.1.attn.proj.bias'"):
        encoder_from(weights, replace(config.encoder, depth=1), layout="timm")
    for image_size, shape in (((32, 32), "65"), ((20, 16), "21")):
        with pytest.raises(ConfigError, match=rf"pos_embed of shape \(1, 17, 16\) should be \[1, {shape}, D\]"):
            encoder_from(weights, replace(config.encoder, image_size=image_size), layout="timm")
        with pytest.raises(ConfigError, match=rf"should be \[1, {shape}, D\]"):
            infer_encoder_config(weights, layout="timm", num_heads=2, image_size=image_size)
    weights["norm.bias"] = weights["norm.bias"].to(torch.int8)
    with pytest.raises(ConfigError, match=r"norm.bias is torch.int8"):
        encoder_from(weights, config.encoder, layout="timm")


def test_trained_positions_are_kept_however_little_they_moved(config):
    weights = timm_peer(config.encoder, positions="fixed").state_dict()
    for moved, positions in ((0.0, "sine_cosine"), (1e-6, "sine_cosine"), (1e-4, "learned")):
        weights["pos_embed"] = table_by_definition((4, 4), 16)
        weights["pos_embed"][0, 5, 3] += moved
        assert infer_encoder_config(weights, layout="timm", num_heads=2).positions == positions
    with pytest.raises(ConfigError, match=r"pos_embed.*trained positions need an encoder with positions='learned'"):
        encoder_from(weights, config.encoder, layout="timm")
    learned = replace(config.encoder, positions="learned")
    assert torch.equal(encoder_from(weights, learned, layout="timm").weights["positions"], weights["pos_embed"][0, 1:])


def test_the_class_tokens_position_is_added_to_the_token(config):
    for positions in ("fixed", "trained"):
        weights = timm_peer(config.encoder, positions=positions).state_dict()
        weights["pos_embed"][0, 0] = torch.arange(16.0)
        encoder = replace(config.encoder, positions="sine_cosine" if positions == "fixed" else "learned")
        ours = encoder_from(weights, encoder, layout="timm").weights
        assert torch.equal(ours["cls_token"], weights["cls_token"] + torch.arange(16.0))
        assert torch.equal(to_timm(ours, encoder)["pos_embed"][0, 0], torch.zeros(16))


def test_a_fixed_table_reveals_its_grid_and_a_trained_one_does_not(config):
    encoder = replace(config.encoder, image_size=(8, 32))  # 2 x 8 patches, as many as 4 x 4
    weights = timm_peer(encoder, positions="fixed").state_dict()
    assert infer_encoder_config(weights, layout="timm", num_heads=2) == encoder
    trained = timm_peer(encoder, positions="trained").state_dict()
    assert infer_encoder_config(trained, layout="timm", num_heads=2).grid == (4, 4)
    assert infer_encoder_config(trained, layout="timm", num_heads=2, image_size=(8, 32)).grid == (2, 8)
    odd = timm_peer(replace(encoder, image_size=(8, 12)), positions="trained").state_dict()
    with pytest.raises(ConfigError, match="6 patches, which is no square: give the image_size"):
        infer_encoder_config(odd, layout="timm", num_heads=2)


def test_num_heads_come_from_the_named_sizes_or_the_caller():
    shape = {"image_size": (28, 28), "patch_size": 14, "depth": 1}
    for width, heads in ((192, 3), (1280, 16)):
        config = ViTConfig(**shape, embed_dim=width, num_heads=heads)
        assert infer_encoder_config(timm_peer(config, positions="fixed").state_dict(), layout="timm") == config
    config = ViTConfig(**shape, embed_dim=512, num_heads=8)
    weights = timm_peer(config, positions="fixed").state_dict()
    with pytest.raises(ConfigError, match=r"num_heads cannot be read from weights of width 512.*would be 8"):
        infer_encoder_config(weights, layout="timm")


@pytest.mark.parametrize(("width", "hidden"), [(384, 1536), (384, 1000), (384, 1), (44, 15), (52, 126)])
def test_every_hidden_width_survives_the_ratio(width, hidden):
    # 44 * (15 / 44) is 14.99... in binary fractions
    config = ViTConfig(
        image_size=(8, 8), patch_size=4, embed_dim=width, depth=1, num_heads=2, mlp_ratio=(hidden + 0.5) / width
    )
    weights = timm_peer(config, positions="fixed").state_dict()
    assert infer_encoder_config(weights, layout="timm", num_heads=2).mlp_dim == config.mlp_dim == hidden


def test_pixel_scale_and_epsilon_come_from_the_caller(config):
    weights = hf_vit_peer(config.encoder, positions="fixed").state_dict()
    said = {"layer_norm_eps": 1e-12, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3, "num_heads": 2}
    found = infer_encoder_config(weights, layout="hf_vit", **said)
    assert found == replace(config.encoder, layer_norm_eps=1e-12, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)


def test_other_kinds_of_patches_and_positions_are_refused(config):
    weights = timm_peer(config.encoder, positions="fixed").state_dict()
    for name, value, text in (
        ("patch_embed.proj.weight", torch.zeros(16, 3, 4, 2), r"no kernel \[D, C, P, P\] of square patches"),
        ("pos_embed", torch.zeros(1, 17, 8), r"no table \[1, 1 \+ L, 16\]"),
        ("pos_embed", torch.zeros(17, 16), r"no table"),
    ):
        with pytest.raises(ConfigError, match=text):
            infer_encoder_config(weights | {name: value}, layout="timm", num_heads=2)
    del weights["pos_embed"]
    with pytest.raises(ConfigError, match=r"incomplete: missing \['pos_embed'\]"):
        infer_encoder_config(weights, layout="timm", num_heads=2)


def test_what_other_layouts_cannot_hold_is_refused(config, generator):
    several = replace(config.encoder, cls_tokens=8)
    encoder = ViTEncoder(several)
    initialise(encoder, generator=generator)
    for export in (to_timm, to_hf_vit):
        with pytest.raises(ConfigError, match=r"cls_tokens=8.*one class token"):
            export(encoder.state_dict(), several)
    for export in (to_hf_vitmae, to_official_mae):
        for change, text in (
            ({"encoder": several}, "cls_tokens=8"),
            ({"encoder_input": "all"}, "encoder_input='all'"),
            ({"target": "pca", "pca_components": 8}, "target='pca'"),
        ):
            with pytest.raises(ConfigError, match=text):
                export({}, replace(config, **change))


def test_learned_positions_of_an_autoencoder_survive_a_round_trip(config, generator):
    learned = replace(config, encoder=replace(config.encoder, positions="learned"))
    model = MaskedAutoencoder(learned, generator=generator)
    model.encoder.positions.data += 1.0
    back = from_hf_vitmae(to_hf_vitmae(model.state_dict(), learned), learned)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"position_embeddings.*trained positions"):
        from_hf_vitmae(to_hf_vitmae(model.state_dict(), learned), config)


def test_file_names_are_those_that_transformers_writes(config, peer, tmp_path):
    for index, (model, ours) in enumerate(
        (
            (peer, to_hf_vitmae(from_hf_vitmae(peer.state_dict(), config), config)),
            (hf_vit_peer(config.encoder), hf_vit_peer(config.encoder).state_dict()),
        )
    ):
        model.save_pretrained(tmp_path / str(index))
        assert hf_file_names(ours).keys() == load_file(tmp_path / str(index) / "model.safetensors").keys()


def test_huge_has_the_shapes_of_the_released_file():
    shapes = {name: tuple(value.shape) for name, value in to_timm_on_meta(huge()).items()}
    assert shapes["pos_embed"] == (1, 257, 1280)
    assert shapes["patch_embed.proj.weight"] == (1280, 3, 14, 14)
    assert shapes["blocks.31.attn.qkv.weight"] == (3840, 1280)


def to_timm_on_meta(config):
    with torch.device("meta"):
        return to_timm(ViTEncoder(config).state_dict(), config)
