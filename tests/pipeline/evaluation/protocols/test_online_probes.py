"""Probes through the training loop as a whole: scores, predictions, the choice of a rate, any number of workers, and resumption."""

import io
import json
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from sklearn.metrics import log_loss, top_k_accuracy_score
from test_finetune import test_images
from training_kit import SEED, TEST, TRAIN, StopAfter, attempt_at, encoder_config

from mae_core.classification.probes import AttentiveProbe, EfficientProbe, LinearProbe
from mae_core.patches import normalise_pixels
from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.selection import select
from pipeline.errors import ConfigError
from pipeline.evaluation.encoders import Initial, Pretrained
from pipeline.evaluation.online_probes import PROBE, best_head
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocols import attentive as attentive_protocol
from pipeline.evaluation.protocols import linear_online as linear_protocol
from pipeline.graph.step import Attempt, StageInput
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.audit import audit
from pipeline.training.loop.loop import train
from pipeline.training.spec.spec_json import as_json, from_json
from pipeline.training.world import enter_world

MORE = (0.03, 3.0)
SHORT = {
    "epochs": 3,
    "global_batch": 13,
    "warmup_epochs": 1.0,
    "base_lr": 0.3,
    "trust_coefficient": 0.05,
    "precision": "fp32",
}
PROTOCOLS = {"linear": linear_protocol, "full": attentive_protocol, "efficient": attentive_protocol}
KINDS = pytest.mark.parametrize("kind", PROTOCOLS)


def config(kind: str, weights: str = "random", train_labels: int | None = None, **changes):
    """Return the config of a step with a short training."""
    module, settings = PROTOCOLS[kind], dict(SHORT) | changes
    common = {"encoder": encoder_config(), "weights": weights, "train_labels": train_labels, "seed": SEED}
    if kind == "linear":
        return linear_protocol.LinearOnlineConfig(**common, probe=module.LinearOnlineSettings(**settings))
    settings |= {"kind": kind, "num_queries": 4 if kind == "efficient" else None}
    return attentive_protocol.AttentiveConfig(**common, probe=module.AttentiveSettings(**settings))


def run(kind: str, of, inputs: dict[str, StageInput], attempt: Attempt):
    return PROTOCOLS[kind].PROTOCOL.evaluate(of, inputs, attempt)


