"""What a run says when a step begins, and advice on precision."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from run_kit import document, write_config

from pipeline.config import load_config
from pipeline.planning import hardware
from pipeline.runs import beginning
from pipeline.runs.beginning import beginning_of
from pipeline.runs.checking import before_start as checks
from pipeline.runs.checking.before_start import slow_precision
from pipeline.runs.workflow import build
from pipeline.storage import open_store


@pytest.fixture
def steps(tmp_path):
    config = load_config(write_config(tmp_path / "run.yaml", document(tmp_path / "store", "/data/images")))
    return {step.name: step for step in build(config)}


@pytest.fixture(autouse=True)
def a_cpu_of_known_speed(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    known = replace(hardware.local_cpu(), peaks={"fp32": 1e9, "bf16": 1e9})
    monkeypatch.setattr(beginning, "_hardware", lambda *_: known)


def test_a_listing_names_its_source_and_a_first_training_its_workers(steps, tmp_path):
    store = open_store(str(tmp_path / "store"))
    assert beginning_of(steps["snapshot"], store, "in_process").text == "listing /data/images"
    assert beginning_of(steps["report"], store, "ray").text == ""
    assert beginning_of(steps["shard"], store, "ray").text.startswith("packing the images")
    probe = beginning_of(steps["linear-toy-random-s0"], store, "ray")
    assert probe.text == "on features of the frozen untrained encoder, seed 0"
    assert (
        beginning_of(steps["pretrain"], store, "ray").text == "starting 1 worker on Ray"
    )  # images are not counted yet
    assert beginning_of(steps["pretrain"], store, "in_process").text == ""


def test_a_resumed_training_says_where_and_how_long(steps, tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"))
    step = replace(steps["pretrain"], resume_point=lambda root: "g0001/checkpoints/step-00000004")
    monkeypatch.setattr(beginning, "images_per_epoch", lambda *_: 40)  # 2 epochs of 5 batches of 8
    known = beginning_of(step, store, "in_process")
    whole = beginning_of(steps["pretrain"], store, "in_process")
    assert known.text.startswith("resuming from step 4, at least ")
    assert (known.images_done, known.images) == (32, 80)
    assert known.seconds == pytest.approx(whole.seconds * 0.6)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # the speed of other machines is unknown
    assert beginning_of(step, store, "ray").text == "resuming from step 4, starting 1 worker on Ray"


@pytest.mark.parametrize("computes", [True, False])
def test_bf16_on_a_cpu_without_its_arithmetic_is_answered_with_the_options(steps, monkeypatch, computes):
    monkeypatch.setattr(checks, "cpu_computes_bf16", lambda: computes)
    monkeypatch.setattr(checks, "local_hardware", lambda _: SimpleNamespace(kind="cpu"))
    pretrain, finetune = steps["pretrain"], steps["finetune-toy-random-s0"]
    resources = pretrain.resources
    assert slow_precision(list(steps.values()), resources) == ""  # fp32
    in_bf16 = [
        replace(one, config=replace(one.config, recipe=replace(one.config.recipe, precision="bf16")))
        for one in (pretrain, finetune)
    ]
    advice = slow_precision(in_bf16, resources)
    if computes:
        assert advice == ""
    else:
        assert advice.endswith("--set pretrain.precision=fp32 --set evaluation.finetune.precision=fp32")
        assert "no bf16 arithmetic" in advice
