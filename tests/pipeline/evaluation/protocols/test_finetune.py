"""Fine-tuning as a whole on one and two workers: it scores the requested weights over all test images."""

import io
import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, save
from sklearn.metrics import accuracy_score
from training_kit import (
    SEED,
    TEST,
    TOTAL_STEPS,
    TRAIN,
    StopAfter,
    attempt_at,
    classification_spec,
    encoder_config,
    finetune_recipe,
    resources,
)

from mae_core.classification.heads import Classifier
from mae_core.classification.metrics import topk_counts
from mae_core.patches import normalise_pixels
from mae_core.vit import ViTEncoder
from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.schema import NO_LABEL
from pipeline.data.feed.selection import Selection, select
from pipeline.data.images.pictures import AugmentConfig, augment, decode
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.classifiers import CLASSIFIER
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocols.finetune import FinetuneConfig, finetune
from pipeline.graph.step import Attempt, StageInput
from pipeline.storage import FileStore, open_store
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint, resume_point
from pipeline.training.health.stop_reasons import StoreStopSignal
from pipeline.training.loop.loop import train
from pipeline.training.loop.scoring import read_predicted
from pipeline.training.spec.tasks import ClassificationTask
from pipeline.training.spec.train_spec import engine_settings
from pipeline.training.world import enter_world
from pipeline.weights import ENCODER, read_weights


def config(weights: str, **recipe) -> FinetuneConfig:
    return FinetuneConfig(
        encoder=encoder_config(), weights=weights, recipe=finetune_recipe(**recipe), train_labels=None, seed=SEED
    )


def finetune_here(of: FinetuneConfig, inputs: dict[str, StageInput], attempt: Attempt):
    return finetune(of, inputs, attempt)