def features(source, images: torch.Tensor, *, tokens: bool) -> torch.Tensor:
    encoder = source.load().build()
    with torch.inference_mode():
        found = encoder(normalise_pixels(images, mean=encoder.config.pixel_mean, std=encoder.config.pixel_std))
    return found[:, 1:] if tokens else found[:, 0]


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@KINDS
def test_the_score_is_the_saved_heads_over_all_test_images(teams, shards, pretrained, tmp_path, kind, weights):
    """Against scikit-learn, with the running statistics, whatever became of the rates."""
    inputs = {"shards": shards} | ({"pretrain": pretrained} if weights == "pretrained" else {})
    attempt = attempt_at(tmp_path)
    result = teams(1).run(run, kind, config(kind, weights, more_base_lrs=MORE), inputs, attempt)[0]
    facts, generator = result.facts, torch.Generator()
    head = {
        "linear": lambda: LinearProbe(16, 3, generator=generator),
        "full": lambda: AttentiveProbe(16, 3, num_heads=2, generator=generator),
        "efficient": lambda: EfficientProbe(16, 3, num_queries=4, generator=generator),
    }[kind]()
    saved = load(attempt.store.read(PROBE))
    assert set(saved) == set(head.state_dict()) - {"norm.num_batches_tracked"}
    head.load_state_dict(saved, strict=False)
    images, labels, _ = test_images(shards)
    source = Pretrained(pretrained.store.uri) if weights == "pretrained" else Initial(encoder_config(), SEED)
    with torch.inference_mode():
        logits = head.eval()(features(source, images, tokens=kind != "linear"))
    assert facts["images"] == TEST
    assert facts["top1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1))
    assert facts["top5"] == 1.0  # of three classes
    assert facts["loss"] == pytest.approx(log_loss(labels, logits.double().softmax(dim=1)), rel=1e-4)
    table = pq.read_table(io.BytesIO(attempt.store.read(PREDICTIONS))).to_pydict()
    assert sorted(table["label"]) == sorted(labels.tolist())
    assert [row[3:] for row in table["top5"]] == [[-1, -1]] * TEST
    right = sum(label == row[0] for label, row in zip(table["label"], table["top5"], strict=True))
    assert right / TEST == facts["top1"]
    assert result.files == (PROBE, PREDICTIONS)


@KINDS
def test_the_rate_is_chosen_by_the_held_out_tenth_and_all_rates_are_told(teams, shards, tmp_path, kind):
    attempt = attempt_at(tmp_path)
    facts = teams(1).run(run, kind, config(kind, more_base_lrs=MORE), {"shards": shards}, attempt)[0].facts
    assert (facts["labels"], facts["held_out"]) == (54, 6)  # of 20 images per class
    rates = {one["base_lr"]: one for one in facts["rates"]}
    assert set(rates) == {0.3, *MORE}
    best = max(rates.values(), key=lambda one: (one["held_out_top1"], -one["held_out_loss"], -one["base_lr"]))
    assert facts["base_lr"] == best["base_lr"]
    assert facts["top1"] == best["top1"]
    assert audit(attempt.root, dataset=dataset_address(shards)).agrees


def test_the_best_of_equal_heads_has_the_lower_loss_and_then_the_lower_rate():
    def head(top1: float, loss: float) -> dict[str, float]:
        return {"top1": top1, "loss": loss}

    assert best_head([head(0.5, 1.0), head(0.6, 2.0)], (0.1, 1.0)) == 1
    assert best_head([head(0.5, 1.0), head(0.5, 0.9)], (0.1, 1.0)) == 1
    assert best_head([head(0.5, 1.0), head(0.5, 1.0)], (1.0, 0.1)) == 1


def test_the_held_out_tenth_and_the_rest_are_the_whole_class_by_class(shards):
    manifest = dataset_address(shards).open()

    def ids(part: str, samples="labelled") -> dict[int, int]:
        chosen = select(manifest, "train", samples, seed=SEED, part=part)
        rows = [chosen.rows(shard) for shard in range(len(chosen.shards))]
        return {int(i): int(label) for part in rows for i, label in zip(part.sample_ids, part.labels, strict=True)}

    for samples, held in (("labelled", 2), (30, 1), ("all", 2)):
        kept, held_out = ids("kept", samples), ids("held_out", samples)
        assert kept | held_out == ids("whole", samples)
        assert not kept.keys() & held_out.keys()
        assert [list(held_out.values()).count(label) for label in range(3)] == [held] * 3


def test_one_rate_learns_from_every_label(teams, shards, tmp_path):
    facts = teams(1).run(run, "linear", config("linear"), {"shards": shards}, attempt_at(tmp_path))[0].facts
    assert facts["labels"] == TRAIN
    assert facts["base_lr"] == 0.3
    assert "rates" not in facts
    assert "held_out" not in facts


def test_a_batch_holds_no_image_twice(teams, shards, tmp_path):
    """The default batch of 16384 becomes the 60 images that there are; rate and warmup follow."""
    attempt = attempt_at(tmp_path)
    of = config("linear", global_batch=16384)
    facts = teams(1).run(run, "linear", of, {"shards": shards}, attempt)[0].facts
    rows = [json.loads(line) for line in attempt.store.read("history.jsonl").splitlines()]
    assert facts["global_step"] == len(rows) == 3
    assert rows[1]["lr"] == pytest.approx(0.3 * 60 / 256)


def test_too_few_labels_to_choose_a_rate_by_are_refused(shards, tmp_path):
    of = config("linear", train_labels=12, more_base_lrs=MORE)
    with pytest.raises(ConfigError, match="more_base_lrs: no class has the five labelled images"):
        run("linear", of, {"shards": shards}, attempt_at(tmp_path))


@pytest.mark.parametrize("rates", [(0.3,), (0.0,), (-1.0,)])
def test_rates_are_distinct_and_positive(rates):
    with pytest.raises(ValueError, match="write each once, above 0"):
        config("linear", more_base_lrs=rates)


def test_images_without_labels_are_skipped(unlabelled, tmp_path):
    result = run("linear", config("linear"), {"shards": unlabelled}, attempt_at(tmp_path))
    assert (result.facts, result.files) == ({"skipped": "no labels"}, ())


# ---------------------------------------------------------------------------------------------------------------------
# The loop, with spec and attempt as the stage makes them


def spec_of(kind: str, shards: StageInput, attempt: Attempt, **changes):
    """Return the spec that the stage hands to the loop."""
    from pipeline.evaluation import online_probes as probes

    of = config(kind, more_base_lrs=MORE, **changes)
    heads = probes.Heads(kind=kind, reads="cls" if kind == "linear" else "patches", num_queries=4)
    task = probes._task(of, of.probe, {"shards": shards}, heads)
    return probes._spec(of, of.probe, {"shards": shards}, attempt, task, images=54)


def train_until(spec, attempt, stop):
    """Return the loop's result, and every tensor of its last checkpoint."""
    result = asdict(train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop))
    folder = attempt.root.at(result["checkpoint_key"])
    parts = [load(folder.read(info.key)) for info in folder.list() if info.key.endswith(".safetensors")]
    return result, {name: value.tolist() for part in parts for name, value in part.items()}


