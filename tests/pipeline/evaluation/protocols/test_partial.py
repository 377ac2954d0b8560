"""Partial fine-tuning: what is frozen stays as it was, costs no gradient, and one step is one number of blocks."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from training_kit import SEED, TEST, attempt_at, classification_spec, encoder_config, finetune_recipe

from mae_core.classification.heads import Classifier, freeze_below
from mae_core.errors import ConfigError
from mae_core.vit import ViTEncoder
from pipeline.evaluation.classifiers import CLASSIFIER
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.evaluation.protocols.partial import PROTOCOL, PartialConfig, PartialSettings, partial, step_config
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint, resume_point
from pipeline.training.health.stop_reasons import StoreStopSignal
from pipeline.training.loop.loop import train
from pipeline.training.spec.tasks import ClassificationTask
from pipeline.training.world import enter_world
from pipeline.weights import ENCODER, read_weights

HEAD = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def trained(blocks: float) -> set[str]:
    model = Classifier(
        ViTEncoder(encoder_config(), generator=torch.Generator()), num_classes=3, generator=torch.Generator()
    )
    freeze_below(model, trained_blocks=blocks)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_half_a_block_is_the_mlp_of_the_last_one():
    everything = {
        name
        for name, _ in Classifier(
            ViTEncoder(encoder_config()), num_classes=3, generator=torch.Generator()
        ).named_parameters()
    }
    last = {name for name in everything if name.startswith("encoder.blocks.1.")}
    assert trained(0) == HEAD
    assert trained(0.5) == HEAD | {name for name in last if name.split(".")[3] in ("norm2", "mlp")}
    assert trained(1) == HEAD | last
    assert trained(2) == everything  # as many as there are: the embedding too


@pytest.mark.parametrize("blocks", [-1, 0.3, 3])
def test_a_number_of_blocks_that_there_is_not_is_answered(blocks):
    with pytest.raises(ConfigError, match=rf"trained_blocks={blocks} is not a whole or half number in \[0, 2\]"):
        trained(blocks)


def task(blocks: float | None, **changes) -> ClassificationTask:
    settings = {"weight_decay": 0.05, "layer_decay": 0.75, "drop_path": 0.5, "label_smoothing": 0.0, "seed": SEED}
    return ClassificationTask(
        encoder=encoder_config(), encoder_uri="", num_classes=3, trained_blocks=blocks, **settings | changes
    )


def losses_of(built, noise: torch.Tensor) -> torch.Tensor:
    images = torch.randint(0, 255, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return built.module(images, torch.tensor([0, 1, 2, 0]), noise)


def test_frozen_blocks_keep_no_graph_and_drop_nothing():
    built = task(1).build()
    seen = {}
    for index, block in enumerate(built.module.model.encoder.blocks):
        block.register_forward_hook(lambda _, __, output, index=index: seen.update({index: output}))
    everything_dropped = torch.zeros(4, 2, 2)  # the first block's rate is 0, the second's 0.5
    losses_of(built, everything_dropped).sum().backward()
    assert not seen[0].requires_grad
    assert seen[1].requires_grad
    frozen = seen[0]
    losses_of(built, torch.ones(4, 2, 2))
    assert torch.equal(frozen, seen[0])
    learnt = [name for group in built.groups for name in group["names"]]
    assert {f"model.{name}" for name in trained(1)} == {f"model.{name.removeprefix('model.')}" for name in learnt}
    for name, parameter in built.module.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_all_blocks_train_as_full_fine_tuning_does():
    noise = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(losses_of(task(2).build(), noise), losses_of(task(None).build(), noise))


def partial_here(config, inputs, attempt):
    return partial(config, inputs, attempt)


def train_here(spec, attempt):
    stop = StoreStopSignal(attempt)
    return train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop).scores


def test_the_saved_classifier_has_the_frozen_weights_and_the_checkpoint_has_not(teams, shards, pretrained, tmp_path):
    config = PartialConfig(
        encoder=encoder_config(),
        weights="pretrained",
        recipe=finetune_recipe(),
        train_labels=None,
        seed=SEED,
        blocks=0.5,
    )
    attempt = attempt_at(tmp_path)
    facts = teams(1).run(partial_here, config, {"shards": shards, "pretrain": pretrained}, attempt)[0].facts
    assert facts["images"] == TEST
    saved = load(attempt.store.read(CLASSIFIER))
    Classifier(ViTEncoder(encoder_config()), num_classes=3, generator=torch.Generator()).load_state_dict(saved)
    for name, value in read_weights(pretrained.store, ENCODER).items():
        if not name.startswith("norm."):
            assert torch.equal(saved[f"encoder.{name}"], value) == (f"encoder.{name}" not in trained(0.5)), name
    with open_checkpoint(attempt.root, resume_point(attempt.root)) as checkpoint:
        assert set(checkpoint.manifest.parameters) == {f"model.{name}" for name in trained(0.5)}


@pytest.mark.parametrize("blocks", [0, 0.5, 1])
def test_it_is_the_same_at_any_zero_stage(teams, shards, tmp_path, blocks):
    found = []
    for stage in (1, 3):
        attempt = attempt_at(tmp_path / str(stage), zero_stage=stage)
        spec = classification_spec(shards, attempt)
        spec = replace(spec, task=replace(spec.task, trained_blocks=blocks))
        teams(2).run(train_here, spec, attempt)
        with open_checkpoint(attempt.root, resume_point(attempt.root)) as checkpoint:
            found.append(checkpoint.weights())
    assert found[0].keys() == {f"model.{name}" for name in trained(blocks)}
    assert all(torch.allclose(found[1][name], value, atol=1e-5) for name, value in found[0].items())


def test_every_number_of_blocks_is_a_step_of_its_own():
    settings = PartialSettings(blocks=(0, 0.5, 2))
    common = ProtocolConfig(encoder=encoder_config(), weights="random", train_labels=None, seed=0)
    steps = {name: step_config(common, one) for name, one in PROTOCOL.variants(settings).items()}
    assert {name: step.blocks for name, step in steps.items()} == {"-0": 0, "-0.5": 0.5, "-2": 2}
    with pytest.raises(ConfigError, match=r"evaluation\.partial\.blocks: 4 is more than the 2 blocks of the encoder"):
        step_config(common, replace(settings, blocks=(4,)))
    for wrong, message in (((), "write at least one"), ((1, 1), "each only once"), ((0.25,), "whole or half")):
        with pytest.raises(ConfigError, match=message):
            PartialSettings(blocks=wrong)
