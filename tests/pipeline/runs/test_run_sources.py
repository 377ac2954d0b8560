"""Whole runs in this process from sources other than folders of images, and from a source that grows."""

import json

import pytest
from data_kit import write_table
from run_kit import (
    Silent,
    document,
    facts,
    migrated_database,
    pictures,
    states,
    store,
    tars,
    write_config,
    write_images,
)
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import load_config
from pipeline.runs.run import plan_run, run_pipeline
from pipeline.runs.sources.refresh import known_parts, next_name
from pipeline.runs.workflow import build
from pipeline.storage import open_store

__all__ = ["migrated_database", "store"]
LINEAR = "evaluation.datasets=[{name: toy, protocols: [linear]}]"


@pytest.fixture(autouse=True)
def no_tracking_from_outside(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def tables(folder):
    columns = {"img": pictures(40), "kind": ["cat" if number % 2 else "dog" for number in range(40)]}
    write_table(folder / "all.parquet", columns)
    return folder


def go(path, *overrides):
    return run_pipeline(load_config(path, [LINEAR, *overrides]), executor="in_process", display=Silent())


@pytest.mark.parametrize(
    ("make", "overrides", "kind"),
    [
        (tars, [], "tars"),
        (tables, ["data.image_column=img", "data.label_column=kind"], "Parquet tables"),
    ],
)
def test_a_whole_run_trains_and_evaluates_from_it_and_does_nothing_again(tmp_path, store, make, overrides, kind):
    source = make(tmp_path / "source")
    path = write_config(tmp_path / "run.yaml", document(store, source))
    before = {item.key: item.size for item in open_store(str(source)).list()}
    summary = go(path, *overrides)
    assert set(states(summary).values()) == {"done"}
    assert facts(summary, "snapshot")["kind"] == kind
    total = facts(summary, "shard")["counts"]["total"]
    assert (total["stored"], total["served"]) == (40, 40)
    assert facts(summary, "shard")["classes"] == ["cat", "dog"]
    assert {score.encoder for score in summary.scores} == {"pretrained", "random"}
    objects = {item.key for item in open_store(str(store)).list() if not item.key.startswith(("mlflow", "mlart"))}
    again = go(path, *overrides)
    assert set(states(again).values()) == {"cached"}
    assert {
        item.key for item in open_store(str(store)).list() if not item.key.startswith(("mlflow", "mlart"))
    } == objects
    assert {item.key: item.size for item in open_store(str(source)).list()} == before


def test_tars_in_a_bucket_are_trained_on_from_there(tmp_path, store, s3_bucket):
    for path in tars(tmp_path / "tars").iterdir():
        open_store(f"s3://{s3_bucket}/tars").upload(path.name, path)
    path = write_config(tmp_path / "run.yaml", document(store, f"s3://{s3_bucket}/tars"))
    summary = go(path, f"resources.cache_directory={tmp_path / 'cache'}")
    assert set(states(summary).values()) == {"done"}
    assert any((tmp_path / "cache").glob("*.tar"))


def test_labels_from_a_file_are_evaluated_on(tmp_path, store):
    source = write_images(tmp_path / "images", 40, classes=())
    names = sorted(path.name for path in source.iterdir())
    lines = [f"{name},{number % 3}" for number, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    path = write_config(tmp_path / "run.yaml", document(store, source))
    summary = go(path, f"data.labels={tmp_path / 'labels.csv'}")
    assert set(states(summary).values()) == {"done"}
    assert facts(summary, "shard")["classes"] == ["0", "1", "2"]
    rows = plan_run(load_config(path, [LINEAR, "data.labels=/nowhere/labels.csv"]))[0]
    assert {row.state for row in rows} == {"blocked"}


# A source that grows


def steps(path, *overrides):
    return {step.name: step for step in build(load_config(path, [LINEAR, *overrides]))}


def test_one_name_in_a_list_is_that_name_and_a_later_part_leaves_the_first_alone(tmp_path):
    path = write_config(tmp_path / "run.yaml", document("/store", "/images"))
    one, listed, two = steps(path), steps(path, 'data.snapshot=["1"]'), steps(path, 'data.snapshot=["1","2"]')
    same = [name for name in one if name != "report"]
    assert {name: one[name].fingerprint for name in same} == {name: listed[name].fingerprint for name in same}
    assert list(two)[:5] == ["snapshot", "snapshot.2", "shard", "shard.2", "join"]
    for name in ("snapshot", "shard"):
        assert two[name].fingerprint == one[name].fingerprint
    assert two["pretrain"].inputs["shards"] is two["join"]
    assert two["pretrain"].fingerprint != one["pretrain"].fingerprint


def test_fingerprints_of_what_was_there_before_stay(tmp_path):
    # An upgrade must never restart a ten-day run: if this fails, correct the change, not the numbers.
    path = write_config(tmp_path / "run.yaml", {"data": {"source": "/data/x"}, "model": {"size": "tiny"}})
    made = {step.name: step.fingerprint for step in build(load_config(path))}
    assert made["snapshot"] == "8a4dcf9e9a207383d1538665c7e219457fec02e179144dee7cfee519254478b9"
    assert made["shard"] == "ee6500d8305bb48fd61c2bc2386580d0c3ccd51e9ee14450168fde0d5ab53672"


def test_a_dataset_of_its_own_stays_at_the_first_snapshot(tmp_path):
    given = "evaluation.datasets=[{name: other, source: /other, image_column: img, protocols: [linear]}]"
    path = write_config(tmp_path / "run.yaml", document("/store", "/images"))
    one, two = (
        {step.name: step for step in build(load_config(path, [given, f"data.snapshot={names}"]))}
        for names in ('["1"]', '["1", "2"]')
    )
    assert two["shard-other"].fingerprint == one["shard-other"].fingerprint
    assert two["snapshot-other"].config.image_column == "img"
    assert two["snapshot"].config.image_column == "image"


def test_the_next_part_is_the_number_after_what_is_pinned():
    assert next_name(["1"]) == "2"
    assert next_name(["1", "7"]) == "8"
    assert next_name(["base"]) == "2"
    assert next_name(["base", "2024"]) == "2025"
    pinned = {("1",), ("1", "2"), ("1", "2", "3"), ("1", "2", "3", "4", "5")}
    assert known_parts(("1",), pinned.__contains__) == ("1", "2", "3")
    assert known_parts(("base",), pinned.__contains__) == ("base",)


def test_refresh_takes_in_what_is_new_once_and_writes_no_old_shard_again(tmp_path, store):
    source = write_images(tmp_path / "images", 40)
    content = document(store, source) | {"evaluation": {"datasets": []}}
    path = write_config(tmp_path / "run.yaml", content)

    def mae(*, refresh):
        options = ["--in-process", "--json", *(["--refresh"] if refresh else [])]
        done = CliRunner().invoke(app, ["run", str(path), *options])
        line = json.loads(done.stdout.strip().splitlines()[-1])
        refreshed = [text for text in done.stderr.splitlines() if text.startswith("mae: refresh")]
        return done.exit_code, {step["name"]: step["state"] for step in line["steps"]}, refreshed

    code, told, said = mae(refresh=True)
    assert (code, said) == (0, [f"mae: refresh: {source} is not listed yet; this run lists it for the first time"])
    assert set(told.values()) == {"done"}
    code, told, said = mae(refresh=True)
    assert said == [f'mae: refresh: nothing is new in {source}; to pin this state write data.snapshot: "1"']
    assert set(told.values()) == {"cached"}

    write_images(source / "new", 12, seed=1)
    times = {p: p.stat().st_mtime_ns for p in store.rglob("*.tar")}
    planned = CliRunner().invoke(app, ["plan", str(path), "--refresh", "--json"])
    assert planned.exit_code == 0
    rows = json.loads(planned.stdout)["steps"]
    assert [row["state"] for row in rows[:5]] == ["cached", "to_run", "cached", "to_run", "to_run"]
    code, told, said = mae(refresh=True)
    assert said == [f'mae: refresh: a new part in {source}; to pin this state write data.snapshot: ["1", "2"]']
    assert code == 0
    assert [told[name] for name in ("snapshot", "shard", "snapshot.2", "shard.2", "join", "pretrain")] == (
        ["cached"] * 2 + ["done"] * 4
    )
    assert {p: p.stat().st_mtime_ns for p in times} == times
    code, told, said = mae(refresh=True)
    assert said == [f'mae: refresh: nothing is new in {source}; to pin this state write data.snapshot: ["1", "2"]']
    assert set(told.values()) == {"cached"}
    code, told, said = mae(refresh=False)  # what is newest is what the plain command means
    assert (said, set(told.values())) == ([], {"cached"})
    assert "join" in told
    write_config(path, content | {"data": content["data"] | {"snapshot": "1"}})  # what is written counts
    code, told, said = mae(refresh=False)
    assert (said, set(told.values())) == ([], {"cached"})
    assert "join" not in told
