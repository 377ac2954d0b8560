"""The recipes for sets that people have on disk: each loads, its graph is built, and it fits the machine that it is for."""

import pytest
from run_kit import ROOT

from pipeline.config import load_config
from pipeline.evaluation.protocols import PROTOCOL_NAMES
from pipeline.planning.estimate import estimate_memory, training_configs
from pipeline.planning.hardware import hardware_named
from pipeline.runs.workflow import build

RECIPES = {"cifar10": ("test", (32, 4)), "imagenette": ("val", (128, 16)), "tiny_imagenet": ("val", (64, 8))}


def recipe(name: str, *overrides: str):
    return load_config(ROOT / f"jobs/configs/{name}.yaml", [f"data.source=/data/{name}", *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_it_plans_every_step_and_fits_its_machine(name):
    config = recipe(name)
    split, (side, patch) = RECIPES[name]
    assert config.name == name
    assert config.evaluation.split == split
    assert (config.model.encoder.image_size, config.model.encoder.patch_size) == ((side, side), patch)
    steps = build(config)
    assert {"snapshot", "shard", "pretrain", "report"} <= {step.kind for step in steps}
    trainings = training_configs(steps)
    assert "pretrain" in trainings
    for training in trainings.values():
        assert estimate_memory(training, config.resources, hardware_named("H100")).fits


@pytest.mark.parametrize("name", RECIPES)
def test_a_trial_of_one_epoch_with_every_protocol_is_a_matter_of_overrides(name):
    protocols = sorted(set(PROTOCOL_NAMES) - {"own_head"})  # for finished classifiers
    trained = ("linear", "linear_online", "attentive", "partial", "finetune", "scratch")
    config = recipe(
        name,
        f"evaluation.datasets=[{{name: {name}, protocols: {protocols}}}]",
        "pretrain.epochs=1",
        "pretrain.warmup_epochs=0",
        *(f"evaluation.{protocol}.epochs=1" for protocol in trained),
    )
    names = {step.name.split("-")[0] for step in build(config)}
    assert names >= set(protocols)


def test_cifar_s_model_is_the_small_one_of_the_page():
    model = recipe("cifar10").model
    assert (model.encoder.depth, model.encoder.embed_dim, model.encoder.patch_size) == (6, 192, 4)
