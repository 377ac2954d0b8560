"""Weights as trainers, wrappers and downloads leave them: taken where their meaning is clear, else refused by what they are."""

import argparse
import gzip
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_kit import hf_vit_peer, hf_vitmae_peer, official_names, timm_peer
from safetensors.torch import save_file

from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, ViTEncoder, initialise
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.weights import (
    export_autoencoder,
    export_encoder,
    import_autoencoder,
    import_encoder,
    read_foreign_weights,
)

CONFIG = ViTConfig(image_size=(32, 32), patch_size=16, embed_dim=32, depth=2, num_heads=4)
WHOLE = MAEConfig(encoder=CONFIG, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)
HEADS = {"num_heads": 4}


@pytest.fixture(scope="module")
def vit():
    """An encoder's state dict as timm names it."""
    return dict(timm_peer(CONFIG, positions="fixed").state_dict())


@pytest.fixture(scope="module")
def plain(vit, tmp_path_factory):
    """What importing that state dict gives, from a file without any wrapper."""
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save(vit, path)
    return import_encoder(path, **HEADS).weights


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(path, error=(ConfigError, DataError), **options):
    """The one line with which a file is refused."""
    with pytest.raises(error) as caught:
        import_encoder(path, **options)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert str(path) in line
    return line


# Wrappers


WRAPPED = {
    "torch.compile": lambda vit: {"model": prefixed("_orig_mod.", vit)},
    "DDP of a compiled model": lambda vit: {"model": prefixed("module._orig_mod.", vit)},
    "a compiled DDP of a model that holds a model": lambda vit: prefixed("_orig_mod.module.model.", vit),
    "each block compiled": lambda vit: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in vit.items()
    },
    "FSDP around each block, inside activation checkpointing": lambda vit: {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module."): value
        for name, value in vit.items()
    },
    "DeepSpeed, ZeRO 1 and 2": lambda vit: {
        "module": vit,
        "optimizer": None,
        "param_shapes": [OrderedDict((name, value.shape) for name, value in vit.items())],
        "ds_version": "0.19",
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 8},
    },
    "the average alone": lambda vit: {"model_ema": vit, "epoch": 3},
    "torch's AveragedModel": lambda vit: {"model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.", vit)}},
    "Lightning": lambda vit: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": {**prefixed("model.", vit), "criterion.weight": torch.ones(3), "fc.bias": torch.ones(2)},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5), "best_model_path": "a.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1)}}}],
        "hyper_parameters": {"lr": 0.1},
    },
    "Lightning, net": lambda vit: {"state_dict": prefixed("net.", vit)},
    "a classifier around a backbone": lambda vit: {
        **prefixed("backbone.", vit),
        "head.weight": torch.ones(5, 32),
        "head.bias": torch.ones(5),
    },
    "a module called encoder": lambda vit: {
        "state_dict": {**prefixed("encoder.", vit), **prefixed("decoder.", {"a": torch.ones(1)})}
    },
    "a module called vit": lambda vit: {**prefixed("model.vit.", vit), "model.fc.weight": torch.ones(2, 32)},
    "mappings within mappings": lambda vit: {"state": {"model": prefixed("model.", vit), "rank": 0}, "rng": []},
    "moments under the model's names": lambda vit: {
        "net": vit,
        "optimizer": {"exp_avg": {name: torch.zeros_like(value) for name, value in vit.items()}},
    },
    "a head for no classes": lambda vit: {**vit, "head.weight": torch.ones(0, 32), "head.bias": torch.ones(0)},
    "beside the tensors, other values": lambda vit: {**vit, "epoch": 3, "arch": "vit"},
    "scores as NumPy's numbers": lambda vit: {
        "model": vit,
        "best": np.float64(0.5),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=np.float32(1.0)),
    },
}


@pytest.mark.parametrize("case", WRAPPED)
def test_weights_of_wrappers_are_taken(tmp_path, vit, plain, case):
    torch.save(WRAPPED[case](vit), tmp_path / "a.pth")
    found, weights, report = import_encoder(tmp_path / "a.pth", **HEADS)
    assert found == CONFIG
    assert equal(weights, plain)
    assert report.layout == "timm"
    assert report.notes == ()


@pytest.mark.parametrize(
    "name", ["model_best.pth.tar", "last.ckpt", "mp_rank_00_model_states.pt", "weights", "a.safetensors"]
)
def test_the_content_of_a_file_counts_and_not_its_name(tmp_path, vit, plain, name):
    torch.save(WRAPPED["Lightning"](vit), tmp_path / name)
    assert equal(import_encoder(tmp_path / name, **HEADS).weights, plain)
    save_file(vit, tmp_path / name)
    assert equal(import_encoder(tmp_path / name, **HEADS).weights, plain)


