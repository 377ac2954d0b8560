"""Scores that cannot be, and listings of older versions that this one reads otherwise, are told before anything trains."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_kit import tar_bytes
from PIL import Image
from run_kit import Silent, document, migrated_database, pictures, store, write_config
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.graph.receipts import RECEIPT
from pipeline.runs.checking.findings import JUDGED, KEPT
from pipeline.runs.run import plan_run, run_pipeline
from pipeline.runs.summary import as_json
from pipeline.storage import open_store

__all__ = ["migrated_database", "store"]
LINEAR = "evaluation.datasets=[{name: toy, protocols: [linear]}]"


@pytest.fixture(autouse=True)
def no_tracking_from_outside(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def fill(source: Path, folders: Sequence[str], per_folder: int = 6) -> Path:
    images = iter(pictures(len(folders) * per_folder))
    for folder in folders:
        (source / folder).mkdir(parents=True)
        for number in range(per_folder):
            (source / folder / f"{number}.png").write_bytes(next(images))
    return source


def configured(tmp_path: Path, store: Path, source: Path, *overrides: str) -> Any:
    return load_config(write_config(tmp_path / "run.yaml", document(store, source)), [LINEAR, *overrides])


def go(config: Any) -> tuple[Any, str]:
    display = Silent()
    summary = run_pipeline(config, executor="in_process", display=display)
    if summary.outcomes[0].state == "done":
        assert any(
            "files" in detail for *_, detail in display.said if detail.startswith(f"listing {config.data.source}: ")
        )
    return summary, "\n".join(" ".join(words) for words in display.said)


def lines(config: Any) -> str:
    return "\n".join(plan_run(config)[1].lines)


def skipped(summary: Any) -> set[str]:
    return {o.receipt.facts.get("skipped") for o in summary.outcomes if o.step.kind == "evaluate"}


@pytest.mark.parametrize(
    ("folders", "reason", "way_out"),
    [
        (["train/cat", "train/dog", "test"], "no labelled image in the test split", "name a file with labels"),
        (["train/cat", "train/dog"], "no test split", "data.split_from: hash to hold out data.test_share"),
        (
            ["train/cat", "train/dog", "val/cat", "val/dog"],
            "no test split",
            "evaluation.split=val scores on val (12 labelled images)",
        ),
        (["train/cat", "test/cat"], "all labelled images of the train split are of one class", "two classes"),
        (["train", "test"], "no labels", "class folders, or name a file with labels in data.labels"),
    ],
)
def test_an_evaluation_that_cannot_be_is_told_in_the_plan(tmp_path, store, folders, reason, way_out):
    config = configured(tmp_path, store, fill(tmp_path / "images", folders))
    (line,) = lines(config).splitlines()
    assert reason in line
    assert way_out in line
    assert len(plan_run(config)[1].tables) == 1


def test_a_run_without_a_test_split_trains_and_one_on_val_is_scored(tmp_path, store):
    source = fill(tmp_path / "images", ["train/cat", "train/dog", "val/cat", "val/dog"])
    summary, said = go(configured(tmp_path, store, source))
    assert (summary.exit_code, skipped(summary)) == (0, {"no test split"})
    assert said.index("evaluation.split=val scores on val") < said.index("pretrain running")
    again, _ = go(configured(tmp_path, store, source, "evaluation.split=val"))
    assert skipped(again) == {None}
    assert {o.step.kind: o.state for o in again.outcomes}["pretrain"] == "cached"
    (scored,) = {o.receipt.facts["images"] for o in again.outcomes if o.step.kind == "evaluate"}
    assert scored == 12


def test_an_empty_test_tar_is_as_if_there_were_none(tmp_path, store):
    source, images = tmp_path / "images", pictures(24)
    source.mkdir()
    members = [m for n in range(24) for m in ((f"{n:02}.png", images[n]), (f"{n:02}.cls", b"%d" % (n % 2)))]
    (source / "train-0.tar").write_bytes(tar_bytes(members))
    (source / "test-0.tar").write_bytes(tar_bytes([]))
    summary, said = go(configured(tmp_path, store, source))
    assert (summary.exit_code, skipped(summary)) == (0, {"the test split serves no image"})
    assert said.index("the test split serves no image") < said.index("pretrain running")


@pytest.mark.parametrize("how", ["before the listing", "after it"])
def test_classes_that_training_lacks_are_refused_before_it(tmp_path, store, how):
    source = fill(tmp_path / "images", ["train/n01", "train/n02", "test/images"])
    config = configured(tmp_path, store, source)
    for _ in range(1 if how == "before the listing" else 2):  # the second time the listing is there
        with pytest.raises(ConfigError, match=r"classes that train has not \(images\).*data\.labels"):
            go(config)
    rows, _ = plan_run(config)
    assert {row.step.kind for row in rows if row.state == "blocked"} >= {"pretrain", "evaluate"}
    assert not list(store.glob("pretrain-*"))
    summary, _ = go(configured(tmp_path, store, source, "evaluation.datasets=[]"))
    assert summary.exit_code == 0


def test_a_protocol_without_labels_is_evaluated_where_the_others_are_not(tmp_path, store):
    source = fill(tmp_path / "images", ["train", "test"], 8)
    setting = "evaluation.datasets=[{name: toy, protocols: [knn, rankme]}]"
    config = configured(tmp_path, store, source, setting, "evaluation.seeds=2")
    (line,) = lines(config).splitlines()
    assert line.startswith("knn-toy: not evaluated: no labels")
    summary, _ = go(config)
    assert summary.exit_code == 0
    assert [(s.protocol, s.encoder, len(s.values), s.images) for s in summary.scores] == [
        ("rankme", "pretrained", 2, 8),
        ("rankme", "random", 2, 8),
    ]
    scored = as_json(summary)["scores"]["toy"]["rankme"]["random"]
    assert (scored["measure"], scored["n"], scored["images"]) == ("effective rank", 2, 8)
    assert scored["sd"] > 0  # each seed has an untrained encoder of its own
    page = Path(summary.addresses["report"]).read_text()
    assert "effective rank of the features of 8 images, no accuracy" in page
    assert "scores.png" not in page


def test_a_protocol_with_variants_is_told_by_their_names(tmp_path, store):
    source = fill(tmp_path / "images", ["train/a", "train/b"])
    config = configured(
        *(tmp_path, store, source),
        "evaluation.datasets=[{name: toy, protocols: [partial]}]",
        "evaluation.partial.blocks=[0, 0.5]",
    )
    said = lines(config)
    assert "partial-0-toy: not evaluated" in said
    assert "partial-0.5-toy: not evaluated" in said


def test_fewer_labels_than_classes_are_refused_before_training(tmp_path, store):
    source = fill(tmp_path / "images", [f"{split}/{name}" for split in ("train", "test") for name in "abc"], 2)
    config = configured(tmp_path, store, source, "evaluation.train_labels=2")
    with pytest.raises(ConfigError, match=r"train_labels=2 is fewer than the 3 classes of .*Write 3 or more"):
        go(config)
    assert not list(store.glob("pretrain-*"))


def test_images_smaller_than_a_patch_are_refused_before_training(tmp_path, store):
    source = fill(tmp_path / "images", ["train/cat", "train/dog", "test/cat", "test/dog"])
    for number, path in enumerate(path for path in source.rglob("*.png") if "train" in path.parts):
        with Image.open(path) as image:
            image.crop((number, 0, number + 4, 3)).save(path)
    config = configured(tmp_path, store, source)
    with pytest.raises(
        ConfigError,
        match=r"short side of 3 pixels or fewer, less than a patch of 4 x 4 .*Write a patch_size of at most 3",
    ):
        go(config)
    assert not list(store.glob("pretrain-*"))


def test_no_image_to_train_on_is_refused(tmp_path, store):
    config = configured(tmp_path, store, fill(tmp_path / "images", ["test/cat", "test/dog"]))
    with pytest.raises(ConfigError, match=r"no image is in the train split, only in test \(12\)"):
        go(config)


def test_a_layout_that_can_be_read_in_two_ways_is_refused_and_nothing_is_written(tmp_path):
    source = fill(tmp_path / "images", ["train/cat", "extra/cat"], 1)
    config = configured(tmp_path, tmp_path / "store", source)
    with pytest.raises(DataError, match="not of others"):
        go(config)
    assert {row.state for row in plan_run(config)[0]} == {"blocked"}
    assert not (tmp_path / "store").exists()


def age(store: Path, **facts: Any) -> Path:
    """Make the snapshot's receipt one of an older version."""
    (path,) = store.glob(f"snapshot-*/{RECEIPT}")
    receipt = json.loads(path.read_text())
    receipt["facts"] = {k: v for k, v in receipt["facts"].items() if k != "understood"} | facts
    path.write_text(json.dumps(receipt))
    return path.parent


