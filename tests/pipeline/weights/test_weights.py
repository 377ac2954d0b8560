"""Foreign weight files are read without running them, imported with equal outputs, and exported so that their programs load them.

Tolerance of outputs: see tests/mae_core/test_interop_parity.py."""

import argparse
import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import transformers
from peer_kit import hf_vit_peer, hf_vitmae_peer, official_names, timm_peer
from safetensors import safe_open
from safetensors.torch import save_file

from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, ViTEncoder, base, huge, initialise, large, small, tiny
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.weights import (
    export_autoencoder,
    export_encoder,
    import_autoencoder,
    import_encoder,
    read_encoder,
    read_foreign_weights,
    read_weights,
)
from pipeline.weights.exports import timm_model

TOLERANCE = {"rtol": 0, "atol": 3e-5}
HALF = {"pixel_mean": (0.5, 0.5, 0.5), "pixel_std": (0.5, 0.5, 0.5)}


def encoder_config(side=32, **changes):
    shape = {"image_size": (side, side), "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return ViTConfig(**{**shape, **changes})


def mae_config(side=32, **changes):
    decoder = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAEConfig(**{"encoder": encoder_config(side), **decoder, **changes})


def pixels_for(config):
    return torch.randn(2, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tokens_of(config, weights):
    encoder = ViTEncoder(config)
    encoder.load_state_dict(weights, strict=True)
    return encoder(pixels_for(config))


def random_weights(config):
    generator = torch.Generator().manual_seed(5)
    if isinstance(config, MAEConfig):
        module = MaskedAutoencoder(config, generator=generator)
    else:
        module = ViTEncoder(config)
        initialise(module, generator=generator)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dict(module.state_dict())


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Reading


def official_checkpoint(path, config, *, legacy=False, **arguments):
    """Write what a pretraining script leaves: weights, optimiser, and its arguments as a namespace that contains paths."""
    weights = official_names(hf_vitmae_peer(config).state_dict())
    content = {
        "model": weights,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "args": argparse.Namespace(output_dir=Path("/tmp/out"), model="mae_vit_base_patch16", **arguments),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return weights


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_its_arguments_is_read(tmp_path, legacy):
    weights = official_checkpoint(tmp_path / "a.pth", mae_config(), legacy=legacy, mask_ratio=0.5, norm_pix_loss=True)
    found = read_foreign_weights(tmp_path / "a.pth")
    assert equal(found.state_dict, weights)
    assert found.arguments == {"model": "mae_vit_base_patch16", "mask_ratio": 0.5, "norm_pix_loss": True}
    assert found.left_out == ("args", "epoch", "optimizer")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed only while that file is read


def test_each_kind_of_file_and_folder_is_read(tmp_path):
    peer = hf_vit_peer(encoder_config())
    expected = dict(peer.state_dict())
    torch.save(expected, tmp_path / "bare.pt")
    torch.save({"state_dict": expected}, tmp_path / "wrapped.bin")
    save_file(expected, tmp_path / "plain.safetensors")
    for name in ("bare.pt", "wrapped.bin", "plain.safetensors"):
        assert equal(read_foreign_weights(tmp_path / name).state_dict, expected)

    (tmp_path / "old").mkdir()
    torch.save(expected, tmp_path / "old/pytorch_model.bin")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("old", "shards"):
        weights = import_encoder(tmp_path / folder, num_heads=4, layer_norm_eps=1e-6).weights
        assert equal(weights, import_encoder(tmp_path / "bare.pt", num_heads=4).weights)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle", "inside the namespace"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, kind):
    path, mark = tmp_path / "a.pth", tmp_path / "owned"
    evil = Evil(mark)
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"model": evil}, protocol=2))
    elif kind == "inside the namespace":
        torch.save({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(evil=evil)}, path)
    else:
        torch.save({"model": {"w": evil}}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        DataError, match=r"a.pth asks for posix.system, which is not a tensor.*save its model.state_dict"
    ) as caught:
        read_foreign_weights(path)
    assert not mark.exists()
    assert "weights_only" not in str(caught.value)  # torch's message tells how to run the file
    with path.open("rb") as file:  # the file is really malicious: without the guard, torch runs it
        torch.load(file, weights_only=False) if kind != "bare pickle" else pickle.load(file)
    assert mark.exists()