def test_what_lies_beside_the_encoder_is_reported(tmp_path, vit):
    torch.save(WRAPPED["Lightning"](vit), tmp_path / "a.ckpt")
    entries = ("callbacks", "criterion.weight", "epoch", "fc.bias")
    assert import_encoder(tmp_path / "a.ckpt", **HEADS).report.left_out[:4] == entries
    torch.save(WRAPPED["mappings within mappings"](vit), tmp_path / "a.ckpt")
    assert import_encoder(tmp_path / "a.ckpt", **HEADS).report.left_out == ("rng", "state.rank")


@pytest.mark.parametrize("kind", ["hf_vit", "hf_vitmae", "official_mae"])
def test_wrapped_files_of_each_layout_are_taken(tmp_path, kind):
    classifier = hf_vit_peer(CONFIG, kind="ViTForImageClassification", positions="fixed").state_dict()
    whole = hf_vitmae_peer(WHOLE).state_dict()
    weights = {"hf_vit": classifier, "hf_vitmae": whole, "official_mae": official_names(whole)}[kind]
    for name, content in (("plain", weights), ("wrapped", {"state_dict": prefixed("module._orig_mod.net.", weights)})):
        torch.save(content, tmp_path / name)
    one, other = import_encoder(tmp_path / "plain", **HEADS), import_encoder(tmp_path / "wrapped", **HEADS)
    assert equal(one.weights, other.weights)
    assert one.report.layout == other.report.layout == kind
    if kind != "hf_vit":
        options = {**HEADS, "decoder_num_heads": 2}
        decoders = [import_autoencoder(tmp_path / name, **options).weights for name in ("plain", "wrapped")]
        assert equal(*decoders)


def test_hugging_faces_encoder_in_a_module_with_other_parts(tmp_path):
    peer = hf_vit_peer(CONFIG, positions="fixed").state_dict()
    torch.save(peer, tmp_path / "plain.pth")
    torch.save({**prefixed("model.vit.", peer), "model.fc.weight": torch.ones(2, 32)}, tmp_path / "wrapped.pth")
    one, other = (import_encoder(tmp_path / name, **HEADS) for name in ("plain.pth", "wrapped.pth"))
    assert equal(one.weights, other.weights)
    assert "fc.weight" in " ".join(other.report.left_out)


def test_of_several_models_the_plain_one_is_taken_and_the_others_are_named(tmp_path, vit, plain):
    average = {name: value + 1 for name, value in vit.items()}
    path = tmp_path / "a.pth"
    for content, label, other in (
        ({"model": vit, "model_ema": prefixed("module.", average)}, "model", "model_ema.module"),
        ({"state_dict": vit, "state_dict_ema": average}, "state_dict", "state_dict_ema"),
        ({"state_dict": prefixed("net.", vit) | prefixed("ema_net.", average)}, "state_dict.net", "state_dict.ema_net"),
        ({**vit, "ema": average}, "", "ema"),
    ):
        torch.save(content, path)
        weights, report = import_encoder(path, **HEADS)[1:]
        assert equal(weights, plain)
        taken = repr(label) if label else "the top level ('')"
        assert report.lines()[-1] == f"taken: {taken}; also in the file: {other!r} (choose with prefix=...)"
        chosen = import_encoder(path, prefix=other, **HEADS).weights
        assert torch.equal(chosen["norm.bias"], plain["norm.bias"] + 1)
        assert equal(import_encoder(path, prefix=label, **HEADS).weights, plain)
    torch.save({"model": vit, "model_ema": prefixed("module.", average)}, path)
    assert torch.equal(import_encoder(path, prefix="model_ema", **HEADS).weights["norm.bias"], plain["norm.bias"] + 1)


def test_several_models_of_equal_rank_are_a_choice(tmp_path, vit, plain):
    path = tmp_path / "dino.pth"
    head = {"head.mlp.0.weight": torch.ones(2, 2)}
    torch.save(
        {
            "student": prefixed("module.", prefixed("backbone.", vit) | head),
            "teacher": {**prefixed("backbone.", vit), **head},
            "epoch": 9,
        },
        path,
    )
    line = refusal(path, ConfigError)
    assert "holds 2 encoders, at 'student.module.backbone', 'teacher.backbone': choose one" in line
    assert "prefix='teacher.backbone'" in line
    for prefix in ("teacher", "teacher.backbone", "teacher.backbone."):
        assert equal(import_encoder(path, prefix=prefix, **HEADS).weights, plain)
    assert "prefix='tea' leads to none" in refusal(path, ConfigError, prefix="tea")
    torch.save({"model": vit, "state_dict": dict(vit)}, path)
    assert "holds 2 encoders, at 'model', 'state_dict'" in refusal(path, ConfigError)
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, path)
    assert "no encoder is found in the file" in refusal(path, ConfigError, prefix="model")
    assert "conv1.weight ... are in no known layout" in refusal(path, ConfigError)


