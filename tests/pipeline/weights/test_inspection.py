"""`mae model inspect` and `mae model import`, on files of timm, transformers and the official code."""

import json

import pytest
import torch
from peer_kit import hf_vit_peer, hf_vitmae_peer, official_names, timm_peer
from typer.testing import CliRunner

from jobs.cli import app
from mae_core import Classifier, MAEConfig, MaskedAutoencoder, ViTConfig, ViTEncoder, initialise
from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore
from pipeline.weights import (
    export_classifier,
    import_autoencoder,
    import_encoder,
    read_encoder,
    start_summary,
    weights_digest,
)

CONFIG = ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=4)
MODEL = MAEConfig(encoder=CONFIG, decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2)


def mae(*arguments):
    result = CliRunner().invoke(app, ["model", *(str(argument) for argument in arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def inspected(*arguments):
    return json.loads(mae("inspect", *arguments, "--json"))


def test_an_official_file_is_an_autoencoder_or_an_encoder(tmp_path):
    weights = official_names(hf_vitmae_peer(MODEL).state_dict())
    torch.save({"model": weights, "optimizer": {"state": {}}}, tmp_path / "whole.pth")
    found = inspected(tmp_path / "whole.pth", "--num-heads", 4, "--decoder-num-heads", 2)
    assert (found["kind"], found["layout"], found["size"]) == ("autoencoder", "official_mae", "ViT 32x2/8")
    assert found["config"]["encoder"]["image_size"] == [32, 32]
    assert found["config"]["decoder_depth"] == 1
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    assert found["dtypes"] == {"float32": len(weights)}
    assert found["left_out"] == ["optimizer"]
    assert any(one.startswith("pixel_mean=") for one in found["assumed"])
    kept = {name: value.half() for name, value in weights.items() if not name.startswith(("decoder", "mask_token"))}
    torch.save(kept, tmp_path / "encoder.pth")
    found = inspected(tmp_path / "encoder.pth", "--num-heads", 4)
    assert (found["kind"], found["layout"], found["dtypes"]) == ("encoder", "timm", {"float16": len(kept)})
    weights = import_encoder(tmp_path / "encoder.pth", num_heads=4).weights
    assert found["sha256"] == weights_digest(weights)
    assert found["norm"] == pytest.approx(
        torch.cat([value.flatten() for value in weights.values()]).double().norm().item()
    )
    text = mae("inspect", tmp_path / "encoder.pth", "--num-heads", 4)
    assert "kind        encoder, ViT 32x2/8" in text
    assert "patch_size=8" in text


def test_classifiers_are_told_from_encoders(tmp_path):
    torch.save(timm_peer(CONFIG, positions="fixed", num_classes=3).state_dict(), tmp_path / "token.pth")
    found = inspected(tmp_path / "token.pth", "--num-heads", 4)
    assert (found["kind"], found["left_out"]) == ("classifier", ["head.bias", "head.weight"])
    hf_vit_peer(CONFIG, kind="ViTForImageClassification").save_pretrained(tmp_path / "hf")
    assert inspected(tmp_path / "hf")["kind"] == "classifier"
    encoder = ViTEncoder(CONFIG)
    initialise(encoder, generator=torch.Generator().manual_seed(0))
    ours = Classifier(encoder, num_classes=2, generator=torch.Generator().manual_seed(0)).state_dict()
    for to in ("safetensors", "timm"):
        export_classifier(FileStore(tmp_path / to), ours, CONFIG, ("cat", "dog"), to=to)
        found = inspected(tmp_path / to)
        assert found["kind"] == "classifier"
        assert found["parameters"] >= sum(value.numel() for value in ours.values())
    assert inspected(tmp_path / "safetensors")["notes"] == ["2 classes: cat, dog"]


def test_what_is_no_weights_is_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(DataError, match="a web page"):
        mae("inspect", tmp_path / "page.pth")
    with pytest.raises(DataError, match="does not exist or holds no files of weights"):
        mae("inspect", tmp_path / "nothing.pth")
    torch.save(timm_peer(CONFIG, positions="fixed").state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(ConfigError, match="num_heads cannot be read"):
        mae("inspect", tmp_path / "narrow.pth")


def test_an_import_is_our_own_format_and_says_what_it_assumed(tmp_path):
    torch.save(official_names(hf_vitmae_peer(MODEL).state_dict()), tmp_path / "a.pth")
    options = ("--num-heads", 4, "--decoder-num-heads", 2, "--pixel-mean", "0.5,0.5,0.5", "--target", "raw")
    files = mae("import", tmp_path / "a.pth", "--out", tmp_path / "own", *options).splitlines()
    names = ["import.json", "README.md", "encoder.safetensors", "model.safetensors", "config.json"]
    assert [line.rpartition("/")[2] for line in files] == names
    report = json.loads((tmp_path / "own/import.json").read_text())
    assert (report["kind"], report["layout"], report["source"]) == (
        "autoencoder",
        "official_mae",
        str(tmp_path / "a.pth"),
    )
    assert not any(one.startswith("pixel_mean") for one in report["assumed"])
    whole = import_autoencoder(tmp_path / "own")
    assert (whole.config.target, whole.config.encoder.pixel_mean) == ("raw", (0.5, 0.5, 0.5))
    MaskedAutoencoder(whole.config, generator=torch.Generator()).load_state_dict(whole.weights)
    config, weights = read_encoder(FileStore(tmp_path / "own"))
    assert config == whole.config.encoder
    assert inspected(tmp_path / "own")["sha256"] == report["sha256"]
    with pytest.raises(ConfigError, match="is not empty"):
        mae("import", tmp_path / "a.pth", "--out", tmp_path / "own", *options)

    mae("import", tmp_path / "a.pth", "--out", tmp_path / "alone", "--num-heads", 4, "--encoder-only")
    assert not (tmp_path / "alone/model.safetensors").exists()
    alone = read_encoder(FileStore(tmp_path / "alone"))[1]
    assert all(torch.equal(alone[name], value) for name, value in weights.items())
    with pytest.raises(ConfigError, match="mask_ratio describes a decoder, and none is imported"):
        mae(
            "import",
            tmp_path / "a.pth",
            "--out",
            tmp_path / "x",
            "--num-heads",
            4,
            "--encoder-only",
            "--mask-ratio",
            0.5,
        )
    with pytest.raises(ConfigError, match="--pixel-std a,b: write one number per channel"):
        mae("import", tmp_path / "a.pth", "--out", tmp_path / "x", "--pixel-std", "a,b")
    assert not (tmp_path / "x").exists()


def test_weights_lie_in_a_bucket_as_well(tmp_path, s3_bucket):
    torch.save(official_names(hf_vitmae_peer(MODEL).state_dict()), tmp_path / "a.pth")
    where = f"s3://{s3_bucket}/weights"
    files = mae("import", tmp_path / "a.pth", "--out", where, "--num-heads", 4, "--decoder-num-heads", 2).splitlines()
    assert files[-1] == f"{where}/config.json"
    (whole, encoder) = (inspected(address) for address in (where, f"{where}/encoder.safetensors"))
    assert (whole["kind"], encoder["kind"], whole["source"]) == ("autoencoder", "encoder", where)
    summary = start_summary(where, MODEL, decoder="auto")
    assert (summary.sha256, summary.fresh) == (whole["sha256"], ())
    with pytest.raises(DataError, match=r"s3://.*/nothing.pth does not exist"):
        mae("inspect", f"{where}/nothing.pth")


def test_of_several_models_one_is_chosen(tmp_path):
    one, other = (timm_peer(CONFIG, positions="fixed").state_dict() for _ in range(2))
    other = {name: value + 1 if name == "norm.bias" else value for name, value in other.items()}
    torch.save({"student": one, "teacher": other}, tmp_path / "two.pth")
    with pytest.raises(ConfigError, match="holds 2 encoders"):
        mae("inspect", tmp_path / "two.pth", "--num-heads", 4)
    mae("import", tmp_path / "two.pth", "--out", tmp_path / "own", "--prefix", "teacher", "--num-heads", 4)
    assert torch.equal(read_encoder(FileStore(tmp_path / "own"))[1]["norm.bias"], other["norm.bias"])
