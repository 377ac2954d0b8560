"""A fork's configuration, and weights exported from checkpoints. The checkpoints are real, of a tiny untrained model."""

import json
from dataclasses import replace

import pytest
import torch
from run_kit import document, write_config, write_images
from typer.testing import CliRunner

from jobs.cli import app
from mae_core import MaskedAutoencoder
from pipeline.config import load_config
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.graph.receipts import claim
from pipeline.runs.finished.fork import fork
from pipeline.runs.finished.pretrainings import pretrain_step
from pipeline.runs.workflow import build
from pipeline.storage import FileStore
from pipeline.training.checkpoints.format import CheckpointManifest, checkpoint_folder, commit, write_history
from pipeline.training.checkpoints.host_copy import HostCopy
from pipeline.training.checkpoints.resume import starting_checkpoint
from pipeline.training.checkpoints.retention import Pruner, Retention
from pipeline.training.checkpoints.saver import write_part
from pipeline.training.engine.deepspeed_engine import Fragment
from pipeline.training.world import World
from pipeline.weights import import_autoencoder, import_encoder


@pytest.fixture
def path(tmp_path):
    """A run of 2 epochs in 8 steps with checkpoints of steps 4 and 6, without any training."""
    path = write_config(tmp_path / "run.yaml", document(tmp_path / "store", write_images(tmp_path / "images", 4)))
    root = root_of(path)
    claim(root, continues="")
    for step in (4, 6):
        model = MaskedAutoencoder(load_config(path).model, generator=torch.Generator().manual_seed(step))
        values = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fragments = [Fragment(f"model.{name}", "weight", 0, p.detach().reshape(-1)) for name, p in values.items()]
        copy = HostCopy(fragments)
        copy.take(fragments)
        store = root.at("g0001")
        rows = write_history(store, checkpoint_folder(step), [{"step": step, "epoch": step / 4, "loss": 1.0}])
        manifest = CheckpointManifest(
            global_step=step,
            optimizer_steps=step,
            cursor={},
            ids_digest=0,
            parameters={f"model.{name}": list(p.shape) for name, p in values.items()},
            world_size=1,
            zero_stage=1,
            files=(write_part(store, checkpoint_folder(step), copy, World(0, 1, torch.device("cpu"), None)), rows),
        )
        commit(store, checkpoint_folder(step), manifest)
    return path


def root_of(path):
    config = load_config(path)
    return FileStore.at(FileStore(path.parent / "store"), pretrain_step(config).directory)


def test_a_fork_is_a_run_of_its_own_that_shares_what_came_before(path, tmp_path):
    out = tmp_path / "fork.yaml"
    start = fork(
        path, ["pretrain.base_lr=1.0e-4", "pretrain.epochs=5", "pretrain.schedule=warmup_stable_decay"], at=4, out=out
    )
    parent, child = load_config(path), load_config(out)
    assert (child.pretrain.base_lr, child.pretrain.epochs, child.name) == (1e-4, 5, "tiny-from-4")
    assert child.fork == start
    assert start.checkpoint == f"{pretrain_step(parent).directory}/g0001/checkpoints/step-00000004"
    prints = [{step.name: step.fingerprint for step in build(config)} for config in (parent, child)]
    moved = {name for name in prints[0] if prints[0][name] != prints[1][name]}
    assert moved == {name for name in prints[0] if "pretrain" in name} | {"report"}
    same = pretrain_step(child.model_copy(update={"pretrain": parent.pretrain}))
    assert same.fingerprint != pretrain_step(parent).fingerprint  # the digest is in it, whatever the recipe
    other = pretrain_step(child.model_copy(update={"fork": replace(start, manifest_sha256="0" * 64)}))
    assert other.fingerprint != pretrain_step(child).fingerprint
    assert "# Continues from step 4" in out.read_text()


