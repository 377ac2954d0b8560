"""An upgrade must not lose finished work: a store of an earlier version, with its checkpoints, is read as it is."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from run_kit import write_images
from typer.testing import CliRunner, Result

from jobs.cli import app

SOURCE = Path("/tmp/mae-golden/images")  # fixed, because the fingerprints in the archive cover it


def mae(*arguments: object) -> Result:
    """The command in this process: imports cost more than all that it does here."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def images():
    """The images from which the store was made, drawn again from their seeds."""
    if SOURCE.exists():
        shutil.rmtree(SOURCE)
    write_images(SOURCE, 30)
    (SOURCE / "cat" / "bad.png").write_bytes(b"no image\n")
    yield SOURCE
    shutil.rmtree(SOURCE.parent, ignore_errors=True)


@pytest.fixture(scope="module")
def old(images, tmp_path_factory) -> Path:
    """The folder with `store` and `run.yaml`."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "store.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    document = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump(document | {"store": str(folder / "store")}))
    return folder


@pytest.mark.parametrize("snapshot", ['"1"', '["1", "2"]'])
def test_every_step_but_the_report_is_cached(old, snapshot):
    ran = mae("run", old / "run.yaml", "--set", f"data.snapshot={snapshot}", "--in-process", "--json")
    assert ran.exit_code == 0, ran.stderr
    states = {step["kind"]: set() for step in json.loads(ran.stdout)["steps"]}
    for step in json.loads(ran.stdout)["steps"]:
        states[step["kind"]].add(step["state"])
    assert states.pop("report") == {"done"}
    assert set(states) >= {"snapshot", "shard", "pretrain", "evaluate"}
    assert set.union(*states.values()) == {"cached"}


def test_its_checkpoints_can_be_audited_exported_and_forked(old):
    audited = mae("shards", "audit", old / "store")
    assert audited.exit_code == 0, audited.stderr
    assert audited.stdout.count("each once an epoch") == 6  # two pretrainings, four fine-tunings
    exported = mae("model", "export", old / "run.yaml", "--format", "safetensors", "--at", "6", "--out", old / "export")
    assert exported.exit_code == 0, exported.stderr
    forked = mae("fork", old / "run.yaml", "--at", "6", "--out", old / "fork.yaml", "--set", "pretrain.epochs=4")
    assert forked.exit_code == 0, forked.stderr
    ran = mae("run", old / "fork.yaml", "--in-process", "--json", "--set", "evaluation.datasets=[]")
    assert ran.exit_code == 0, ran.stderr
    steps = {step["kind"]: step for step in json.loads(ran.stdout)["steps"]}
    assert (steps["pretrain"]["state"], steps["shard"]["state"]) == ("done", "cached")
    store = old / "store" / steps["pretrain"]["uri"].rpartition("/")[2]
    rows = [json.loads(line) for line in (store / "g0001" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][:3] == [2, 4, 6]  # the parent's rows come first
    assert rows[-1]["step"] > 6