def test_a_whole_model_is_refused_with_the_way_out(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(DataError, match=r"asks for torch.nn.modules.linear.Linear.*as .safetensors"):
        read_foreign_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_truncated_anywhere_is_one_clear_line(tmp_path, kind):
    weights = timm_peer(encoder_config(), positions="fixed").state_dict()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    read_foreign_weights(path)
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(DataError, match=r"download it again") as caught:
            read_foreign_weights(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError):
        read_foreign_weights(path)


def test_anything_but_a_dict_of_tensors_is_refused_clearly(tmp_path):
    path = tmp_path / "a.pth"
    for content, text in (
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        (torch.ones(1), "holds a Tensor, not a dict"),
        ({"model": {"w": torch.ones(1), "epoch": 3}}, r"'model' is not a dict of tensors: 'epoch' has type int"),
        ({"epoch": 3, "weights": {"w": torch.ones(1)}}, r"'epoch' has type int.*under one of model, state_dict"),
        ({"model": {}}, "holds no tensors"),
        ({}, "holds no tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(DataError, match=text):
            read_foreign_weights(path)
    path.write_bytes(pickle.dumps({"a": 1}))  # a pickle protocol that torch.save never writes
    with pytest.raises(DataError, match=r"not a file of torch.save"):
        read_foreign_weights(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(DataError, match="TorchScript program"):
        read_foreign_weights(path)


def test_a_missing_file_is_reported_clearly(tmp_path):
    with pytest.raises(DataError, match=r"nothing.pth does not exist"):
        read_foreign_weights(tmp_path / "nothing.pth")
    with pytest.raises(DataError, match=r"holds none of model.safetensors"):
        read_foreign_weights(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"\x01\x02")
    with pytest.raises(DataError, match=r"a.npz \(2 bytes\) is not a weight file"):
        read_foreign_weights(tmp_path / "a.npz")


def test_an_index_of_shards_is_not_trusted(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"w": torch.ones(1)}, tmp_path / "one.safetensors")
    for content, text in (
        ({"weight_map": {"w": "../one.safetensors"}}, "points outside its folder"),
        ({"weight_map": {"w": "/etc/passwd"}}, "points outside its folder"),
        ({"weight_map": {"w": "two.safetensors"}}, "not in its folder"),
        (
            {"weight_map": {"w": "one.safetensors", "v": "one.safetensors"}},
            r"tensors that no file holds \(1, such as 'v'\)",
        ),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(DataError, match=text):
            read_foreign_weights(tmp_path)
    index.write_text('{"weight_map"')
    with pytest.raises(DataError, match="not readable JSON"):
        read_foreign_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(DataError, match="not a mapping"):
        read_foreign_weights(tmp_path)


# Importing


@pytest.mark.parametrize("side", [224, 96])
@torch.no_grad()
def test_official_encoder_file(tmp_path, side):
    config = encoder_config(side)
    peer = timm_peer(config, positions="fixed")
    torch.save({"model": peer.state_dict()}, tmp_path / "mae_pretrain.pth")
    found, weights, report = import_encoder(tmp_path / "mae_pretrain.pth", num_heads=4)
    assert found == config
    torch.testing.assert_close(tokens_of(found, weights), peer.forward_features(pixels_for(config)), **TOLERANCE)
    assert report.lines() == [
        f"{tmp_path}/mae_pretrain.pth: layout timm",
        "left out: nothing",
        f"assumed: layer_norm_eps=1e-06, pixel_mean={config.pixel_mean}, pixel_std={config.pixel_std}",
    ]
    with pytest.raises(
        ConfigError, match=r"mae_pretrain.pth: .*missing \['decoder_blocks.0.*a decoder with random weights"
    ):
        import_autoencoder(tmp_path / "mae_pretrain.pth", num_heads=4, decoder_num_heads=2)


@pytest.mark.parametrize("side", [224, 96])
@pytest.mark.parametrize("kind", ["official", "huggingface"])
@torch.no_grad()
def test_autoencoder_file(tmp_path, kind, side):
    config = mae_config(side, mask_ratio=0.5, target="raw", encoder=encoder_config(side, layer_norm_eps=1e-6, **HALF))
    peer = hf_vitmae_peer(config)
    if kind == "official":
        official_checkpoint(tmp_path / "a.pth", config, mask_ratio=0.5, norm_pix_loss=False)
        stated = {"num_heads": 4, "decoder_num_heads": 2, **HALF}
        found, weights, report = import_autoencoder(tmp_path / "a.pth", **stated)
        assert report.left_out == ("args", "epoch", "optimizer")
        assert report.assumed == ("layer_norm_eps=1e-06",)
    else:
        peer.save_pretrained(tmp_path)
        scale = {"image_mean": HALF["pixel_mean"], "image_std": HALF["pixel_std"]}
        transformers.ViTImageProcessor(**scale).save_pretrained(tmp_path)
        found, weights, report = import_autoencoder(tmp_path)
        assert report == (str(tmp_path), "hf_vitmae", (), (), ())
    assert found == config
    model = MaskedAutoencoder(found, generator=torch.Generator())
    model.load_state_dict(weights, strict=True)
    pixels, noise = pixels_for(config.encoder), torch.rand(2, config.encoder.num_patches)
    ours, theirs = model(pixels, noise), peer(pixels, noise=noise)
    ids = ours.masked.ids_hidden[..., None].expand_as(ours.prediction)
    torch.testing.assert_close(ours.prediction, theirs.logits.gather(1, ids), **TOLERANCE)
    torch.testing.assert_close(ours.loss.mean(), theirs.loss, rtol=2e-6, atol=0)
    encoder = import_encoder(tmp_path if kind == "huggingface" else tmp_path / "a.pth", num_heads=4, **HALF)
    assert encoder.config == config.encoder
    assert "mask_token" in " ".join(encoder.report.left_out)


@pytest.mark.parametrize("image_size", [(224, 224), (96, 160)], ids=["224", "96 x 160"])
@torch.no_grad()
def test_a_hugging_face_folder_states_what_shapes_do_not(tmp_path, image_size):
    config = encoder_config(image_size=image_size, positions="learned", layer_norm_eps=1e-12, num_heads=2, **HALF)
    peer = hf_vit_peer(config, kind="ViTForImageClassification")
    peer.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    found, weights, report = import_encoder(tmp_path)
    assert found == config
    assert report == (str(tmp_path), "hf_vit", ("classifier.bias", "classifier.weight"), (), ())
    theirs = peer.vit(pixels_for(config)).last_hidden_state
    torch.testing.assert_close(tokens_of(found, weights), theirs, **TOLERANCE)
    assert import_encoder(tmp_path, layer_norm_eps=1e-6).config == replace(config, layer_norm_eps=1e-6)


@pytest.mark.parametrize("side", [224, 96])
@torch.no_grad()
def test_a_timm_folder_states_what_shapes_do_not(tmp_path, side):
    config = encoder_config(side, positions="learned", **HALF)  # timm's augreg models expect 0.5, and state it
    peer = timm_peer(config, positions="trained", num_classes=3)
    timm.models.save_for_hf(peer, tmp_path, safe_serialization=True)
    found, weights, report = import_encoder(tmp_path)
    assert found == config
    assert report.left_out == ("head.bias", "head.weight")
    assert report.assumed == ("layer_norm_eps=1e-06",)
    torch.testing.assert_close(tokens_of(found, weights), peer.forward_features(pixels_for(config)), **TOLERANCE)


def test_half_precision_becomes_float32(tmp_path):
    config = encoder_config()
    peer = timm_peer(config, positions="fixed").half()
    torch.save(peer.state_dict(), tmp_path / "a.pth")
    found, weights, _ = import_encoder(tmp_path / "a.pth", num_heads=4)
    assert found == config
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert torch.equal(weights["norm.weight"], peer.norm.weight.float())


def test_wrong_sizes_and_unusable_configs_name_the_file(tmp_path):
    config = encoder_config(positions="learned")
    hf_vit_peer(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: .*should be \[1, 10, D\] for image_size=\(48, 48\)"):
        import_encoder(tmp_path, image_size=(48, 48))
    stated = json.loads((tmp_path / "config.json").read_text())
    for change, error, text in (
        ({"hidden_act": "quick_gelu"}, ConfigError, "hidden_act='quick_gelu'"),
        ({"num_attention_heads": "many"}, DataError, "num_heads"),
        ({"image_size": [1, 2, 3]}, DataError, "image_size"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**stated, **change}))
        with pytest.raises(error, match=rf"^{tmp_path}: .*{text}"):
            import_encoder(tmp_path)
    del stated["layer_norm_eps"], stated["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="num_heads=12"):  # transformers' default
        import_encoder(tmp_path)
    assert import_encoder(tmp_path, num_heads=4).config.layer_norm_eps == 1e-12
    timm.models.save_for_hf(timm_peer(encoder_config(), positions="fixed"), tmp_path / "timm", safe_serialization=True)
    stated = json.loads((tmp_path / "timm/config.json").read_text())
    stated["architecture"] = "vit_base_patch16_clip_quickgelu_224"
    (tmp_path / "timm/config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match="uses another activation"):
        import_encoder(tmp_path / "timm")


# Exporting


EXPORTED = {
    "named size at 224, shallow": encoder_config(224, embed_dim=192, num_heads=3, depth=1),
    "96": encoder_config(96, **HALF),
    "learned, 64 x 96, one channel": encoder_config(
        image_size=(64, 96), positions="learned", in_channels=1, pixel_mean=(0.4,), pixel_std=(0.2,)
    ),
}


@pytest.mark.parametrize("to", ["timm", "huggingface", "safetensors"])
@pytest.mark.parametrize("case", EXPORTED)
@torch.no_grad()
def test_exported_encoder(tmp_path, case, to):
    config = EXPORTED[case]
    weights = random_weights(config)
    files = export_encoder(FileStore(tmp_path), weights, config, to=to)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    tokens, pixels = tokens_of(config, weights), pixels_for(config)
    if to == "timm":
        peer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(peer.forward_features(pixels), tokens, **TOLERANCE)
        torch.testing.assert_close(peer(pixels), tokens[:, 0], **TOLERANCE)  # the feature that timm's users get
        data = timm.data.resolve_model_data_config(peer)
        assert data["input_size"] == (config.in_channels, *config.image_size)
        assert (tuple(data["mean"]), tuple(data["std"])) == (config.pixel_mean, config.pixel_std)
    elif to == "huggingface":
        peer, info = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(peer.eval()(pixels).last_hidden_state, tokens, **TOLERANCE)
        # the same names as transformers writes, and the metadata that its version 4 requires
        transformers.ViTModel(peer.config, add_pooling_layer=False).save_pretrained(tmp_path / "theirs")
        with (
            safe_open(tmp_path / "model.safetensors", "pt") as ours,
            safe_open(tmp_path / "theirs/model.safetensors", "pt") as theirs,
        ):
            assert set(ours.keys()) == set(theirs.keys())
            assert ours.metadata() == {"format": "pt"}
        processor = transformers.ViTImageProcessor.from_pretrained(tmp_path)
        assert tuple(processor.image_mean) == config.pixel_mean
        assert (processor.size["height"], processor.size["width"]) == config.image_size
        assert transformers.AutoConfig.from_pretrained(tmp_path).layer_norm_eps == config.layer_norm_eps
    else:
        read = read_encoder(FileStore(tmp_path))
        assert read[0] == config
        assert torch.equal(tokens_of(*read), tokens)
    found, back, report = import_encoder(tmp_path)
    assert found == config
    assert equal(back, weights)
    assert report.left_out == ()
    assert report.assumed == (("layer_norm_eps=1e-06",) if to == "timm" else ())


@pytest.mark.parametrize("side", [224, 96])
@pytest.mark.parametrize("target", ["raw", "normalised"])
@torch.no_grad()
def test_exported_autoencoder(tmp_path, side, target):
    config = mae_config(side, target=target, mask_ratio=0.5, decoder_mlp_ratio=2.0)
    weights = random_weights(config)
    export_autoencoder(FileStore(tmp_path / "hf"), weights, config, to="huggingface")
    peer, info = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    model = MaskedAutoencoder(config, generator=torch.Generator())
    model.load_state_dict(weights)
    pixels, noise = pixels_for(config.encoder), torch.rand(2, config.encoder.num_patches)
    theirs, ours = peer.eval()(pixels, noise=noise), model(pixels, noise)
    assert torch.equal(ours.masked.mask, theirs.mask)
    ids = ours.masked.ids_hidden[..., None].expand_as(ours.prediction)
    torch.testing.assert_close(ours.prediction, theirs.logits.gather(1, ids), **TOLERANCE)
    torch.testing.assert_close(ours.loss.mean(), theirs.loss, rtol=2e-6, atol=0)
    found = import_autoencoder(tmp_path / "hf")
    assert found.config == config
    assert equal(found.weights, weights)

    export_autoencoder(FileStore(tmp_path / "own"), weights, config, to="safetensors")
    assert equal(read_weights(FileStore(tmp_path / "own"), "model.safetensors"), weights)
    assert import_encoder(tmp_path / "own").config == config.encoder


@pytest.mark.parametrize("to", ["timm", "huggingface", "autoencoder"])
@torch.no_grad()
def test_the_readme_of_an_export_works_as_written(tmp_path, to, monkeypatch, capfd):
    config = mae_config()
    weights = random_weights(config)
    if to == "autoencoder":
        export_autoencoder(FileStore(tmp_path), weights, config, to="huggingface")
    else:
        encoder = {name[8:]: value for name, value in weights.items() if name.startswith("encoder.")}
        export_encoder(FileStore(tmp_path), encoder, config.encoder, to=to)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == (2 if to == "timm" else 1)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names = {"pixels": pixels_for(config.encoder)}
        exec(block, names)
        if to != "autoencoder":
            tokens = names["tokens"] if "tokens" in names else names["model"].forward_features(names["pixels"])
            encoder = {name[8:]: value for name, value in weights.items() if name.startswith("encoder.")}
            torch.testing.assert_close(tokens, tokens_of(config.encoder, encoder), **TOLERANCE)
    assert "newly initialized" not in capfd.readouterr().err


def test_named_sizes_have_their_names_in_timm():
    for size in (tiny, small, base, large, huge):
        name, arguments = timm_model(size())
        assert arguments == {}
        with torch.device("meta"):
            peer = timm.create_model(name, num_classes=0)
            ours = ViTEncoder(size())
        assert sum(value.numel() for value in peer.parameters()) - peer.pos_embed.numel() == sum(
            value.numel() for value in ours.parameters()
        )
        assert (peer.blocks[0].attn.num_heads, peer.norm.eps) == (size().num_heads, 1e-6)
    assert timm_model(base(image_size=(384, 384))) == ("vit_base_patch16_224", {"img_size": [384, 384]})


def test_what_another_program_cannot_represent_is_not_written(tmp_path):
    store = FileStore(tmp_path / "out")
    config = encoder_config()
    weights = random_weights(config)
    for to, change, text in (
        ("timm", {"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-12: timm builds"),
        ("timm", {"cls_tokens": 2}, "cls_tokens=2"),
        ("huggingface", {"cls_tokens": 2}, "cls_tokens=2"),
        ("onnx", {}, "to='onnx' is unknown: write one of timm"),
    ):
        with pytest.raises(ConfigError, match=text):
            export_encoder(store, weights, replace(config, **change), to=to)
    rectangle = mae_config(encoder=encoder_config(image_size=(32, 64)))
    with pytest.raises(ConfigError, match="only square images"):
        export_autoencoder(store, random_weights(rectangle), rectangle, to="huggingface")
    with pytest.raises(ConfigError, match="to='timm' is unknown"):
        export_autoencoder(store, {}, rectangle, to="timm")
    assert not (tmp_path / "out").exists()


def test_our_own_folder_takes_no_overrides_and_is_checked(tmp_path):
    config = encoder_config()
    export_encoder(FileStore(tmp_path), random_weights(config), config, to="safetensors")
    with pytest.raises(ConfigError, match="sets num_heads itself"):
        import_encoder(tmp_path, num_heads=2)
    stated = json.loads((tmp_path / "config.json").read_text())
    for content, text in (
        ({"encoder": {**stated["encoder"], "colour": 1}}, "does not describe an encoder"),
        ({"encoder": {**stated["encoder"], "num_heads": 5}}, "num_heads=5"),
        ({}, "'encoder'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=text):
            import_encoder(tmp_path)
