"""Supervised training from scratch: its recipe is the paper's, and the average of the weights is exact and resumes."""

import pytest
import torch
from safetensors.torch import load
from training_kit import SEED, StopAfter, attempt_at, classification_spec, encoder_config, finetune_recipe

from mae_core.classification.heads import Classifier
from mae_core.vit import ViTEncoder
from pipeline.evaluation.classifiers import CLASSIFIER
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.evaluation.protocols.scratch import PROTOCOL, ScratchConfig, ScratchSettings, scratch
from pipeline.storage import open_store
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import committed, open_checkpoint, resume_point
from pipeline.training.loop.loop import train
from pipeline.training.world import enter_world

DECAY = 0.7


def train_here(spec, attempt, stop):
    trained = train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop)
    return trained.scores


def averages(root):
    with open_checkpoint(root, resume_point(root)) as checkpoint:
        return checkpoint.weights("average")


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 1), (2, 2), (2, 3)])
def test_the_average_is_that_of_the_weights_after_every_step(teams, shards, tmp_path, workers, zero_stage):
    attempt = attempt_at(tmp_path, zero_stage=zero_stage, checkpoint_every_steps=1, keep_checkpoints=100)
    spec = classification_spec(shards, attempt, ema=DECAY)
    teams(workers).run(train_here, spec, attempt, StopAfter(99))
    expected = {name: p.detach().clone() for name, p in spec.task.build().module.named_parameters()}
    keys = sorted(committed(attempt.root))
    assert len(keys) == 10
    for key in keys:
        with open_checkpoint(attempt.root, key) as checkpoint:
            weights = checkpoint.weights()
        expected = {name: value.lerp(weights[name], 1 - DECAY) for name, value in expected.items()}
    found = averages(attempt.root)
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    assert not torch.allclose(found["model.head.weight"], weights["model.head.weight"], atol=1e-6)


def test_a_resumed_average_is_the_same(teams, shards, tmp_path):
    whole = attempt_at(tmp_path / "whole")
    scores = teams(1).run(train_here, classification_spec(shards, whole, ema=DECAY), whole, StopAfter(99))
    spec = classification_spec(shards, whole, ema=DECAY)
    teams(1).run(train_here, spec, attempt_at(tmp_path / "stopped"), StopAfter(4))
    resumed = teams(1).run(train_here, spec, attempt_at(tmp_path / "stopped"), StopAfter(99))
    assert resumed == scores
    found, expected = averages(open_store(str(tmp_path / "stopped"))), averages(whole.root)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def scratch_here(config, inputs, attempt):
    return scratch(config, inputs, attempt)


def test_the_average_is_what_is_scored_and_saved(teams, shards, tmp_path):
    config = ScratchConfig(
        encoder=encoder_config(), weights="random", recipe=finetune_recipe(ema=DECAY), train_labels=None, seed=SEED
    )
    attempt = attempt_at(tmp_path)
    teams(1).run(scratch_here, config, {"shards": shards}, attempt)
    saved = load(attempt.store.read(CLASSIFIER))
    Classifier(ViTEncoder(encoder_config()), num_classes=3, generator=torch.Generator()).load_state_dict(saved)
    expected = averages(attempt.root)
    assert all(torch.equal(saved[name.removeprefix("model.")], value) for name, value in expected.items())


def test_only_random_weights_are_trained_from_scratch():
    assert PROTOCOL.origins == ("random",)
    common = ProtocolConfig(encoder=encoder_config(), weights="random", train_labels=None, seed=0)
    recipe = PROTOCOL.step_config(common, ScratchSettings()).recipe
    assert (recipe.weight_decay, recipe.ema, recipe.epochs, recipe.layer_decay) == (0.3, 0.9999, 300, 1.0)