def test_a_listing_of_an_older_version_is_compared_once(tmp_path, store):
    source = fill(tmp_path / "images", ["train/cat", "train/dog", "test/cat", "test/dog"], 3)
    config = configured(tmp_path, store, source, "evaluation.datasets=[]")
    go(config)
    root = age(store)
    assert go(config)[0].exit_code == 0
    assert (root / JUDGED).exists()


def test_one_with_a_labels_file_is_told_not_compared(tmp_path, store, caplog):
    source = fill(tmp_path / "images", ["cat", "dog"], 4)
    labels = tmp_path / "labels.csv"
    rows = [f"{path.relative_to(source)},{path.parent.name}\n" for path in source.rglob("*.png")]
    labels.write_text("path,label\n" + "".join(rows))
    config = configured(tmp_path, store, source, "evaluation.datasets=[]", f"data.labels={labels}")
    go(config)
    age(store)
    caplog.clear()
    plan_run(config)
    assert [r.getMessage() for r in caplog.records if "are used as they are: they came from" in r.getMessage()]
    go(config)
    caplog.clear()
    go(config)  # told once
    assert "used as they are" not in caplog.text


def test_a_source_that_is_looked_at_in_part_is_told_in_the_plan(tmp_path, store, monkeypatch):
    config = configured(
        tmp_path, store, fill(tmp_path / "images", ["train/cat", "train/dog", "test/cat", "test/dog"], 3)
    )
    assert "first" not in lines(config)
    monkeypatch.setattr("pipeline.runs.checking.findings.PREVIEW_FILES", 5)
    assert "and stops if the others contradict these" in lines(config)