def test_two_names_for_one_tensor_are_refused(tmp_path, vit):
    torch.save({**vit, "_orig_mod.norm.bias": vit["norm.bias"]}, tmp_path / "a.pth")
    assert "norm.bias twice" in refusal(tmp_path / "a.pth", ConfigError)


# Other encoders


def test_parts_that_the_encoder_does_not_have_are_named(tmp_path, vit):
    path = tmp_path / "a.pth"
    rows = vit["pos_embed"][:, 1:]
    without = {name: value for name, value in vit.items() if name != "cls_token"}
    for content, text in (
        ({**vit, "register_tokens": torch.zeros(1, 4, 16)}, "reg_token of shape (1, 4, 16) should be [1, r, 32]"),
        ({**without, "pos_embed": rows}, "no class token (cls_token)"),
        ({**vit, "blocks.0.gamma_1": torch.ones(32)}, "LayerScale (blocks.0.gamma_1)"),
        ({**vit, "dist_token": torch.zeros(1, 1, 32)}, "a distillation token (dist_token)"),
        ({**vit, "blocks.1.attn.q_norm.weight": torch.ones(8)}, "normalised queries and keys"),
        ({**vit, "blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, "adapters such as LoRA"),
        ({**vit, "blocks.0.attn.qkv.SCB": torch.ones(96)}, "quantised weights (blocks.0.attn.qkv.SCB)"),
    ):
        torch.save(content, path)
        assert text in refusal(path, ConfigError, **HEADS)


def test_a_class_token_without_a_position_of_its_own_is_taken_when_the_grid_is_known(tmp_path, vit, plain):
    path = tmp_path / "a.pth"  # timm's no_embed_class
    torch.save({**vit, "pos_embed": vit["pos_embed"][:, 1:]}, path)
    found, weights, _ = import_encoder(path, **HEADS)
    assert found == CONFIG  # the fixed table shows its grid
    assert torch.equal(weights["cls_token"], vit["cls_token"])
    rows = vit["pos_embed"][:, 1:] + 1
    torch.save({**vit, "pos_embed": rows}, path)
    line = refusal(path, ConfigError, **HEADS)
    assert "pos_embed has 4 trained rows: 2 x 2 patches and no row for the class token" in line
    assert "Give the image_size" in line
    found, weights, _ = import_encoder(path, image_size=(32, 32), **HEADS)
    assert torch.equal(weights["positions"], rows[0])
    assert torch.equal(weights["cls_token"], vit["cls_token"])


def test_values_that_are_not_finite_are_refused(tmp_path, vit):
    path = tmp_path / "a.pth"
    for value in (torch.nan, torch.inf):
        torch.save({"model": {**vit, "norm.bias": torch.full((32,), value)}}, path)
        line = refusal(path, DataError, **HEADS)
        assert "32 of the 32 values of norm.bias are NaN or infinite" in line
    torch.save({**vit, "head.weight": torch.full((2, 32), torch.nan), "head.bias": torch.zeros(2)}, path)
    assert import_encoder(path, **HEADS).report.left_out == ("head.bias", "head.weight")  # never used, so never judged


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_become_float32(tmp_path, vit, dtype):
    torch.save({name: value.to(dtype) for name, value in vit.items()}, tmp_path / "a.pth")
    weights = import_encoder(tmp_path / "a.pth", image_size=(32, 32), **HEADS).weights
    assert torch.equal(weights["norm.weight"], vit["norm.weight"].to(dtype).float())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weights_are_refused_as_such(tmp_path, vit):
    path = tmp_path / "a.pth"
    torch.save({name: value.to(torch.int8) for name, value in vit.items()}, path)
    assert "is torch.int8, which is not a floating-point type: use the weights from before" in refusal(
        path, ConfigError
    )
    torch.save({name: value.to(torch.float8_e4m3fn) for name, value in vit.items()}, path)
    assert "is torch.float8_e4m3fn, a type of quantised weights" in refusal(path, ConfigError)
    quantised = {name: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8) for name, value in vit.items()}
    torch.save(quantised, path)
    assert "use the weights from before quantisation" in refusal(path)


def test_weights_that_lie_in_other_files_are_refused(tmp_path, vit):
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {name: torch.empty(0) for name in vit}, "ds_version": "0.19"}, path)
    line = refusal(path, DataError)
    assert f"holds no values for {len(vit)} of {len(vit)} tensors" in line
    assert "zero_to_fp32.py" in line
    torch.save({"module": vit, "mp_world_size": 2}, path)
    assert "one of 2 tensor-parallel parts" in refusal(path, DataError)
    torch.save({name: value.to("meta") for name, value in vit.items()}, path)
    assert "holds no values" in refusal(path, DataError)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/__0_0.distcp").write_bytes(b"x")
    assert "dcp_to_torch" in refusal(tmp_path / "dcp", DataError)