def test_images(shards: StageInput) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return all test images as evaluation crops them, read without the loader: uint8 [n, H, W, 3], labels [n], sample ids."""
    selection = Selection.all(dataset_address(shards).open(), "test")
    centre = AugmentConfig(kind="center", flip=False)
    images, labels, ids = [], [], []
    for shard, entry in enumerate(selection.shards):
        rows = selection.rows(shard)
        tar = shards.root.read(entry.key)
        ids += rows.sample_ids.tolist()
        for offset, length, label in zip(rows.offsets, rows.lengths, rows.labels, strict=True):
            picture = augment(decode(tar[offset : offset + length]), torch.zeros(64).numpy(), centre, (16, 16))
            images.append(torch.as_tensor(picture))
            labels.append(int(label))
    return torch.stack(images), torch.tensor(labels), ids


test_images.__test__ = False


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_the_score_is_the_saved_classifiers_over_all_test_images(teams, shards, pretrained, tmp_path, weights):
    inputs = {"shards": shards} | ({"pretrain": pretrained} if weights == "pretrained" else {})
    attempt = attempt_at(tmp_path)
    result = teams(1).run(finetune_here, config(weights), inputs, attempt)[0]
    facts = result.facts
    assert facts["images"] == TEST
    assert facts["labels"] == 60
    images, labels, ids = test_images(shards)
    encoder = encoder_config()
    model = Classifier(ViTEncoder(encoder), num_classes=3, generator=torch.Generator())
    model.load_state_dict(load(attempt.store.read(CLASSIFIER)))
    with torch.inference_mode():
        logits = model.eval()(normalise_pixels(images, mean=encoder.pixel_mean, std=encoder.pixel_std))
    counts = topk_counts(logits, labels)
    assert facts["top1"] == counts.top1
    assert facts["top5"] == 1.0  # of three classes
    assert facts["loss"] == pytest.approx(counts.loss, rel=1e-5)
    table = pq.read_table(io.BytesIO(attempt.store.read(PREDICTIONS))).to_pydict()
    in_order_of_id = torch.argsort(torch.tensor(ids))
    assert table["sample_id"] == sorted(ids)
    assert table["label"] == labels[in_order_of_id].tolist()
    assert [row[:3] for row in table["top5"]] == logits.sort(descending=True).indices[in_order_of_id].tolist()
    rows = [json.loads(line) for line in attempt.store.read("history.jsonl").splitlines()]
    assert len(rows) == facts["global_step"] == 19  # 4 epochs of 60 in batches of 13
    assert rows[-1]["loss"] < rows[0]["loss"]


def train_here(spec, attempt):
    trained = train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=StoreStopSignal(attempt))
    return dict(trained.scores)


@pytest.mark.parametrize(("workers", "zero_stage"), [(2, 1), pytest.param(3, 3, marks=pytest.mark.system)])
def test_any_number_of_workers_counts_every_test_image_once(teams, shards, tmp_path, workers, zero_stage):
    """23 images on 2 or 3 workers, whose forward passes ZeRO-3 needs in equal number, score as on one worker."""
    scores, predicted = [], []
    for size, stage in ((1, 1), (workers, zero_stage)):
        attempt = attempt_at(tmp_path / str(size), zero_stage=stage)
        spec = classification_spec(shards, attempt)
        answers = teams(size).run(train_here, spec, attempt)
        columns = read_predicted(attempt.store, answers[0]["predicted_by"])
        predicted.append({name: column.numpy() for name, column in columns.items()})
        assert all(answer == answers[0] for answer in answers)
        scores.append(answers[0])
    alone, together = scores
    for columns in predicted:  # as scikit-learn counts them
        assert sorted(columns["sample_ids"].tolist()) == sorted(test_images(shards)[2])
        assert accuracy_score(columns["labels"], columns["best"][:, 0]) == alone["top1"]
    by_id = [np.argsort(columns["sample_ids"]) for columns in predicted]
    for name, column in predicted[0].items():
        assert np.array_equal(column[by_id[0]], predicted[1][name][by_id[1]])
    assert together["images"] == alone["images"] == TEST
    assert together["top1"] == alone["top1"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def train_stopped(spec, attempt, *by_rank):
    world = enter_world()
    trained = train(spec, attempt, world=world, tracker=NullTracker(), stop_signal=by_rank[world.rank])
    return asdict(trained)


def test_a_stop_during_the_scoring_leaves_it_to_the_next_run(teams, shards, tmp_path):
    """One of two workers hears it, before its first batch; all steps are saved by then, and none is taken again."""
    never, straight = StopAfter(99), attempt_at(tmp_path / "straight")
    whole = teams(2).run(train_stopped, classification_spec(shards, straight), straight, never, never)[0]
    stopped = attempt_at(tmp_path / "stopped")
    spec, heard = classification_spec(shards, stopped), StopAfter(TOTAL_STEPS)
    for result in teams(2).run(train_stopped, spec, stopped, never, heard):
        assert (result["global_step"], result["stopped"], result["scores"]) == (TOTAL_STEPS, "asked", {})
    fenced = StopAfter(0, "fenced")
    resumed = attempt_at(tmp_path / "stopped")
    assert resumed.continues.endswith(f"step-{TOTAL_STEPS:08d}")
    assert {one.kind for one in teams(2).outcomes(train_stopped, spec, resumed, fenced, never)} == {"Fenced"}
    more_room = StopAfter(0, "resized")
    result = teams(2).run(train_stopped, spec, resumed, never, more_room)[0]
    assert result["scores"] == whole["scores"]
    assert result["ids_digest"] == whole["ids_digest"]


def test_the_encoder_is_the_pretrained_one_and_the_head_is_fresh(pretrained):
    def build(uri: str, seed: int) -> Classifier:
        task = ClassificationTask(
            encoder=encoder_config(),
            encoder_uri=uri,
            num_classes=3,
            weight_decay=0.0,
            layer_decay=0.75,
            drop_path=0.0,
            label_smoothing=0.0,
            seed=seed,
        )
        return task.build().module.model

    reference = ViTEncoder(encoder_config())
    reference.load_state_dict(read_weights(pretrained.store, ENCODER))
    reference.norm = torch.nn.Identity()  # the classifier pools before a norm of its own
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = reference.encode(pixels, pool="mean")
        from_pretrained = build(pretrained.store.uri, seed=1).encoder.encode(pixels, pool="mean")
        from_random = build("", seed=1).encoder.encode(pixels, pool="mean")
    assert torch.equal(from_pretrained, expected)
    assert not torch.allclose(from_random, expected, atol=0.1)
    heads = [build(pretrained.store.uri, seed=seed).head.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_images_without_labels_are_skipped(unlabelled, tmp_path):
    attempt = attempt_at(tmp_path)
    result = finetune(config("random"), {"shards": unlabelled}, attempt)
    assert (result.facts, result.files) == ({"skipped": "no labels"}, ())
    assert list(attempt.store.list()) == []


def test_a_dataset_without_a_test_split_is_skipped(shards, tmp_path):
    lacking = replace(shards, facts=dict(shards.facts) | {"splits": ["train"]})
    result = finetune(config("random"), {"shards": lacking}, attempt_at(tmp_path))
    assert result.facts == {"skipped": "no test split"}


def test_stray_images_without_a_label_are_neither_learnt_nor_scored(teams, partly_labelled, tmp_path):
    manifest = dataset_address(partly_labelled).open()
    everything, labelled = (select(manifest, "train", which, seed=0) for which in ("all", "labelled"))
    assert int(everything.counts.sum()) == TRAIN + 5
    assert int(labelled.counts.sum()) == TRAIN
    assert all((labelled.rows(shard).labels != NO_LABEL).all() for shard in range(len(labelled.shards)))
    attempt = attempt_at(tmp_path)
    facts = teams(1).run(finetune_here, config("random", epochs=2), {"shards": partly_labelled}, attempt)[0].facts
    assert facts["images"] == TEST
    assert facts["global_step"] == 10


STRONG = {
    "global_batch": 14,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.2,
    "augment": AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25),
}


def history_here(spec, attempt, stop):
    train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop)
    with open_checkpoint(attempt.root, resume_point(attempt.root)) as checkpoint:
        return [row["loss"] for row in checkpoint.history()], {
            name: w.numpy() for name, w in checkpoint.weights().items()
        }


def test_mixed_and_augmented_images_are_the_same_on_any_number_of_workers_and_after_a_resume(teams, shards, tmp_path):
    """Pairs stay together: on 1 worker, on 2 with an odd micro-batch, and when a stop comes in between."""
    found = []
    for name, size, micro_batch in (("one", 1, 14), ("two", 2, 3)):
        attempt = attempt_at(tmp_path / name, micro_batch=micro_batch)
        spec = classification_spec(shards, attempt, **STRONG)
        found.append(teams(size).run(history_here, spec, attempt, StopAfter(99))[0][0])
    assert len(found[0]) == 9  # 2 epochs of 60 in batches of 14
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    attempt = attempt_at(tmp_path / "stopped", micro_batch=14)
    spec = classification_spec(shards, attempt, **STRONG)
    teams(1).run(history_here, spec, attempt, StopAfter(4))
    losses, weights = teams(1).run(history_here, spec, attempt_at(tmp_path / "stopped", micro_batch=14), StopAfter(99))[
        0
    ]
    assert losses == found[0]
    whole = open_checkpoint(open_store(str(tmp_path / "one")), resume_point(open_store(str(tmp_path / "one"))))
    with whole as checkpoint:
        assert all(np.array_equal(weights[name], value.numpy()) for name, value in checkpoint.weights().items())


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ConfigError, match="global_batch=13 is odd, but mixup and cutmix mix pairs: write 14"):
        finetune_recipe(mixup=0.8)
    assert (
        engine_settings(finetune_recipe(global_batch=14, cutmix=1.0), resources(micro_batch=1), workers=2).micro_batch
        == 2
    )


def test_a_checkpoint_of_another_encoder_is_refused_with_what_differs(pretrained, tmp_path):
    def build(**changes):
        task = ClassificationTask(
            encoder=replace(encoder_config(), **changes),
            encoder_uri=uri,
            num_classes=3,
            weight_decay=0.0,
            layer_decay=1.0,
            drop_path=0.0,
            label_smoothing=0.0,
            seed=0,
        )
        return task.build()

    uri = pretrained.store.uri
    with pytest.raises(
        ConfigError, match=r"holds another encoder: depth=2 instead of 3, num_heads=2 instead of 4\. Write these"
    ):
        build(depth=3, num_heads=4)
    with pytest.raises(
        ConfigError, match=r"another encoder: pixel_mean=\(0.485, 0.456, 0.406\) instead of \(0.5, 0.5, 0.5\)"
    ):
        build(pixel_mean=(0.5, 0.5, 0.5))
    other = FileStore(tmp_path)
    other.write("config.json", pretrained.store.read("config.json"))
    weights = read_weights(pretrained.store, ENCODER)
    other.write(ENCODER, save({**weights, "norm.weight": torch.zeros(3)}))
    uri = other.uri
    with pytest.raises(DataError, match=r"does not fit its config.json: norm.weight is \[3\] instead of \[16\]"):
        build()
