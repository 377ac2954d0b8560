"""Pretraining that starts from weights of elsewhere: what is taken, what is refused, and a whole run that does it."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from peer_kit import hf_vitmae_peer, official_names, timm_peer
from run_kit import document, mae, migrated_database, store, write_config, write_images  # noqa: F401 - fixtures
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.cli import app
from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, sine_cosine_2d
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.runs.finished.fork import fork
from pipeline.runs.finished.pretrainings import pretrain_step
from pipeline.runs.workflow import build
from pipeline.storage import FileStore
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.spec.tasks import START
from pipeline.weights import export_autoencoder, start_summary, starting_weights

HALF = (0.5, 0.5, 0.5)


def model_of(side=16, **changes):
    encoder = {"image_size": (side, side), "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    decoder = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
    inner = {name: changes.pop(name) for name in list(changes) if name in ViTConfig.__dataclass_fields__}
    return MAEConfig(**{"encoder": ViTConfig(**{**encoder, **inner}), **decoder, **changes})


def official(path, config, *, decoder=True):
    """Write a file as the official code leaves it."""
    weights = official_names(hf_vitmae_peer(config).state_dict())
    kept = {name: value for name, value in weights.items() if decoder or not name.startswith(("decoder", "mask_token"))}
    torch.save({"model": kept, "epoch": 800}, path)
    return str(path)


def test_the_encoder_is_taken_and_the_decoder_is_fresh_or_taken(tmp_path):
    config = model_of()
    alone = starting_weights(official(tmp_path / "a.pth", config, decoder=False), config, decoder="auto")
    whole = starting_weights(official(tmp_path / "b.pth", config), config, decoder="auto")
    fresh = starting_weights(str(tmp_path / "b.pth"), config, decoder="fresh")
    names = set(MaskedAutoencoder(config, generator=torch.Generator()).state_dict())
    assert {name.partition(".")[0] for name in alone.weights} == {"encoder"}
    assert set(alone.summary.fresh) == {name for name in names if name.startswith("decoder.")}
    assert (set(whole.weights), whole.summary.fresh) == (names, ())
    assert fresh.summary.sha256 == alone.summary.sha256 != whole.summary.sha256
    (line, *notes) = alone.summary.lines()
    assert (
        f"{len(alone.weights)} tensors taken, {len(names) - len(alone.weights)} fresh (decoder), 0 interpolated" in line
    )
    assert any("not stated there, taken from this run: num_heads=3" in note for note in notes)


def test_the_digest_is_of_the_weights_and_not_of_their_file(tmp_path):
    config = model_of()
    one = start_summary(official(tmp_path / "a.pth", config), config, decoder="auto")
    hf_vitmae_peer(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "elsewhere").mkdir()
    moved = start_summary(official(tmp_path / "elsewhere" / "x.bin", config), config, decoder="auto")
    assert one.sha256 == moved.sha256
    assert start_summary(str(tmp_path / "hf"), config, decoder="auto").sha256 == one.sha256
    other = torch.load(tmp_path / "a.pth")
    other["model"]["blocks.0.attn.proj.bias"][0] += 1
    torch.save(other, tmp_path / "a.pth")  # the same path, read again because the file is another
    assert start_summary(str(tmp_path / "a.pth"), config, decoder="auto").sha256 != one.sha256


def test_trained_positions_are_interpolated_as_timm_does_and_fixed_ones_computed(tmp_path):
    small, large = model_of(16, positions="learned"), model_of(24, positions="learned")
    peer = timm_peer(small.encoder, positions="trained", dynamic_img_size=True)
    torch.save(peer.state_dict(), tmp_path / "a.pth")
    start = starting_weights(str(tmp_path / "a.pth"), large, decoder="auto")
    theirs = timm.layers.resample_abs_pos_embed(peer.pos_embed.detach(), [6, 6], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(start.weights["encoder.positions"], theirs[0, 1:], rtol=0, atol=1e-6)
    assert start.summary.interpolated == ("encoder.positions",)
    assert any(
        "16 x 16 pixels, this run's have 24 x 24: positions are interpolated" in note for note in start.summary.notes
    )

    fixed = starting_weights(official(tmp_path / "b.pth", model_of(16)), model_of(24), decoder="auto")
    assert fixed.summary.interpolated == ()
    assert any("positions are computed for the new grid" in note for note in fixed.summary.notes)
    model = MaskedAutoencoder(model_of(24), generator=torch.Generator().manual_seed(0))
    model.load_state_dict(dict(fixed.weights))
    assert torch.equal(model.encoder.positions, sine_cosine_2d((6, 6), 12))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"patch_size": 8},
            r"patch_size=4, not 8 \(a kernel of another patch size cannot.*Write model.encoder.patch_size: 4",
        ),
        ({"embed_dim": 24}, r"embed_dim=12, not 24.*Write model.encoder.embed_dim: 12"),
        ({"depth": 2}, r"depth=1, not 2"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio=4.0, not 2.0"),
        ({"decoder_depth": 2}, r"the decoder there has decoder_depth=1, not 2.*pretrain.start_decoder: fresh"),
        ({"cls_tokens": 2}, r"cls_tokens=1, not 2"),
    ],
)
def test_another_architecture_is_refused_with_what_to_write(tmp_path, changes, text):
    path = official(tmp_path / "a.pth", model_of())
    with pytest.raises(ConfigError, match=rf"pretrain.start={path}: .*{text}"):
        starting_weights(path, model_of(**changes), decoder="auto")
    if "decoder_depth" in changes:
        assert starting_weights(path, model_of(**changes), decoder="fresh").summary.fresh


def test_stated_heads_and_trained_positions_are_not_overruled(tmp_path):
    config = model_of()
    hf_vitmae_peer(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="num_heads=3, not 1"):
        starting_weights(str(tmp_path / "hf"), model_of(num_heads=1), decoder="auto")
    torch.save(timm_peer(config.encoder, positions="trained").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"its positions are trained.*model.encoder.positions: learned"):
        starting_weights(str(tmp_path / "a.pth"), config, decoder="auto")


def test_another_pixel_scale_and_target_are_said(tmp_path):
    config = model_of()
    theirs = replace(config, encoder=replace(config.encoder, pixel_mean=HALF, pixel_std=HALF), target="raw")
    weights = MaskedAutoencoder(theirs, generator=torch.Generator().manual_seed(3)).state_dict()
    export_autoencoder(FileStore(tmp_path / "own"), weights, theirs, to="safetensors")
    notes = " ".join(starting_weights(str(tmp_path / "own"), config, decoder="auto").summary.notes)
    assert "its pixels were scaled with mean [0.5, 0.5, 0.5]" in notes
    assert "its decoder predicted target raw, this run's is normalised" in notes


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and run


@pytest.fixture
def path(tmp_path, store):  # noqa: F811
    """A run from official weights of larger images, named by a path relative to the YAML file."""
    official(tmp_path / "mae.pth", model_of(32))
    content = document(store, write_images(tmp_path / "images", 20))
    content["pretrain"]["start"] = "mae.pth"
    content["evaluation"]["datasets"] = []
    return write_config(tmp_path / "run.yaml", content)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_fingerprints_follow_the_weights_and_nothing_else(path, tmp_path):
    config = load_config(path)
    assert config.pretrain.start == str(tmp_path / "mae.pth")
    step = pretrain_step(config)
    plain = pretrain_step(load_config(path, ["pretrain.start=null"]))
    assert "start_sha256" not in plain.identity()["config"]  # runs of older versions keep their fingerprints
    assert "start" not in plain.identity()["config"]["recipe"]
    assert step.fingerprint != plain.fingerprint
    (tmp_path / "mae.pth").rename(tmp_path / "renamed.pth")
    moved = load_config(path, [f"pretrain.start={tmp_path / 'renamed.pth'}"])
    assert [one.fingerprint for one in build(moved)] == [
        one.fingerprint
        for one in build(
            config.model_copy(update={"pretrain": replace(config.pretrain, start=str(tmp_path / "renamed.pth"))})
        )
    ]
    assert pretrain_step(moved).fingerprint == step.fingerprint
    with pytest.raises(DataError, match=r"mae.pth does not exist or holds no files of weights"):
        build(config)


def test_start_and_fork_exclude_each_other(path, tmp_path):
    point = "{checkpoint: pretrain-x/g0001/checkpoints/step-00000004, manifest_sha256: abc}"
    with pytest.raises(ConfigError, match=r"pretrain.start = .*and fork cannot both be written"):
        load_config(path, [f"fork={point}"])
    with pytest.raises(ConfigError, match=r"--set pretrain.start: a fork takes its weights from the checkpoint"):
        fork(path, ["pretrain.start=mae.pth"], at=4, out=tmp_path / "f.yaml")
    with pytest.raises(ConfigError, match=r"pretrain.start_decoder = fresh needs weights"):
        load_config(path, ["pretrain.start=null", "pretrain.start_decoder=fresh"])


def test_a_run_starts_from_the_weights_and_its_fork_does_not_need_them(path, tmp_path):
    planned = invoke("plan", path)
    assert planned.exit_code == 0, planned.stderr
    assert f"starts from {tmp_path / 'mae.pth'} (layout official_mae" in planned.stdout
    assert json.loads(invoke("plan", path, "--json").stdout)["start"]["interpolated"] == []
    changes = ("--set", "resources.checkpoint_every_steps=1", "--set", "resources.keep_every_steps=1")
    ran = invoke("run", path, "--in-process", "--json", *changes)
    assert ran.exit_code == 0, ran.stderr
    step = pretrain_step(load_config(path))
    root = FileStore(tmp_path / "store").at(step.directory)
    start = load_file(tmp_path / "store" / step.directory / START)
    with open_checkpoint(root, "g0001/checkpoints/step-00000001") as checkpoint:
        first = {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}
    # a step of AdamW moves a weight by about the rate, and random weights would be tenths away
    assert max(float((first[name] - value).abs().max()) for name, value in start.items()) < 1e-3
    assert "tensors taken, 0 fresh" in ran.stderr

    (tmp_path / "mae.pth").unlink()
    child = tmp_path / "fork.yaml"
    # of the run, not of its file: that one asks for weights which are gone
    with pytest.raises(DataError, match=r"mae.pth does not exist"):
        fork(path, [], at=2, out=child)
    official(tmp_path / "mae.pth", model_of(32))
    fork(path, ["pretrain.epochs=3"], at=2, out=child)
    assert load_config(child).pretrain.start is None
