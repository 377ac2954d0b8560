"""Three real runs in one store, compared and traced: by the store alone, and by MLflow."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_kit import Silent, document, migrated_database, write_config, write_images
from typer.testing import CliRunner, Result

from jobs.cli import app
from pipeline import tracking
from pipeline.config import load_config
from pipeline.errors import DataError
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.runs.comparing.finding import find, find_all
from pipeline.runs.comparing.history import FinishedStep, History
from pipeline.runs.run import run_pipeline
from pipeline.storage import open_store
from pipeline.tracking import names

__all__ = ["migrated_database"]
IMAGES = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Runs that differ in the mask ratio and the seed, and one that learns from fewer labels. No MLflow."""
    folder = tmp_path_factory.mktemp("compared")
    content = document(folder / "store", write_images(folder / "images", IMAGES)) | {"tracking": {"uri": "none"}}
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear", "knn"]}]
    content["evaluation"]["seeds"] = 2
    path = write_config(folder / "run.yaml", content)
    for overrides in ([], ["model.mask_ratio=0.5", "seed=7"], ["evaluation.train_labels=12"]):
        summary = run_pipeline(load_config(path, overrides), executor="in_process", display=Silent())
        assert summary.verdict == "done"
    return folder / "store"


@pytest.fixture(autouse=True)
def no_tracking_from_outside(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def reports(store: Path) -> dict[str, str]:
    """Return the directory of each run's report, by what sets the run apart."""
    found = {}
    for directory in sorted(store.glob("report-*")):
        config = json.loads((directory / "receipt.json").read_text())["identity"]["config"]["config"]
        labels, ratio = config["evaluation"]["train_labels"], config["model"]["mask_ratio"]
        found["few" if labels else str(ratio)] = str(directory)
    return found


def mae(*arguments: object) -> Result:
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done


def compared(store: Path, *which: str, **options: object) -> dict:
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = mae(*(reports(store)[one] for one in which), "--tracking", "none", "--json", *flags)
    return json.loads(done.stdout)


def test_a_store_stands_for_all_its_runs(store):
    shown = json.loads(mae(store, "--tracking", "none", "--json").stdout)
    assert {run["name"] for run in shown["runs"]} == {Path(path).name for path in reports(store).values()}
    table = mae(store, "--tracking", "none").stdout
    assert "mask_ratio=0.5" in table
    assert "ViT 12x1/4" in table
    assert "warning: " in table


def test_rows_have_what_the_receipts_say(store):
    one, _ = compared(store, "0.75", "0.5")["runs"]
    assert (one["data"], one["size"]) == ("toy", "ViT 12x1/4")
    steps = History(open_store(str(store))).run_of(Path(reports(store)["0.75"]).name)
    seeds = [steps[f"knn-toy-random-s{seed}"].receipt.facts["top1"] for seed in (0, 1)]
    assert one["scores"]["knn/toy/random"]["values"] == seeds
    assert one["scores"]["knn/toy/random"]["mean"] == pytest.approx(np.mean(seeds))
    assert one["images_per_s"] > 0
    assert one["hours"] > 0
    assert 0 < one["best_loss"] <= one["final_loss"]


def test_differences_are_those_of_the_configuration_and_nothing_else(store):
    shown = compared(store, "0.75", "0.5")
    assert shown["differences"]["config"] == {"model.mask_ratio": [0.75, 0.5], "seed": [0, 7]}
    assert shown["differences"]["data"] == {}
    assert shown["differences"]["code"] == {}
    assert shown["warnings"] == []


def test_scores_from_other_labels_are_not_comparable(store):
    lines = compared(store, "0.75", "few")["warnings"]
    assert len(lines) == 1
    assert lines[0].endswith("knn/toy, linear/toy: train_labels all and 12")


def test_paired_tests_are_on_the_kept_predictions(store):
    tests = {one["score"]: one for one in compared(store, "0.75", "0.5")["tests"]}
    assert set(tests) == {"knn/toy", "linear/toy"}
    steps = {which: History(open_store(str(store))).run_of(Path(path).name) for which, path in reports(store).items()}
    accuracy = {
        which: np.mean([steps[which][f"knn-toy-pretrained-s{seed}"].receipt.facts["top1"] for seed in (0, 1)])
        for which in ("0.75", "0.5")
    }
    assert tests["knn/toy"]["difference"] == pytest.approx(100 * (accuracy["0.5"] - accuracy["0.75"]))
    assert tests["knn/toy"]["images"] == steps["0.5"]["knn-toy-pretrained-s0"].receipt.facts["images"]
    assert all(one["p"] <= one["p_holm"] <= 1 and one["seeds"] == 2 for one in tests.values())


def test_predictions_that_are_not_of_the_same_images_are_not_paired(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "store")
    (step,) = (
        History(open_store(str(copy))).run_of(Path(reports(copy)["0.5"]).name)[name]
        for name in ["knn-toy-pretrained-s0"]
    )
    path = Path(step.files.uri.removeprefix("file://")) / PREDICTIONS
    shorten(path)
    shown = compared(copy, "0.75", "0.5")
    assert [one["score"] for one in shown["tests"]] == ["linear/toy"]
    assert any("knn/toy: no paired test, as other images were scored" in note for note in shown["notes"])


def shorten(path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pq.read_table(path).slice(1), path)


def test_reconstructions_are_of_the_same_held_out_images_whatever_the_seed(store):
    panels = [np.load(path) for path in sorted(store.glob("pretrain-*/g0001/reconstructions.npz"))]
    assert len(panels) == 2
    assert panels[0]["sample_ids"].tolist() == panels[1]["sample_ids"].tolist()
    np.testing.assert_array_equal(panels[0]["images"][:, 0], panels[1]["images"][:, 0])
    assert compared(store, "0.75", "0.5")["notes"] == []


def test_the_page_holds_everything_and_needs_no_network(store, tmp_path):
    shown = compared(store, "0.75", "0.5", "few", out=tmp_path / "page")
    html = Path(shown["page"]).read_text()
    own, _, script = html.rpartition("const specs = ")
    specs = json.JSONDecoder().raw_decode(script)[0]
    assert {"loss", "scores", "tests"} <= set(specs)
    before_runtime = own.partition("<script>")[0]
    assert not re.findall(r"""(?:src|href)=(?!"data:)|url\(|@import""", before_runtime)
    assert "Not comparable" in before_runtime
    assert before_runtime.count('alt="reconstruction, ') == 3 * 4
    for row in shown["runs"]:
        assert row["name"] in before_runtime


# --- lineage ----------------------------------------------------------------------------------------------------------


def traced(*arguments: object) -> dict:
    return json.loads(mae(*arguments, "--lineage", "--tracking", "none", "--json").stdout)


def kinds(lineage: dict) -> list[str]:
    return [node["kind"] for node in lineage["nodes"].values()]


def test_a_score_leads_back_to_the_source(store):
    lineage = traced(reports(store)["0.5"])
    node = next(one for one in lineage["nodes"].values() if one["name"] == "knn-toy-pretrained-s0")
    seen = [node["kind"]]
    while node["below"]:
        node = lineage["nodes"][node["below"][0]]
        seen.append(node["kind"])
    assert seen == ["score", "encoder", "checkpoint", "dataset", "shards", "listing", "source"]
    assert node["name"].endswith("/images")
    assert all(
        one["fingerprint"] and one["uri"] and one["time"] for one in lineage["nodes"].values() if one["kind"] == "score"
    )
    tree = mae(reports(store)["0.5"], "--lineage", "--tracking", "none").stdout
    assert tree.count("encoder pretrain") == 4
    assert tree.count("(as above)") > 4


def shard_of(store: Path, split: str) -> Path:
    import pyarrow.parquet as pq

    (folder,) = store.glob("shard-*")
    rows = pq.read_table(folder / "g0001" / "shards.parquet").to_pylist()
    return folder / next(row["key"] for row in rows if row["split"] == split)


def test_a_training_shard_leads_to_every_score_and_a_test_shard_to_those_that_it_decides(store):
    lineage = traced(shard_of(store, "train"))
    evaluations = len(list(store.glob("*-toy-*-s[01]-*/receipt.json")))
    assert kinds(lineage).count("score") == evaluations
    assert kinds(lineage).count("encoder") == 2
    held_out = traced(shard_of(store, "test"))
    assert kinds(held_out).count("score") == evaluations
    assert "encoder" not in kinds(held_out)
    assert held_out["notes"] == [f"{evaluations} scores depend on it"]


def test_an_image_is_found_by_its_path_in_the_source(store):
    image = store.parent / "images" / "cat" / "0000.png"
    lineage = traced(image, "--store", store)
    assert lineage["nodes"]["file"]["kind"] == "image"
    assert traced("cat/0000.png", "--store", store)["nodes"] == lineage["nodes"]


def test_an_encoder_leads_to_its_own_scores(store):
    encoder = next(store.glob("pretrain-*/g0001/encoder.safetensors"))
    lineage = traced(encoder)
    owned = [
        path
        for path in store.glob("*-pretrained-*/receipt.json")
        if encoder.parent.parent.name.rpartition("-")[2] in path.read_text()
    ]
    assert kinds(lineage).count("score") == len(owned)


def test_a_file_that_nobody_knows_is_refused_with_the_way_out(store):
    done = CliRunner().invoke(
        app, ["compare", "/nowhere/cat.png", "--lineage", "--tracking", "none", "--store", str(store)]
    )
    assert isinstance(done.exception, DataError)
    assert "--store STORE" in str(done.exception)


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow(store, tmp_path_factory, migrated_database) -> str:
    """An MLflow with the runs of the store and others of the same name."""
    database = tmp_path_factory.mktemp("tracked") / "mlflow.db"
    shutil.copy(migrated_database, database)
    uri = f"sqlite:///{database}"
    client = tracking.client_of(uri)
    experiment = client.create_experiment("mae")
    for which, path in reports(store).items():
        run = History(open_store(str(store))).run_of(Path(path).name)
        children = {f"{names.STEP_TAG}{name}": child(client, experiment, step) for name, step in run.items()}
        tags = {names.RUN_TAG: f"mask-{which}", names.STORE_TAG: store.as_uri(), names.SIZE_TAG: "ViT-B/16", **children}
        made = client.create_run(experiment, run_name=f"images mask-{which}", tags=tags)
        client.log_param(made.info.run_id, "model.mask_ratio", which)
        client.log_metric(made.info.run_id, "score/knn/toy/pretrained", 0.5)
        client.log_metric(made.info.run_id, "score_n/knn/toy/pretrained", 2)
        client.log_metric(made.info.run_id, names.GPU_HOURS, 3.0)
        client.log_metric(made.info.run_id, names.FINAL_LOSS, float("nan"))
        client.set_terminated(made.info.run_id)
    for _ in range(2):
        client.create_run(experiment, run_name="twin", tags={names.RUN_TAG: "twin"})
    client.create_run(experiment, run_name="somebody else's")
    return uri


def child(client, experiment: str, step: FinishedStep) -> str:
    tags = {names.FINGERPRINT_TAG: step.receipt.fingerprint, names.URI_TAG: step.files.uri, names.PARENT_TAG: "0"}
    return client.create_run(experiment, run_name=step.receipt.step, tags=tags).info.run_id


def test_all_runs_are_read_from_the_database_as_mlflows_own_client_reads_them(mlflow):
    quick = {run.run_id: run for run in tracking.parents_in(mlflow)}
    slow = {run.run_id: run for run in tracking.parents_in(mlflow, query="attributes.start_time > 0")}
    assert set(quick) == set(slow)
    assert len(quick) == 5
    for run_id, run in quick.items():
        assert dict(run.tags) == dict(slow[run_id].tags)
        assert (run.name, run.status, run.start_ms) == (slow[run_id].name, slow[run_id].status, slow[run_id].start_ms)
        np.testing.assert_equal(dict(run.metrics), dict(slow[run_id].metrics))
    (run_id, *_) = quick
    assert tracking.runs_by_id(mlflow, [run_id])[run_id].tags == quick[run_id].tags


def test_a_run_is_found_by_either_name_by_its_id_and_by_the_beginning_of_it(mlflow):
    (by_name,) = find(["mask-0.5"], mlflow)
    run_id = by_name.row.run_id
    for target in ("images mask-0.5", run_id, run_id[:6]):
        assert find([target], mlflow)[0].row == by_name.row
    assert len(find(["mask-0.5", run_id], mlflow)) == 1
    assert by_name.row.scores["knn/toy/pretrained"].n == 2


def test_an_unknown_name_lists_near_ones_and_an_ambiguous_one_lists_the_ids(mlflow):
    with pytest.raises(DataError, match=r"no run is named 'mask0.5'.*Near it: .*mask-0.5"):
        find(["mask0.5"], mlflow)
    with pytest.raises(
        DataError, match=r"'twin' is the name of 2 runs. Write 6 digits or more of an id instead:\n  [0-9a-f]{12}"
    ):
        find(["twin"], mlflow)
    with pytest.raises(DataError, match="no MLflow, since tracking is none"):
        find(["mask-0.5"], "")


def test_a_search_in_mlflows_language(mlflow):
    found = find_all(mlflow, query="tags.`mae.run` = 'mask-0.75'")
    assert [one.row.name for one in found] == ["mask-0.75"]
    with pytest.raises(DataError, match="has not a run that matches"):
        find_all(mlflow, query="metrics.`cost/gpu_hours` > 100")


def test_runs_in_mlflow_are_compared_with_what_their_steps_left_in_the_store(mlflow):
    shown = json.loads(mae("mask-0.75", "mask-0.5", "--tracking", mlflow, "--json").stdout)
    one, _ = shown["runs"]
    assert (one["size"], one["gpu_hours"]) == ("ViT-B/16", 3.0)
    assert len(one["scores"]["knn/toy/pretrained"]["values"]) == 2  # of the receipts, which have every seed
    assert {test["score"] for test in shown["tests"]} == {"knn/toy", "linear/toy"}
    assert shown["differences"]["config"] == {"model.mask_ratio": [0.75, 0.5]}


def test_a_run_whose_store_is_away_keeps_its_row_and_a_note_says_so(mlflow, store, tmp_path):
    away = store.rename(tmp_path / "elsewhere")
    try:
        shown = json.loads(mae("mask-0.75", "mask-0.5", "--tracking", mlflow, "--json").stdout)
    finally:
        away.rename(store)
    assert [run["gpu_hours"] for run in shown["runs"]] == [3.0, 3.0]
    assert shown["tests"] == []
    assert sum("not in its store" in note for note in shown["notes"]) == 2