def test_a_forged_file_takes_no_more_memory_than_its_size_allows(tmp_path, vit):
    path = tmp_path / "a.pth"
    torch.save({**vit, "pos_embed": torch.zeros(1).expand(1, 10**9, 32)}, path)
    assert "by repeating values" in refusal(path, DataError)
    torch.save({**vit, "blocks.900000000.norm1.weight": torch.ones(32)}, path)
    assert "blocks are missing" in refusal(path, ConfigError)
    endless = {f"a{index}": None for index in range(300)}
    endless.update(dict.fromkeys(endless, endless))
    torch.save({"model": vit, "extra": endless}, path)
    assert import_encoder(path, **HEADS).report.left_out == ("extra",)
    torch.save(vit, path)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as squeezed:
        for name in whole.namelist():
            squeezed.writestr(name, whole.read(name))
    assert "was compressed after torch.save wrote it" in refusal(tmp_path / "b.pth", DataError)


# Files that are not weights


def bytes_of(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def tar_of_one(buffer):
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"), io.BytesIO(b""))


def zip_of_one(buffer):
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder/a.pth", b"x")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 346293852\n"
NOT_WEIGHTS = {
    "empty": (b"", "is empty (0 bytes): download it again"),
    "git-lfs": (LFS, "is a git-lfs pointer, not the weights: run `git lfs pull`"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page (HTML or XML), not weights"),
    "answer of a server": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "is a web page (HTML or XML)",
    ),
    "text": (b"Entry not found", "is text, not weights, and begins with 'Entry not found'"),
    "json": (b'{"error": "unauthorized"}', "is text, not weights"),
    "tar": (bytes_of(tar_of_one), "is a tar archive, not weights: unpack it"),
    "zip": (bytes_of(zip_of_one), "is a zip archive of other files (folder/a.pth), not weights: unpack it"),
    "gzip": (gzip.compress(b"x"), "is a gzip archive, not weights: unpack it"),
    "npz": (bytes_of(lambda buffer: np.savez(buffer, a=np.ones(1))), "is a NumPy archive (a.npy, ...), not weights"),
    "npy": (bytes_of(lambda buffer: np.save(buffer, np.ones(1))), "is a NumPy array, not weights"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "zeros": (bytes(1000), "is not a weight file: it begins with the bytes 00 00 00"),
}


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "pytorch_model.bin", "a"])
@pytest.mark.parametrize("case", NOT_WEIGHTS)
def test_files_that_are_not_weights_are_refused_by_what_they_are(tmp_path, case, name):
    content, text = NOT_WEIGHTS[case]
    (tmp_path / name).write_bytes(content)
    assert text in refusal(tmp_path / name, DataError)
    if name == "pytorch_model.bin":
        with pytest.raises(DataError) as caught:
            import_encoder(tmp_path)
        assert text in str(caught.value)


