"""Protocols that score cached features: each equals its oracle, learns from what it should, and needs no more than it must."""

import io
import multiprocessing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from training_kit import SEED, TEST, TRAIN, attempt_at, encoder_config, in_a_process

from pipeline import cluster
from pipeline.data.dataset.address import dataset_address
from pipeline.errors import DataError
from pipeline.evaluation import features as features_module
from pipeline.evaluation.encoders import Initial
from pipeline.evaluation.features import FeatureRequest, Features, extract_features
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocols import rankme as rankme_module
from pipeline.evaluation.protocols.knn import KnnConfig, KnnSettings, knn
from pipeline.evaluation.protocols.linear import LinearConfig, LinearSettings, linear
from pipeline.evaluation.protocols.rankme import MEASURE, RankmeConfig, RankmeSettings, rankme
from pipeline.evaluation.protocols.ridge import RidgeConfig, RidgeSettings, chosen, ridge

COMMON = {"encoder": encoder_config(), "weights": "random", "seed": SEED}


def knn_config(train_labels=None, **settings) -> KnnConfig:
    return KnnConfig(**COMMON, train_labels=train_labels, knn=KnnSettings(**settings))


def ridge_config(train_labels=None, seed=SEED, **settings) -> RidgeConfig:
    return RidgeConfig(**COMMON | {"seed": seed}, train_labels=train_labels, ridge=RidgeSettings(**settings))


def rankme_config(**settings) -> RankmeConfig:
    return RankmeConfig(**COMMON, train_labels=None, rankme=RankmeSettings(**settings))


def features_of(shards, folder, split: str, samples="all") -> Features:
    request = FeatureRequest(
        encoder=Initial(encoder_config(), SEED),
        dataset=dataset_address(shards),
        split=split,
        samples=samples,
        seed=SEED,
        pool="cls",
    )
    return extract_features(request, attempt_at(folder / "elsewhere" / "step"))


def predicted(attempt) -> list[dict]:
    return pq.read_table(io.BytesIO(attempt.store.read(PREDICTIONS))).to_pylist()


def accuracy(rows) -> float:
    return sum(row["top5"][0] == row["label"] for row in rows) / len(rows)