@KINDS
def test_one_and_two_workers_agree(teams, shards, tmp_path, kind):
    losses, scores = [], []
    for workers in (1, 2):
        attempt = attempt_at(tmp_path / str(workers))
        results = teams(workers).run(train_until, spec_of(kind, shards, attempt), attempt, StopAfter(99))
        assert all(result["scores"] == results[0][0]["scores"] for result, _ in results)
        scores.append(results[0][0]["scores"])
        folder = attempt.root.at(results[0][0]["checkpoint_key"])
        losses.append([json.loads(line)["loss"] for line in folder.read("history.jsonl").splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for alone, together in zip(scores[0]["heads"], scores[1]["heads"], strict=True):
        assert (alone["top1"], alone["images"]) == (together["top1"], together["images"])
        assert alone["loss"] == pytest.approx(together["loss"], abs=1e-6)
    assert [one["images"] for one in scores[1]["held_out"]["heads"]] == [6] * 3


@KINDS
@pytest.mark.parametrize(("workers", "then"), [(1, 1), (2, 2), (1, 2)])
def test_a_resumed_probe_is_equal_bit_by_bit(teams, shards, tmp_path, kind, workers, then):
    """And up to rounding if it resumes on another number of workers."""
    whole = attempt_at(tmp_path / "whole")
    straight, state = teams(workers).run(train_until, spec_of(kind, shards, whole), whole, StopAfter(99))[0]
    stopped = attempt_at(tmp_path / "stopped")
    spec = spec_of(kind, shards, stopped)
    first, _ = teams(workers).run(train_until, spec, stopped, StopAfter(7))[0]
    assert (first["global_step"], first["stopped"]) == (7, "asked")
    again = attempt_at(tmp_path / "stopped")
    resumed, resumed_state = teams(then).run(train_until, spec, again, StopAfter(99))[0]
    assert resumed["ids_digest"] == straight["ids_digest"]
    assert resumed_state.keys() == state.keys()
    # the encoder's source is known, so no checkpoint holds it
    assert not any("encoder" in name for name in state)
    if then == workers:
        assert resumed["scores"] == straight["scores"]
        assert resumed_state == state
    else:
        assert all(resumed_state[name] == pytest.approx(state[name], abs=1e-5) for name in state)


def test_a_specification_of_a_probe_survives_json(shards, tmp_path):
    attempt = attempt_at(tmp_path)
    spec = spec_of("full", shards, attempt)
    assert spec.holds_out
    again = from_json(json.loads(json.dumps(as_json(spec))), attempt.root)
    assert again == spec
