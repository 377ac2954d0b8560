"""Garbage in a store: decided from numbers, then found in a folder. What is needed always stays."""

import json
import time

import pytest
from typer.testing import CliRunner

from jobs.groups.store import app
from pipeline.runs.finished.garbage import StepState, delete, unneeded, unneeded_in_step
from pipeline.storage import FileStore, ObjectInfo

DAY = 86400.0
NOW = 100 * DAY


def objects(*keys):
    return [ObjectInfo(key, 10) for key in keys]


def going(state, *keys, before=NOW):
    return {one.key: one.why for one in unneeded_in_step(state, objects(*keys), before=before)}


def checkpoint(generation, step, *, whole=True):
    names = ["rank-0000-of-0001.safetensors", "history.jsonl", *(["manifest.json"] if whole else [])]
    return [f"g{generation:04d}/checkpoints/step-{step:08d}/{name}" for name in names]


def test_of_a_finished_step_what_its_receipt_does_not_stand_on_goes():
    state = StepState(
        claimed={1: 1 * DAY, 2: 2 * DAY, 3: 3 * DAY},
        used=2,
        finished=4 * DAY,
        named={"g0001/checkpoints/step-00000005"},
    )
    stays = ["gen/0001.json", "receipt.json", "basis.safetensors", "shards/ab.tar", "g0002/encoder.safetensors"]
    stays += [*checkpoint(1, 5), *checkpoint(2, 9), "g0009/nobody-claimed-it"]
    goes = ["g0001/encoder.safetensors", *checkpoint(1, 4), *checkpoint(3, 1)]
    torn = checkpoint(2, 12, whole=False)
    found = going(state, *stays, *goes, *torn)
    assert found == dict.fromkeys(goes, "superseded by g0002") | dict.fromkeys(torn, "never committed")


def test_of_a_step_at_work_the_newest_generation_is_left_alone():
    state = StepState(
        claimed={1: 1 * DAY, 2: 2 * DAY}, used=None, finished=None, named={"g0001/checkpoints/step-00000005"}
    )
    found = going(state, *checkpoint(1, 4), *checkpoint(1, 5), *checkpoint(2, 9), *checkpoint(2, 12, whole=False))
    assert set(found) == set(checkpoint(1, 4))


@pytest.mark.parametrize(("before", "goes"), [(1.5, False), (2.0, False), (2.1, True)])
def test_the_age_counts_from_when_it_was_superseded(before, goes):
    state = StepState(claimed={1: 1 * DAY, 2: 2 * DAY}, used=None, finished=None, named=())
    assert bool(going(state, *checkpoint(1, 4), before=before * DAY)) is goes
    late = StepState(claimed={1: 1 * DAY, 2: 2 * DAY}, used=1, finished=1.2 * DAY, named=())  # claimed though finished
    assert bool(going(late, *checkpoint(2, 4), before=before * DAY)) is goes


@pytest.fixture
def store(tmp_path):
    """A finished and an unfinished pretraining with three generations each, a fork's pin, and objects that belong to no step."""
    root = FileStore(tmp_path)
    old = time.time() - 3 * DAY
    for directory in ("pretrain-done", "pretrain-going"):
        step = root.at(directory)
        for generation in (1, 2, 3):
            body = {"generation": generation, "continues": "", "time": old + generation}
            if generation > 1:
                body["continues"] = f"g{generation - 1:04d}/checkpoints/step-{10 * generation - 10:08d}"
            step.write(f"gen/{generation:04d}.json", json.dumps(body).encode())
            for number in range(10 * generation - 2, 10 * generation + 1):
                for key in checkpoint(generation, number):
                    step.write(key, b"0123456789")
    receipt = {"step": "pretrain", "fingerprint": "f", "identity": {}, "facts": {}, "files": [], "generation": 3}
    receipt["made"] = {"time": old + 100, "notes": {"checkpoint": "g0003/checkpoints/step-00000030"}}
    root.at("pretrain-done").write("receipt.json", json.dumps(receipt).encode())
    root.at("pretrain-done").write(
        "pins/a.json", json.dumps({"checkpoint": "g0001/checkpoints/step-00000009"}).encode()
    )
    for key in ("mlflow.db", "history/pretrain/f.json", "other/g0001/x", "pretrain-torn/g0001/x"):
        root.write(key, b"x")
    return root


def folders(keys):
    return sorted({key.rpartition("/")[0] for key in keys})


GOING = [
    f"pretrain-{name}/g{generation:04d}/checkpoints/step-{step:08d}"
    for name, generation, step in (
        ("done", 1, 8), ("done", 1, 10), ("done", 2, 18), ("done", 2, 19), ("done", 2, 20),
        ("going", 1, 8), ("going", 1, 9), ("going", 1, 10), ("going", 2, 18), ("going", 2, 19),
    )
]  # fmt: skip


def test_a_store_is_listed_and_nothing_is_touched(store, tmp_path):
    before = {info.key for info in store.list()}
    found = list(unneeded(store, before=time.time() - DAY))
    assert folders(one.key for one in found) == GOING
    assert list(unneeded(store, before=time.time() - 9 * DAY)) == []
    said = CliRunner().invoke(app, ["gc", str(tmp_path)])
    assert said.exit_code == 0
    assert "pretrain-done/g0002/checkpoints/step-00000018  superseded by g0003" in said.stdout
    assert f"{len(found):6d} objects  to delete with --delete" in said.stdout
    assert {info.key for info in store.list()} == before


def test_with_delete_exactly_that_goes(store, tmp_path):
    before = {info.key for info in store.list()}
    said = CliRunner().invoke(app, ["gc", str(tmp_path), "--delete", "--json"])
    line = json.loads(said.stdout)
    assert line["deleted"] is True
    assert line["bytes"] == 10 * len(line["objects"]) == 10 * 3 * len(GOING)
    after = {info.key for info in store.list()}
    assert before - after == {one["key"] for one in line["objects"]}
    assert folders(before - after) == GOING
    assert not [folder for folder in tmp_path.glob("pretrain-*/g*/**") if folder.is_dir() and not any(folder.iterdir())]
    assert json.loads(CliRunner().invoke(app, ["gc", str(tmp_path), "--json"]).stdout)["objects"] == []


def test_features_go_with_the_encoder_or_dataset_that_they_came_from(store, tmp_path):
    for folder, files in {"a": ["mlflow.db"], "b": ["mlflow.db", "pretrain-lost/g0001/encoder.safetensors"]}.items():
        store.write(f"features/{folder}/part-0000-of-0001.safetensors", b"x")
        made = {"files": files, "time": time.time() - 2 * DAY}
        store.write(f"features/{folder}/computed_from.json", json.dumps(made).encode())
    store.write("features/of-an-older-version/part-0000-of-0001.safetensors", b"x")
    found = [one for one in unneeded(store, before=time.time() - DAY) if one.key.startswith("features/")]
    assert folders(one.key for one in found) == ["features/b"]
    assert {one.why for one in found} == {"computed from pretrain-lost/g0001/encoder.safetensors, which is gone"}
    assert not [one for one in unneeded(store, before=time.time() - 3 * DAY) if one.key.startswith("features/")]
    delete(store, found)
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == ["a", "of-an-older-version"]
