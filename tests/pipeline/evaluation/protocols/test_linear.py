"""The linear probe as a whole: it scores the requested weights and counts every test image once."""

import io

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from training_kit import SEED, TEST, attempt_at, encoder_config

from pipeline.data.dataset.address import dataset_address
from pipeline.evaluation import features as features_module
from pipeline.evaluation.encoders import encoder_source
from pipeline.evaluation.features import FeatureRequest, Features, extract_features
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocols.linear import PROBE, LinearConfig, LinearSettings, fit, linear


def config(weights: str, train_labels: int | None = None) -> LinearConfig:
    probe = LinearSettings(epochs=60, batch=20, base_lr=2.0, warmup_epochs=2.0)
    return LinearConfig(encoder=encoder_config(), weights=weights, probe=probe, train_labels=train_labels, seed=SEED)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_score_is_the_saved_probes_over_all_test_images(shards, pretrained, tmp_path, weights):
    inputs = {"shards": shards} | ({"pretrain": pretrained} if weights == "pretrained" else {})
    attempt = attempt_at(tmp_path / "step")
    facts = linear(config(weights), inputs, attempt).facts
    assert facts["images"] == TEST
    assert facts["top1"] > 0.6  # three classes; 1/3 by chance
    probe = load(attempt.store.read(PROBE))
    request = FeatureRequest(
        encoder=encoder_source(config(weights), inputs),
        dataset=dataset_address(shards),
        split="test",
        samples="all",
        seed=SEED,
        pool="cls",
    )
    test = extract_features(request, attempt_at(tmp_path / "elsewhere" / "step"))  # not from the same cache
    logits = (test.values - probe["mean"]) / probe["deviation"] @ probe["weight"].T + probe["bias"]
    assert facts["top1"] == pytest.approx(float((logits.argmax(dim=1) == test.labels).double().mean()))
    predicted = pq.read_table(io.BytesIO(attempt.store.read(PREDICTIONS)))
    assert predicted["sample_id"].to_pylist() == test.sample_ids.sort().values.tolist()
    hits = [row["top5"][0] == row["label"] for row in predicted.to_pylist()]
    assert facts["top1"] == sum(hits) / TEST
    loss = torch.nn.functional.cross_entropy(logits, test.labels)
    assert facts["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_score_does_not_depend_on_the_number_of_tasks(shards, tmp_path, monkeypatch):
    scores = []
    for images in (2048, 9):
        monkeypatch.setattr(features_module, "IMAGES_PER_TASK", images)
        scores.append(linear(config("random"), {"shards": shards}, attempt_at(tmp_path / str(images) / "step")).facts)
    assert scores[0]["top1"] == scores[1]["top1"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-3)


def test_few_labels_still_score_every_test_image(shards, tmp_path):
    facts = linear(config("random", train_labels=9), {"shards": shards}, attempt_at(tmp_path / "step")).facts
    assert facts["images"] == TEST
    assert facts["labels"] == 9


def test_fitting_is_the_same_every_time_and_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    values = torch.nn.functional.one_hot(labels, 8).float() * 3 + torch.randn(90, 8, generator=generator) * 0.1
    train = Features(values, labels, torch.arange(90))
    heads = [fit(train, config("random").probe, num_classes=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert (heads[0](values).argmax(dim=1) == labels).all()


def test_images_without_labels_are_skipped(unlabelled, partly_labelled, tmp_path):
    step = tmp_path / "step"
    assert linear(config("random"), {"shards": unlabelled}, attempt_at(step)).facts == {"skipped": "no labels"}
    facts = linear(config("random"), {"shards": partly_labelled}, attempt_at(step)).facts
    assert facts["images"] == TEST  # the two without a label are not counted
