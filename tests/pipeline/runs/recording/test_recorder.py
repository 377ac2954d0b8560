"""What a run leaves in a real MLflow, however it is started, stopped and started again."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from foreign_kit import official
from run_kit import Silent, document, migrated_database, states, store, write_config, write_images

from pipeline import tracking
from pipeline.config import RunConfig, load_config
from pipeline.runs.foreign.evaluation import evaluation_of
from pipeline.runs.run import run_pipeline
from pipeline.runs.summary import RunSummary
from pipeline.tracking import names

__all__ = ["migrated_database", "store"]


class StopsWhen(Silent):
    """Asks the run to stop once a step reports its progress, as a person does with Ctrl-C."""

    step = ""

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        if step_name == self.step:
            self.step = ""
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", 60)


@pytest.fixture(autouse=True)
def no_tracking_from_outside(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def configured(store: Path, images: Path, *overrides: str) -> RunConfig:
    content = document(store, images)
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    return load_config(write_config(images.parent / "run.yaml", content), overrides)


def go(config: RunConfig, display: Silent | None = None) -> RunSummary:
    return run_pipeline(config, executor="in_process", display=display or Silent())


def parents(summary: RunSummary) -> list[Any]:
    client = tracking.client_of(summary.addresses["tracking"])
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if names.RUN_TAG in run.data.tags]


def test_a_run_that_was_stopped_goes_on_under_the_same_parent_with_one_curve(store, images):
    config, display = configured(store, images, "pretrain.epochs=6"), StopsWhen()
    display.step = "pretrain"
    stopped = go(config, display)
    assert (stopped.verdict, states(stopped)["pretrain"]) == ("stopped", "stopped")
    (halfway,) = parents(stopped)
    assert halfway.info.status == "KILLED"
    assert halfway.data.tags[names.NOTE_TAG].startswith("**Stopped")
    summary = go(config)
    assert summary.verdict == "done"
    assert set(states(go(config)).values()) == {"cached"}
    (parent,) = parents(summary)
    assert (parent.info.run_id, parent.info.status, parent.data.tags[names.ATTEMPTS_TAG]) == (
        stopped.run_id,
        "FINISHED",
        "3",
    )
    client = tracking.client_of(summary.addresses["tracking"])
    children = client.search_runs([parent.info.experiment_id], f"tags.`{names.PARENT_TAG}` = '{stopped.run_id}'")
    assert {child.info.run_name for child in children} == states(summary).keys()
    curve = sorted((p.step, p.value) for p in client.get_metric_history(stopped.run_id, names.CURVE))
    child = parent.data.tags[f"{names.STEP_TAG}pretrain"]
    own = sorted((8 * p.step, p.value) for p in client.get_metric_history(child, "train/loss"))
    assert curve == own


def test_a_parent_has_all_that_people_compare(store, images):
    config = configured(store, images, "tracking.usd_per_hour=3", "evaluation.seeds=2")
    summary = go(config)
    (parent,) = parents(summary)
    tags, metrics = parent.data.tags, parent.data.metrics
    assert (tags[names.DATA_TAG], tags[names.SIZE_TAG], tags[names.KIND_TAG]) == ("toy", "ViT 12x1/4", "run")
    assert tags[names.DIFFERS_TAG].startswith("seeds=[0,1] epochs=2")
    assert {
        names.FINAL_LOSS,
        names.BEST_LOSS,
        names.IMAGES_PER_S,
        names.MFU,
        "score_sd/linear/toy/random",
    } <= metrics.keys()
    assert metrics["score_n/linear/toy/pretrained"] == 2
    assert metrics[names.COST_USD] == pytest.approx(3 * metrics[names.CPU_HOURS])
    (given,) = parent.inputs.dataset_inputs
    digest = next(o.receipt.facts["digest"] for o in summary.outcomes if o.step.kind == "shard" and o.receipt)
    assert (given.dataset.name, given.dataset.digest) == ("toy", tracking.short_digest(digest))
    assert [tag.value for tag in given.tags] == ["training and evaluation"]
    client = tracking.client_of(summary.addresses["tracking"])
    child = client.get_run(tags[f"{names.STEP_TAG}pretrain"])
    assert child.data.tags[names.URI_TAG] == summary.addresses["encoder"].rpartition("/")[0]
    assert client.get_model_version_by_alias("tiny", names.BEST_LINEAR_ALIAS).source == child.data.tags[names.URI_TAG]
    assert client.get_experiment(parent.info.experiment_id).name == "mae-toy"


def test_the_configuration_on_the_run_reads_as_the_same_run(store, images, tmp_path):
    summary = go(configured(store, images, "model.mask_ratio=0.5"))
    client = tracking.client_of(summary.addresses["tracking"])
    kept = Path(client.download_artifacts(summary.run_id, "config.yaml", str(tmp_path)))
    assert go(load_config(kept)).run_id == summary.run_id


def test_what_earlier_versions_kept_in_one_experiment_is_linked(store, images):
    before = go(configured(store, images, "tracking.experiment=mae"))
    after = go(configured(store, images))
    assert set(states(after).values()) == {"cached"}
    one, two = sorted(parents(after), key=lambda run: run.info.start_time)
    assert (one.info.run_id, two.info.run_id) == (before.run_id, after.run_id)
    steps = {key: run_id for key, run_id in one.data.tags.items() if key.startswith(names.STEP_TAG)}
    assert steps.items() <= two.data.tags.items()
    assert two.data.metrics[names.FINAL_LOSS] == one.data.metrics[names.FINAL_LOSS]


def test_an_mlflow_that_takes_no_files_fails_no_run(store, images, caplog):
    config = configured(store, images)
    (store / "mlartifacts").write_text("in the way")
    summary = go(config)
    assert summary.verdict == "done"
    (parent,) = parents(summary)
    assert parent.info.status == "FINISHED"
    assert "score/linear/toy/pretrained" in parent.data.metrics
    assert "pictures of the run" in caplog.text


def test_without_tracking_nothing_is_recorded(tmp_path, images):
    config = configured(tmp_path / "store", images, "tracking.uri=none")
    summary = go(config)
    assert (summary.verdict, summary.run_id) == ("done", "")
    assert not list((tmp_path / "store").glob("*.db"))


def test_weights_from_elsewhere_are_a_run_of_their_own_kind(store, images, tmp_path):
    # named by their file, evaluated, and no model of ours to register
    weights = official(tmp_path)
    overrides = ("data.test_share=0.3", "data.min_shards=2")
    _, config = evaluation_of(
        weights, str(images), protocols="knn", store=str(store), options={"num_heads": 4}, overrides=overrides
    )
    summary = go(config)
    (parent,) = parents(summary)
    assert parent.data.tags[names.KIND_TAG] == "evaluate"
    assert parent.info.run_name.startswith("mae.pth test_share=0.3 min_shards=2 · images · ViT 32x2/4")
    assert [tag.value for one in parent.inputs.dataset_inputs for tag in one.tags] == ["evaluation"]
    assert "score/knn/images/pretrained" in parent.data.metrics
    assert "evaluated on images" in parent.data.tags[names.NOTE_TAG]
    assert not tracking.client_of(summary.addresses["tracking"]).search_registered_models()
