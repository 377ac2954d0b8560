"""The linear probe, run whole: features of the weights that were asked for, every test image counted once."""

import pytest
import torch
from safetensors.torch import load
from training_kit import SEED, TEST, TRAIN, attempt_at, encoder_config

from mae_core.vit import ViTEncoder, initialise
from pipeline.config import LinearConfig
from pipeline.data.dataset.address import dataset_address
from pipeline.stages import linear as stage
from pipeline.stages.linear import PROBE, LinearStageConfig, Part, features_of, fit, joined, linear
from pipeline.training.spec.train_spec import Placement
from pipeline.weights import ENCODER, read_weights


def config(weights: str, train_labels: int | None = None) -> LinearStageConfig:
    probe = LinearConfig(epochs=60, batch=20, base_lr=2.0, warmup_epochs=2.0)
    return LinearStageConfig(
        encoder=encoder_config(), weights=weights, probe=probe, train_labels=train_labels, seed=SEED
    )


def features(shards, attempt, part: Part, *, uri: str = "", train_labels: int | None = None):
    return features_of(
        part,
        config=config("random", train_labels),
        dataset=dataset_address(shards),
        encoder_uri=uri,
        placement=Placement.from_resources(attempt.resources),
    )


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_score_is_the_saved_probes_over_all_test_images(shards, pretrained, tmp_path, weights):
    inputs = {"shards": shards} | ({"pretrain": pretrained} if weights == "pretrained" else {})
    attempt = attempt_at(tmp_path)
    facts = linear(config(weights), inputs, attempt).facts
    assert facts["images"] == TEST
    assert facts["top1"] > 0.6  # three classes; 1/3 by chance
    probe = load(attempt.store.read(PROBE))
    uri = pretrained.store.uri if weights == "pretrained" else ""
    test = features(shards, attempt, Part("test", 0, 1), uri=uri)
    logits = (test.values - probe["mean"]) / probe["deviation"] @ probe["weight"].T + probe["bias"]
    assert facts["top1"] == pytest.approx(float((logits.argmax(dim=1) == test.labels).double().mean()))
    loss = torch.nn.functional.cross_entropy(logits, test.labels)
    assert facts["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_features_are_the_encoders_that_was_asked_for(shards, pretrained, tmp_path):
    attempt = attempt_at(tmp_path)
    found = {uri: features(shards, attempt, Part("test", 0, 1), uri=uri).values for uri in ("", pretrained.store.uri)}
    trained, untrained = ViTEncoder(encoder_config()), ViTEncoder(encoder_config())
    trained.load_state_dict(read_weights(pretrained.store, ENCODER))
    initialise(untrained, generator=torch.Generator().manual_seed(SEED))
    assert found[""].shape == (TEST, 16)
    assert not torch.allclose(found[""], found[pretrained.store.uri], atol=0.1)
    # the class token after the final norm has mean 0 and variance 1 over its width, but for the norm's trained scale
    torch.testing.assert_close(found[""].mean(dim=1), torch.zeros(TEST), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[""].std(dim=1, correction=0), torch.ones(TEST), rtol=0, atol=1e-3)


def test_parts_of_a_split_are_the_split(shards, tmp_path):
    """However many tasks take the features: the same images in the same order."""
    attempt = attempt_at(tmp_path)
    whole = features(shards, attempt, Part("train", 0, 1))
    assert len(whole.labels) == TRAIN
    for count in (2, 7, 70):
        parts = joined([features(shards, attempt, Part("train", index, count)) for index in range(count)])
        assert torch.equal(parts.labels, whole.labels)
        torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-5)  # batches of other sizes


def test_the_score_does_not_depend_on_the_number_of_tasks(shards, tmp_path, monkeypatch):
    scores = []
    for images in (2048, 9):
        monkeypatch.setattr(stage, "IMAGES_PER_TASK", images)
        scores.append(linear(config("random"), {"shards": shards}, attempt_at(tmp_path / str(images))).facts)
    assert scores[0]["top1"] == scores[1]["top1"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-3)


def test_few_labels_are_equally_many_of_each_class(shards, tmp_path):
    few = features(shards, attempt_at(tmp_path), Part("train", 0, 1), train_labels=9)
    assert few.labels.bincount().tolist() == [3, 3, 3]
    facts = linear(config("random", train_labels=9), {"shards": shards}, attempt_at(tmp_path)).facts
    assert facts["images"] == TEST


def test_fitting_is_the_same_every_time_and_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    values = torch.nn.functional.one_hot(labels, 8).float() * 3 + torch.randn(90, 8, generator=generator) * 0.1
    train = stage.Features(values, labels)
    heads = [fit(train, config("random").probe, num_classes=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert (heads[0](values).argmax(dim=1) == labels).all()


def test_images_without_labels_are_passed_over(unlabelled, partly_labelled, tmp_path):
    assert linear(config("random"), {"shards": unlabelled}, attempt_at(tmp_path)).facts == {"skipped": "no labels"}
    facts = linear(config("random"), {"shards": partly_labelled}, attempt_at(tmp_path)).facts
    assert facts["images"] == TEST  # the two stray ones are not counted