def test_one_that_is_read_otherwise_now_stops_and_can_be_kept(tmp_path, store):
    source = fill(tmp_path / "images", ["train/cat", "train/dog", "valid/cat", "valid/dog"], 3)
    pool = configured(tmp_path, store, source, "evaluation.datasets=[]", "data.split_from=hash")
    go(pool)  # what older versions made of it
    config = configured(tmp_path, store, source, "evaluation.datasets=[]")
    made = next(step for step in plan_run(pool)[0] if step.step.kind == "snapshot").step
    step = next(step for step in plan_run(config)[0] if step.step.kind == "snapshot").step
    root = open_store(str(store))
    for info in list(root.list(f"{made.directory}/")):
        text = root.read(info.key)
        if info.key.endswith(RECEIPT):
            receipt = json.loads(text) | {"fingerprint": step.fingerprint, "identity": step.identity()}
            receipt["facts"] = {k: v for k, v in receipt["facts"].items() if k != "understood"}
            text = json.dumps(receipt).encode()
        root.write(info.key.replace(made.directory, step.directory), text)
    for look in (go, plan_run):
        with pytest.raises(
            ConfigError, match=r"(?s)classes train, valid\n.*train 6, val 6; classes cat, dog\n.*mae shards keep"
        ):
            look(config)
    done = CliRunner().invoke(app, ["shards", "keep", str(tmp_path / "run.yaml"), "--set", "evaluation.datasets=[]"])
    assert (done.exit_code, done.output) == (0, "kept: snapshot\n")
    assert root.exists(f"{step.directory}/{KEPT}")
    assert go(config)[0].exit_code == 0


def test_a_preview_needs_no_configuration(tmp_path):
    source = fill(tmp_path / "images", ["train2017", "val2017"], 2)
    (source / "x.cr2").write_bytes(b"")
    done = CliRunner().invoke(app, ["shards", "preview", str(source), "--set", "data.split_from=path"])
    assert done.exit_code == 0, done.output
    assert "val2017/0.png" in done.output
    assert "1 .cr2" in done.output
