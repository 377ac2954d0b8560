"""A whole run, forked half way, exported and tidied up, by the commands that a person types."""

import json

import pytest
from run_kit import document, mae, migrated_database, store, write_config, write_images  # noqa: F401 - fixtures

from pipeline.config import load_config
from pipeline.runs.finished.pretrainings import pretrain_step, pretraining_of
from pipeline.storage import open_store
from pipeline.training.checkpoints.audit import audit

pytestmark = pytest.mark.system


def line(*arguments):
    done = mae(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def history(path):
    config = load_config(path)
    root = pretraining_of(config).root
    rows = root.read("g0001/history.jsonl").decode().splitlines()
    return [json.loads(row) for row in rows]


def test_run_fork_run_export_gc(tmp_path, store):  # noqa: F811
    content = document(store, write_images(tmp_path / "images", 40))
    content["resources"] |= {"checkpoint_every_steps": 2, "log_every_steps": 1, "keep_every_steps": 2}
    path = write_config(tmp_path / "run.yaml", content)
    line("run", path, "--in-process")

    child = tmp_path / "fork.yaml"
    changes = ("--set", "pretrain.epochs=3", "--set", "pretrain.base_lr=3.0e-4")
    done = mae("fork", path, "--at", "4", "--out", child, *changes)
    assert done.returncode == 0, done.stderr
    states = {step["name"]: step["state"] for step in line("run", child, "--in-process")["steps"]}
    assert {states[name] for name in ("snapshot", "shard", "linear-toy-random-s0")} == {"cached"}
    assert states["pretrain"] == "done"
    before, after = history(path), history(child)
    assert [row["step"] for row in after] == list(range(1, len(after) + 1))
    assert [row["loss"] for row in after[:4]] == [row["loss"] for row in before[:4]]
    assert after[4]["lr"] != before[4]["lr"]
    assert len(after) > len(before)
    assert audit(open_store(str(store)).at(pretrain_step(load_config(child)).directory)).agrees

    unchanged = tmp_path / "same.yaml"
    assert mae("fork", path, "--at", "4", "--out", unchanged).returncode == 0
    line("run", unchanged, "--in-process")
    for field in ("loss", "lr", "grad_norm"):  # fp32: an unchanged fork is the run itself, bit by bit
        assert [row[field] for row in history(unchanged)] == [row[field] for row in before]

    done = mae("model", "export", child, "--format", "timm", "--out", tmp_path / "timm")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "timm/config.json").exists()
    assert line("store", "gc", store)["objects"] == []
