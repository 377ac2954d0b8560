"""`mae evaluate`: each kind of weights through the whole graph, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_kit import CLASSIFIERS, CONFIG, KINDS, official
from run_kit import Silent, facts, mae, migrated_database, states, write_images

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import ConfigError, DataError
from pipeline.graph.receipts import read_receipt
from pipeline.runs.foreign.evaluation import evaluation_of
from pipeline.runs.foreign.libraries import our_outputs, timm_outputs, transformers_outputs
from pipeline.runs.run import run_pipeline
from pipeline.runs.summary import RunSummary
from pipeline.runs.workflow import build
from pipeline.storage import open_store
from pipeline.weights import StatedFields, read_given, understood

__all__ = ["migrated_database"]  # a fixture

NOT_TRACKED = ("tracking.uri=none", "data.test_share=0.3", "data.min_shards=2")
HEADS = {"num_heads": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "pets", 40)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """One store for all kinds: they share the data, and no step of the weights."""
    return str(tmp_path_factory.mktemp("store"))


def go(weights: Path, data: Path, store: str, *, protocols: str = "knn", **more) -> RunSummary:
    given = {"options": HEADS, "overrides": NOT_TRACKED} | more
    _, config = evaluation_of(weights, str(data), protocols=protocols, store=store, **given)
    return run_pipeline(config, executor="in_process", display=Silent())


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_weights_is_evaluated(tmp_path, images, store, kind):
    weights = KINDS[kind](tmp_path)
    options = {} if kind == "ours" else HEADS
    summary = go(weights, images, store, options=options)
    assert summary.verdict == "done", [str(one.error) for one in summary.outcomes if one.error]
    assert list(states(summary)) == [
        "snapshot",
        "shard",
        "import",
        "knn-pets-pretrained-s0",
        "knn-pets-random-s0",
        "report",
    ]
    scores = {one.encoder: one for one in summary.scores}
    assert scores["pretrained"].images == scores["random"].images > 0
    page = open_store(f"file://{Path(summary.addresses['report']).parent}").read("index.html").decode()
    assert str(weights) in page
    assert "mae evaluate" in page

    # what is scored computes what the library computes
    given = read_given(weights, StatedFields(**options))
    assert facts(summary, "import")["sha256"] == given.facts.sha256
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = our_outputs(given, pixels).tokens
    library = transformers_outputs if given.facts.layout.startswith("hf_") else timm_outputs
    theirs = library(weights, given, pixels, prefix=None)
    assert not isinstance(theirs, str), theirs
    # fp32 through two blocks of width 32: worst 4e-6; a forgotten LayerScale or register is above 1e-1
    torch.testing.assert_close(ours, theirs.tokens, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_is_scored_with_its_own_head(tmp_path, images, store, kind):
    weights = CLASSIFIERS[kind](tmp_path, 2)
    summary = go(weights, images, store, protocols="own_head")
    assert summary.verdict == "done", [str(one.error) for one in summary.outcomes if one.error]
    (score,) = summary.scores
    given = read_given(weights, StatedFields(**HEADS))
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    library = transformers_outputs if given.facts.layout.startswith("hf_") else timm_outputs
    theirs = library(weights, given, pixels, prefix=None)
    assert not isinstance(theirs, str), theirs
    ours = our_outputs(given, pixels).scores
    torch.testing.assert_close(ours, theirs.scores, rtol=0, atol=5e-5)
    assert (ours[:, 0] - ours[:, 1]).abs().max() > 0.01
    # the stage's score follows from the images that it says it scored
    assert score.images == DatasetFacts.read(facts(summary, "shard")).counts.splits["test"].served


def test_a_classifier_needs_no_training_images_and_the_right_number_of_classes(tmp_path, images):
    weights = CLASSIFIERS["timm"](tmp_path, 2)
    shutil.copytree(images, tmp_path / "imagenet" / "val")
    summary = go(
        weights,
        tmp_path / "imagenet",
        str(tmp_path / "store"),
        protocols="own_head",
        overrides=("tracking.uri=none", "evaluation.split=val"),
    )
    assert summary.verdict == "done", [str(one.error) for one in summary.outcomes if one.error]
    assert summary.scores[0].images == 40

    three = CLASSIFIERS["timm"](tmp_path / "three", 3)
    failed = go(three, images, str(tmp_path / "store"), protocols="own_head")
    (error,) = [str(one.error) for one in failed.outcomes if one.error]
    assert error.startswith("own_head: the head has 3 classes and the dataset 2 (cat, dog, ...)")
    with pytest.raises(ConfigError, match="has no classification head"):
        evaluation_of(official(tmp_path), str(images), protocols="own_head", options={**HEADS})


def test_the_same_weights_elsewhere_are_the_same_steps(tmp_path, images, store):
    weights = KINDS["timm .pth"](tmp_path)
    go(weights, images, store)
    moved = tmp_path / "copy" / "renamed.pth"
    moved.parent.mkdir()
    shutil.copy(weights, moved)
    again = go(moved, images, store)
    assert set(states(again).values()) == {"cached"}
    # understood otherwise, they are other steps
    other = go(moved, images, store, options={"num_heads": 2})
    assert states(other)["import"] == "done"
    assert states(other)["shard"] == "cached"


def test_weights_that_change_before_they_are_read_fail_the_import(tmp_path, images):
    weights = KINDS["timm .pth"](tmp_path)
    _, config = evaluation_of(
        weights, str(images), protocols="knn", store=str(tmp_path / "s"), options=HEADS, overrides=NOT_TRACKED
    )
    KINDS["module."](tmp_path).replace(weights)
    summary = run_pipeline(config, executor="in_process", display=Silent())
    (error,) = [one.error for one in summary.outcomes if one.error]
    assert isinstance(error, DataError)
    assert "has changed" in str(error)


def test_options_and_set_correct_what_was_understood(tmp_path, images):
    weights = KINDS["timm .pth"](tmp_path)
    given, config = evaluation_of(
        weights,
        str(images),
        options={"image_size": "32", "pixel_mean": "0.5,0.5,0.5"},
        overrides=["model.encoder.num_heads=8", "model.encoder.pixel_std=[0.5, 0.5, 0.5]"],
    )
    encoder = config.model.encoder
    assert (encoder.image_size, encoder.num_heads) == ((32, 32), 8)
    assert (encoder.pixel_mean, encoder.pixel_std) == ((0.5,) * 3, (0.5,) * 3)
    assert given.report.assumed == ("layer_norm_eps=1e-06",)
    assert config.name == "t.pth"
    assert [one.protocols for one in config.evaluation.datasets] == [("knn", "ridge", "linear", "rankme")]
    assert "  heads          8 (stated; --num-heads)" in understood(given)
    learned = KINDS["timm DINOv2 with registers"](tmp_path)
    notes = evaluation_of(learned, str(images), options={**HEADS, "image_size": "32x16"}).given.facts.notes
    assert notes == ("positions resized from 4 x 4 patches to 8 x 4 (bicubic, antialiased, as in timm)",)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"options": {"num_heads": 5}}, "num_heads=5"),
        ({"options": {**HEADS, "pixel_mean": "a,b"}}, "--pixel-mean a,b: write one number per channel"),
        ({"options": {**HEADS, "image_size": "big"}}, "--image-size big: write pixels"),
        ({"options": HEADS, "overrides": ["model.encoder.depth=3"]}, "--set model.encoder: the encoder's form"),
        ({"options": HEADS, "protocols": "knn,nearest"}, "--protocols knn,nearest: nearest is unknown"),
        ({"options": HEADS, "overrides": ["data.sauce=1"]}, "--set: data.sauce is not a field"),
        ({"options": HEADS, "prefix": "teacher"}, "prefix='teacher' leads to none"),
        ({}, "num_heads cannot be read from weights of width 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, images, more, words):
    weights = KINDS["timm .pth"](tmp_path)
    with pytest.raises(ConfigError) as refused:
        evaluation_of(weights, str(images), store=str(tmp_path / "store"), **more)
    assert words in str(refused.value)
    assert not (tmp_path / "store").exists()


def test_all_protocols_are_those_that_the_weights_allow(tmp_path, images):
    _, plain = evaluation_of(KINDS["timm .pth"](tmp_path), str(images), protocols="all", options=HEADS)
    assert "own_head" not in plain.evaluation.datasets[0].protocols
    _, config = evaluation_of(
        CLASSIFIERS["timm"](tmp_path, 2),
        str(images),
        protocols="all",
        options=HEADS,
        overrides=["evaluation.partial.blocks=[0, 1]"],
    )
    assert {"own_head", "finetune", "partial"} <= set(config.evaluation.datasets[0].protocols)
    assert {one.kind for one in build(config)} == {"snapshot", "shard", "import", "evaluate", "report"}


def test_the_command_tells_what_it_understood_and_ends_with_json(tmp_path, images, migrated_database):
    weights, folder = KINDS["timm .pth"](tmp_path), tmp_path / "store"
    folder.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    arguments = (
        "evaluate",
        weights,
        "--data",
        images,
        "--store",
        folder,
        "--protocols",
        "knn",
        "--in-process",
        "--json",
    )
    done = mae(*arguments, "--num-heads", "4", "--set", "data.test_share=0.3")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == str(weights)
    assert lines[1].startswith("  layout         timm, 27,")
    said = json.loads(done.stdout)
    assert said["weights"]["layout"] == "timm"
    assert set(said["scores"]["pets"]["knn"]) == {"pretrained", "random"}
    step = next(step for step in said["steps"] if step["kind"] == "import")
    receipt = read_receipt(open_store(step["uri"]))
    assert receipt is not None
    assert {file.key for file in receipt.files} == {"encoder.safetensors", "config.json"}

    from pipeline.tracking.connection import client_of

    run = client_of(f"sqlite:///{folder / 'mlflow.db'}").get_run(said["run"])
    assert run.data.tags["mae.kind"] == "evaluate"
    assert "score/knn/pets/pretrained" in run.data.metrics
    assert run.data.params["weights.sha256"] == said["weights"]["sha256"]
    assert CONFIG.embed_dim == int(run.data.params["model.encoder.embed_dim"])