def test_knn_scores_as_scikit_learn_and_its_k_is_not_chosen_on_the_test_split(shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    facts = knn(knn_config(), {"shards": shards}, attempt).facts
    train, test = (features_of(shards, tmp_path, split) for split in ("train", "test"))
    for k in (10, 20, 100, 200):
        oracle = KNeighborsClassifier(
            min(k, TRAIN), metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train.values.numpy().astype(np.float64), train.labels)
        expected = oracle.score(test.values.numpy().astype(np.float64), test.labels)
        assert facts["top1_by_setting"][f"k{k}"] == pytest.approx(expected)
    assert (facts["setting"], facts["images"], facts["labels"]) == ("k20", TEST, TRAIN)
    assert facts["top1"] == facts["top1_by_setting"]["k20"] == accuracy(predicted(attempt))
    assert facts["top5"] == 1  # three classes
    # another k is the score only if the configuration says so, however well it does
    other = attempt_at(tmp_path / "other")
    facts_of_1 = knn(knn_config(k=1, other_k=(20,)), {"shards": shards}, other).facts
    assert facts_of_1["top1"] == facts_of_1["top1_by_setting"]["k1"] == accuracy(predicted(other))
    assert facts_of_1["top1_by_setting"]["k20"] == facts["top1"]


def test_ridge_scores_as_scikit_learn_on_the_same_few_images(shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    facts = ridge(ridge_config(labels_per_class=(1, 5)), {"shards": shards}, attempt).facts
    train, test = (features_of(shards, tmp_path, split) for split in ("train", "test"))
    mean, deviation = train.values.mean(dim=0), train.values.std(dim=0, correction=0)
    few = chosen(train, 5, seed=SEED)
    x, held = ((part - mean) / deviation for part in (train.values[few], test.values))
    # the scores of the penalty that was chosen are among those of scikit-learn's for all penalties
    found = [
        RidgeClassifier(alpha=10.0 ** (power / 2)).fit(x.numpy(), train.labels[few]).score(held.numpy(), test.labels)
        for power in range(-4, 13)
    ]
    assert any(facts["top1"] == pytest.approx(one) for one in found)
    assert (facts["setting"], facts["labels"]) == ("5_per_class", 15)
    assert facts["top1_by_setting"].keys() == {"1_per_class", "5_per_class"}
    assert facts["top1"] == facts["top1_by_setting"]["5_per_class"] == accuracy(predicted(attempt))
    assert facts["top1"] > 0.5  # 1/3 by chance


def test_few_images_are_equally_many_of_each_class_and_part_of_more():
    labels = torch.arange(40) % 3
    labels[labels == 2] = torch.where(torch.arange(40)[labels == 2] < 10, 2, 1)  # three of class 2
    train = Features(torch.zeros(40, 2), labels, torch.arange(100, 140))
    one, four, other = chosen(train, 1, seed=0), chosen(train, 4, seed=0), chosen(train, 4, seed=1)
    assert labels[one].bincount().tolist() == [1, 1, 1]
    assert labels[four].bincount().tolist() == [4, 4, 3]  # all that class 2 has
    assert set(one.tolist()) < set(four.tolist())
    assert set(four.tolist()) != set(other.tolist())


def test_rankme_needs_no_labels(shards, unlabelled, tmp_path):
    facts = rankme(rankme_config(), {"shards": unlabelled}, attempt_at(tmp_path / "step")).facts
    values = features_of(unlabelled, tmp_path, "train").values
    singular = torch.linalg.svdvals(values.double())
    shares = singular / singular.sum() + 1e-7
    assert facts == {
        "measure": MEASURE,
        "value": pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5),
        "images": TRAIN,
        "split": "train",
    }
    assert knn(knn_config(), {"shards": unlabelled}, attempt_at(tmp_path / "step")).facts == {"skipped": "no labels"}
    assert ridge(ridge_config(), {"shards": unlabelled}, attempt_at(tmp_path / "step")).facts == {
        "skipped": "no labels"
    }
    few = rankme(rankme_config(images=10), {"shards": shards}, attempt_at(tmp_path / "few")).facts
    assert few["images"] == 10
    assert 1 < few["value"] <= 10


def test_features_without_a_rank_are_refused_with_a_way_out(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(
        rankme_module, "extract_features", lambda *_: Features(torch.full((4, 3), torch.nan), *[torch.zeros(4)] * 2)
    )
    with pytest.raises(DataError, match=r"rankme on .* have no rank.*may have diverged"):
        rankme(rankme_config(), {"shards": shards}, attempt_at(tmp_path / "step"))


def test_images_without_a_label_are_neither_neighbours_nor_scored(partly_labelled, tmp_path):
    for stage, config in ((knn, knn_config()), (ridge, ridge_config(labels_per_class=(5,)))):
        attempt = attempt_at(tmp_path / stage.__name__ / "step")
        facts = stage(config, {"shards": partly_labelled}, attempt).facts
        assert facts["images"] == TEST == len(predicted(attempt))


def scores_on_ray(shards, folder, workers: int) -> list[dict]:
    """Score on a Ray cluster with this many CPUs and workers."""
    features_module.IMAGES_PER_TASK = 9
    cluster.connect(cpus=workers)
    try:
        return scores(shards, folder, executor="ray", workers=workers)
    finally:
        cluster.disconnect()


def scores(shards, folder, **where) -> list[dict]:
    probe = LinearSettings(epochs=60, batch=20, base_lr=2.0, warmup_epochs=2.0)
    given = (
        (knn, knn_config()),
        (ridge, ridge_config()),
        (rankme, rankme_config()),
        (linear, LinearConfig(**COMMON, train_labels=None, probe=probe)),
    )
    return [
        dict(stage(config, {"shards": shards}, attempt_at(folder / stage.__name__, **where)).facts)
        for stage, config in given
    ]


@pytest.mark.system
def test_scores_are_equal_on_one_and_two_workers(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "IMAGES_PER_TASK", 9)
    here = scores(shards, tmp_path / "here")
    for workers in (1, 2):
        there = in_a_process(scores_on_ray, shards, tmp_path / str(workers), workers)
        for one, other in zip(here, there, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert other[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value), name


def features_of_step(shards, folder, name) -> Features:
    request = FeatureRequest(
        encoder=Initial(encoder_config(), SEED),
        dataset=dataset_address(shards),
        split="train",
        samples="all",
        seed=SEED,
        pool="cls",
    )
    return extract_features(request, attempt_at(folder / name))


def counted(shards, folder, barrier, name, computed) -> None:
    """Extract features in a process of its own and count the parts that it computed."""
    features_module.IMAGES_PER_TASK = 9
    compute = features_module._compute

    def counting(*arguments, **named):
        with computed.get_lock():
            computed.value += 1
        return compute(*arguments, **named)

    features_module._compute = counting
    barrier.wait(60)
    features_of_step(shards, folder, name)


def test_two_steps_at_the_same_time_compute_each_part_once(shards, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, computed = context.Barrier(2), context.Value("i", 0)
    both = [
        context.Process(target=counted, args=(shards, tmp_path, barrier, name, computed)) for name in ("one", "other")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert computed.value == len(list(tmp_path.rglob("part-*.safetensors"))) == -(-TRAIN // 9)