def test_a_forked_checkpoint_is_kept(path, tmp_path):
    root = root_of(path)
    fork(path, [], at=4, out=tmp_path / "fork.yaml")
    Pruner(root, 1, Retention(last=1, every_steps=None, best=0)).prune()
    assert {info.key.split("/")[2] for info in root.list("g0001/")} == {"step-00000004", "step-00000006"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("pretrain.global_batch=16", "pretrain.global_batch"),
        ("model.decoder_depth=2", "model.decoder_depth"),
        ("seed=1", "seed"),
        ("data.test_share=0.2", "data.test_share"),
    ],
)
def test_changing_what_the_position_or_the_weights_depend_on_is_refused(path, tmp_path, change, field):
    with pytest.raises(ConfigError, match=f"--set {field}: a fork continues with the weights and at the position"):
        fork(path, [change], at=4, out=tmp_path / "fork.yaml")
    assert not (tmp_path / "fork.yaml").exists()


def test_a_fork_that_would_train_nothing_or_has_no_checkpoint_is_refused(path, tmp_path):
    out = tmp_path / "fork.yaml"
    with pytest.raises(ConfigError, match=r"pretrain.epochs=1: the checkpoint is at epoch 1.00 already"):
        fork(path, ["pretrain.epochs=1"], at=4, out=out)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 is kept. Available: 4, 6"):
        fork(path, [], at=5, out=out)
    with pytest.raises(ConfigError, match="nonsense is not a field"):
        fork(path, ["pretrain.nonsense=1"], at=4, out=out)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists: name a new file"):
        fork(path, [], at=4, out=out)
    assert out.read_text() == "mine"


def test_a_fork_begins_from_that_very_checkpoint_or_not_at_all(path, tmp_path):
    from training_kit import attempt_at

    start = fork(path, [], at=4, out=tmp_path / "fork.yaml")
    attempt = attempt_at(tmp_path / "store" / "pretrain-child")
    with starting_checkpoint(attempt, start) as checkpoint:
        assert (checkpoint.manifest.global_step, checkpoint.root.uri) == (4, (tmp_path / "store").as_uri())
    with pytest.raises(CheckpointError, match="is another checkpoint"):
        starting_checkpoint(attempt, replace(start, manifest_sha256="0" * 64))
    file = tmp_path / "store" / start.checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body))
    file.unlink()
    with pytest.raises(CheckpointError, match="which was forked, is gone"):
        starting_checkpoint(attempt, start)


# ---------------------------------------------------------------------------------------------------------------------
# mae model export


def mae(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout.splitlines()


@pytest.mark.parametrize("form", ["timm", "hf-vit", "hf-vitmae", "safetensors"])
def test_weights_of_a_checkpoint_for_others(path, tmp_path, form):
    files = mae("model", "export", path, "--at", 6, "--format", form, "--out", tmp_path / "out")
    assert files[-1] == str(tmp_path / "out" / "config.json")
    trained = MaskedAutoencoder(load_config(path).model, generator=torch.Generator().manual_seed(6)).state_dict()
    read = import_encoder(tmp_path / "out")
    encoder = {name.removeprefix("encoder."): value for name, value in trained.items() if name.startswith("encoder.")}
    assert read.weights.keys() <= encoder.keys()
    assert len(read.weights) > 10
    assert all(torch.equal(value, encoder[name]) for name, value in read.weights.items())
    if form == "hf-vitmae":
        whole = import_autoencoder(tmp_path / "out").weights
        assert all(torch.equal(value, trained[name]) for name, value in whole.items())


def test_an_export_that_cannot_be_says_why(path, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"not finished. Choose a checkpoint with --at: 4, 6"):
        mae("model", "export", path, "--format", "timm", "--out", out)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 is kept. Available: 4, 6"):
        mae("model", "export", path, "--format", "timm", "--out", out, "--at", 7)
    with pytest.raises(DataError, match=r"no finished pretraining. Give the YAML file"):
        mae("model", "export", tmp_path / "store", "--format", "timm", "--out", out)
    with pytest.raises(DataError, match="not finished, so its model is unknown"):
        mae("model", "export", root_of(path).local_path("x").parent, "--format", "timm", "--out", out, "--at", 6)
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        mae("model", "export", path, "--format", "timm", "--out", out, "--at", 6)