def test_a_safetensors_file_may_begin_like_a_pickle(tmp_path, vit):
    path = tmp_path / "a.safetensors"
    for padding in range(
        0, 512, 8
    ):  # the header's length is a multiple of 8, its first byte is the pickle's at one of these
        save_file(vit, path, metadata={"a": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert equal(read_foreign_weights(path).state_dict, vit)


def test_a_whole_module_and_a_plain_pickle_are_refused_by_name(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": ViTEncoder(CONFIG)}, path)
    assert "asks for mae_core.vit.ViTEncoder, which is not a tensor" in refusal(path, DataError)
    path.write_bytes(pickle.dumps({"model": torch.ones(1)}, protocol=2))
    assert "asks for torch.storage._load_from_bytes" in refusal(path, DataError)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    for name in ("latest", "zero_to_fp32.py", "tf_model.h5"):
        (tmp_path / name).write_text("x")
    assert "but latest, tf_model.h5, zero_to_fp32.py: give the weight file itself" in refusal(tmp_path, DataError)


# Several files


def test_the_parts_of_a_model_are_read_through_their_index(tmp_path, vit):
    peer = hf_vit_peer(CONFIG)
    peer.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    peer.save_pretrained(tmp_path / "one")
    expected = import_encoder(tmp_path / "one")
    for path in (tmp_path / "parts", tmp_path / "parts/model.safetensors.index.json"):
        found = import_encoder(path)
        assert found.config == expected.config
        assert equal(found.weights, expected.weights)
    part = sorted((tmp_path / "parts").glob("model-*.safetensors"))[1]
    assert "is part 2 of" in refusal(part, DataError)
    part.write_bytes(LFS)
    with pytest.raises(DataError, match=rf"{part.name} .*git-lfs pointer"):
        import_encoder(tmp_path / "parts")
    part.unlink()
    assert f"names {part.name}, which is not in its folder" in refusal(tmp_path / "parts", DataError)


def test_parts_as_pickles_are_read_too(tmp_path, vit, plain):
    names = sorted(vit)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: vit[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(import_encoder(tmp_path, **HEADS).weights, plain)


# Our own files


@pytest.fixture
def own(tmp_path):
    """A pretraining's three files, and the weights in them."""
    model = MaskedAutoencoder(WHOLE, generator=torch.Generator().manual_seed(0))
    initialise(model, generator=torch.Generator().manual_seed(1))
    weights = dict(model.state_dict())
    export_autoencoder(FileStore(tmp_path / "own"), weights, WHOLE, to="safetensors")
    return tmp_path / "own", weights


@pytest.mark.parametrize("file", ["", "encoder.safetensors", "model.safetensors", "renamed.safetensors", "wrapped.pth"])
def test_our_own_encoder_is_read_as_a_file_and_as_a_folder(own, file):
    folder, weights = own
    expected = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    if file == "renamed.safetensors":
        shutil.copy(folder / "encoder.safetensors", folder / file)
    if file == "wrapped.pth":
        torch.save({"model": prefixed("module._orig_mod.", expected)}, folder / file)
    found, imported, report = import_encoder(folder / file)
    assert found == CONFIG
    assert equal(imported, expected)
    assert report.layout == "mae_pipeline"
    assert bool(report.left_out) == (file == "model.safetensors")  # the decoder


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_our_own_autoencoder_is_read_as_a_file_and_as_a_folder(own, file):
    folder, weights = own
    found = import_autoencoder(folder / file)
    assert found.config == WHOLE
    assert equal(found.weights, weights)
    with pytest.raises(ConfigError, match=r"encoder.safetensors holds an encoder alone.*use model.safetensors"):
        import_autoencoder(folder / "encoder.safetensors")


def test_our_own_weights_need_the_config_that_belongs_to_them(own, tmp_path):
    folder, _ = own
    shutil.copy(folder / "encoder.safetensors", tmp_path / "alone.safetensors")
    line = refusal(tmp_path / "alone.safetensors", DataError)
    assert f"{tmp_path / 'config.json'} does not exist: copy it there" in line
    assert "sets num_heads itself, in config.json" in refusal(folder / "encoder.safetensors", ConfigError, num_heads=2)
    other = ViTConfig(image_size=(32, 32), patch_size=16, embed_dim=64, depth=2, num_heads=4)
    encoder = ViTEncoder(other)
    initialise(encoder, generator=torch.Generator().manual_seed(0))
    export_encoder(FileStore(tmp_path / "other"), dict(encoder.state_dict()), other, to="safetensors")
    shutil.copy(tmp_path / "other/config.json", folder)
    assert "config.json beside it: " in refusal(folder / "encoder.safetensors", ConfigError)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DataError, match="does not describe an encoder"):
        import_encoder(folder / "encoder.safetensors")
    (folder / "encoder.safetensors").write_bytes(LFS)
    with pytest.raises(DataError, match="git-lfs pointer"):
        import_encoder(Path(folder))


def test_reading_is_the_same_with_and_without_a_choice(tmp_path, vit):
    torch.save({"model": vit, "epoch": 1}, tmp_path / "a.pth")
    one, other = (read_foreign_weights(tmp_path / "a.pth", prefix=prefix) for prefix in (None, "model"))
    assert equal(one.state_dict, other.state_dict)
    assert one.left_out == other.left_out == ("epoch",)
