"""Features are of the requested encoder, do not depend on the number of tasks, and are computed only once."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_kit import SEED, TEST, TRAIN, attempt_at, encoder_config

from mae_core.vit import ViTEncoder, initialise
from pipeline.cluster.tasks import map_tasks
from pipeline.data.dataset.address import DatasetAddress, dataset_address
from pipeline.errors import DataError
from pipeline.evaluation import encoders as encoders_module
from pipeline.evaluation import features as features_module
from pipeline.evaluation.encoders import Initial, Pretrained, WeightsFile, encoder_source
from pipeline.evaluation.features import FOLDER, FeatureRequest, extract_features
from pipeline.evaluation.protocol import ProtocolConfig
from pipeline.weights import ENCODER, read_encoder, read_weights


@pytest.fixture
def request_for(shards):
    def request(**changes) -> FeatureRequest:
        given = {
            "encoder": Initial(encoder_config(), SEED),
            "split": "test",
            "samples": "all",
            "seed": SEED,
            "pool": "cls",
        }
        return FeatureRequest(dataset=dataset_address(shards), **given | changes)

    return request


def test_they_are_of_the_requested_encoder(request_for, pretrained, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    untrained = extract_features(request_for(), attempt).values
    trained = extract_features(request_for(encoder=Pretrained(pretrained.store.uri)), attempt).values
    assert untrained.shape == (TEST, 16)
    assert not torch.allclose(untrained, trained, atol=0.1)
    # the class token comes from the final norm: mean 0 and variance 1 over its width while the norm is untrained
    torch.testing.assert_close(untrained.mean(dim=1), torch.zeros(TEST), rtol=0, atol=1e-5)
    torch.testing.assert_close(untrained.std(dim=1, correction=0), torch.ones(TEST), rtol=0, atol=1e-3)


def test_parts_of_a_split_are_the_split(request_for, tmp_path, monkeypatch):
    whole = extract_features(request_for(split="train"), attempt_at(tmp_path / "1" / "step"))
    assert len(whole.labels) == TRAIN
    for images in (31, 9, 1):
        monkeypatch.setattr(features_module, "IMAGES_PER_TASK", images)
        parts = extract_features(request_for(split="train"), attempt_at(tmp_path / f"of-{images}" / "step"))
        assert torch.equal(parts.labels, whole.labels)
        assert torch.equal(parts.sample_ids, whole.sample_ids)
        torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-5)  # batches of other sizes


def test_few_labels_are_equally_many_of_each_class(request_for, tmp_path):
    few = extract_features(request_for(split="train", samples=9), attempt_at(tmp_path / "step"))
    assert few.labels.bincount().tolist() == [3, 3, 3]


@pytest.fixture
def copied(shards, tmp_path) -> DatasetAddress:
    """The dataset in a folder of its own, so that its images can be deleted."""
    address = dataset_address(shards)
    for uri, name in ((address.root_uri, "root"), (address.manifest_uri, "manifest")):
        shutil.copytree(uri.removeprefix("file://"), tmp_path / name)
    return replace(address, root_uri=(tmp_path / "root").as_uri(), manifest_uri=(tmp_path / "manifest").as_uri())


def test_they_are_computed_once_for_a_set_of_weights_wherever_these_come_from(
    request_for, copied, pretrained, tmp_path
):
    asked = replace(request_for(encoder=Pretrained(pretrained.store.uri)), dataset=copied)
    first = extract_features(asked, attempt_at(tmp_path / "store" / "step-a"))
    shutil.rmtree(tmp_path / "root" / "shards")
    assert all(map(torch.equal, first, extract_features(asked, attempt_at(tmp_path / "store" / "step-b"))))
    folder = Path(pretrained.store.uri.removeprefix("file://"))
    same_weights = replace(asked, encoder=WeightsFile(folder))
    assert all(map(torch.equal, first, extract_features(same_weights, attempt_at(tmp_path / "store" / "step-c"))))
    for other in (
        replace(asked, pool="mean"),
        replace(asked, samples="labelled", split="train"),
        replace(asked, encoder=Initial(encoder_config(), SEED)),
    ):
        with pytest.raises(DataError):  # the cache has nothing for it, and the images are gone
            extract_features(other, attempt_at(tmp_path / "store" / "step-d"))


def test_equal_weights_with_other_heads_are_another_encoder(request_for, tmp_path):
    # no tensor's shape tells the number of heads
    attempt = attempt_at(tmp_path / "step")
    one, other = (
        Initial(replace(encoder_config(), num_heads=heads), SEED) for heads in (encoder_config().num_heads, 1)
    )
    assert one.load().digest == other.load().digest
    first, second = (extract_features(request_for(encoder=source), attempt).values for source in (one, other))
    assert not torch.allclose(first, second, atol=1e-3)


def test_only_missing_parts_are_computed(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "IMAGES_PER_TASK", 9)
    attempt = attempt_at(tmp_path / "store" / "step")
    first = extract_features(request_for(), attempt)
    paths = sorted((tmp_path / "store" / FOLDER).rglob("*.safetensors"))
    written = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert all(map(torch.equal, first, extract_features(request_for(), attempt)))
    again = [path.stat().st_mtime_ns for path in paths]
    assert (again[0], again[2:]) == (written[0], written[2:])
    assert again[1] != written[1]


def test_a_wait_for_another_step_is_said_and_ends_with_computing(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(features_module, "WAIT_S", 0.4)
    attempt, said = attempt_at(tmp_path / "store" / "step"), []
    monkeypatch.setattr(attempt.progress, "say", said.append, raising=False)
    first = extract_features(request_for(), attempt)
    assert said == []
    (folder,) = (tmp_path / "store" / FOLDER).iterdir()
    (part,) = folder.glob("*.safetensors")
    part.unlink()
    with features_module._alone(folder.as_uri(), attempt.progress):
        assert all(map(torch.equal, first, extract_features(request_for(), attempt)))
        waits, gives_up = said
    assert waits == f"waiting up to 0.4 s for another step that is computing the features in {folder.as_uri()}"
    assert gives_up.startswith(f"another step has been computing the features in {folder.as_uri()} for 0.4 s")


def test_a_run_on_gpus_gives_each_worker_a_task_of_several_parts(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "IMAGES_PER_TASK", 9)
    asked = []

    def recorded(function, items, *, executor, need, on_done):
        asked.append((list(items), dict(need)))
        return map_tasks(function, items, executor=executor, need=need, on_done=on_done)

    monkeypatch.setattr(features_module, "map_tasks", recorded)
    on_cpu = extract_features(request_for(split="train"), attempt_at(tmp_path / "cpu" / "step"))
    attempt = attempt_at(tmp_path / "gpu" / "step", use_gpu=True, workers=2, cpus_per_worker=3, decode_workers=4)
    # here without a GPU, so that only the tasks differ
    on_gpu = extract_features(request_for(split="train"), attempt)
    assert asked == [
        ([(0,), (1,), (2,), (3,), (4,), (5,), (6,)], {"CPU": 1}),
        ([(0, 1, 2, 3), (4, 5, 6)], {"CPU": 7, "GPU": 1}),
    ]
    assert all(map(torch.equal, on_cpu, on_gpu))
    # the device is not part of the key: both found the same folder
    (one,), (other,) = ([path.name for path in (tmp_path / where / FOLDER).iterdir()] for where in ("cpu", "gpu"))
    assert one == other


def test_a_drawn_number_of_images_is_part_of_a_larger_one_and_needs_no_labels(request_for, unlabelled, tmp_path):
    address = dataset_address(unlabelled)
    drawn = [
        set(
            extract_features(
                replace(request_for(split="train"), dataset=address, at_most=count, seed=seed),
                attempt_at(tmp_path / "step"),
            ).sample_ids.tolist()
        )
        for count, seed in ((10, 0), (20, 0), (10, 1), (10_000, 0))
    ]
    assert [len(one) for one in drawn] == [10, 20, 10, TRAIN]
    assert drawn[0] < drawn[1]
    assert drawn[0] != drawn[2]


def test_an_encoder_of_another_architecture_or_normalisation_is_refused(pretrained):
    config = ProtocolConfig(encoder=encoder_config(), weights="pretrained", train_labels=None, seed=SEED)
    assert encoder_source(config, {"pretrain": pretrained}) == Pretrained(pretrained.store.uri)
    for change, words in (
        ({"num_heads": 4}, "num_heads is 2 there and 4 in model.encoder"),
        ({"pixel_std": (0.5, 0.5, 0.5)}, r"pixel_std is \[.*\] there and \[0.5, 0.5, 0.5\] in model.encoder"),
    ):
        other = replace(config, encoder=replace(encoder_config(), **change))
        with pytest.raises(DataError, match=f"{words}. Write in model.encoder what is there"):
            encoder_source(other, {"pretrain": pretrained})


def test_a_damaged_part_is_named(request_for, tmp_path):
    extract_features(request_for(), attempt_at(tmp_path / "store" / "step"))
    (part,) = (tmp_path / "store" / FOLDER).rglob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(
        DataError, match=r"part-0000-of-0001\.safetensors: cached features are damaged .*Delete the file"
    ):
        extract_features(request_for(), attempt_at(tmp_path / "store" / "step"))


def test_what_a_weights_file_holds_is_told_once(pretrained, caplog):
    folder = Path(pretrained.store.uri.removeprefix("file://"))
    encoders_module._tell.cache_clear()
    for _ in range(2):
        WeightsFile(folder).load()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "layout mae_pipeline; left out: nothing; assumed: nothing" in line


def test_every_source_knows_the_shape_of_its_encoder(pretrained):
    folder = Path(pretrained.store.uri.removeprefix("file://"))
    for source in (Pretrained(pretrained.store.uri), WeightsFile(folder), Initial(encoder_config(), SEED)):
        assert source.shape() == source.load().config == encoder_config()
    expected = ViTEncoder(encoder_config())
    initialise(expected, generator=torch.Generator().manual_seed(SEED))
    assert all(
        torch.equal(value, Initial(encoder_config(), SEED).load().weights[name])
        for name, value in expected.state_dict().items()
    )
    assert read_encoder(pretrained.store)[0] == encoder_config()
    assert Pretrained(pretrained.store.uri).load().weights.keys() == read_weights(pretrained.store, ENCODER).keys()
