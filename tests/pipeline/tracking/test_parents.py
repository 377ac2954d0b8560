"""One parent for a run, however often and by how many drivers it is started: against the real MLflow, over SQLite."""

import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow_kit import wait_for

from pipeline import tracking
from pipeline.storage import FileStore
from pipeline.tracking import Point, names
from pipeline.tracking.curves.sender import Sender
from pipeline.tracking.models import LINEAR_TAG


@pytest.fixture
def uri(migrated_database, tmp_path) -> str:
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def start(uri, attempt="a", *, store="s3://bucket/store", **more) -> tracking.Parent:
    tags = {names.RUN_TAG: "cats", names.DIGEST_TAG: "d1", names.STORE_TAG: store} | more
    return tracking.open_parent(uri, experiment="e", name="cats", attempt=attempt, tags=tags, params={"seed": 0})


def run(uri, run_id):
    return tracking.client_of(uri).get_run(run_id)


def child(uri, parent_run_id, *, kind="pretrain", fingerprint="ab" * 32, experiment="e") -> str:
    return tracking.open_child(
        uri,
        experiment=experiment,
        parent_run_id=parent_run_id,
        name=kind,
        fingerprint=fingerprint,
        tags={names.KIND_TAG: kind},
        params={},
    )


def test_a_later_start_finds_the_parent_counts_and_runs_again(uri):
    first = start(uri)
    tracking.close_parent(uri, first, "KILLED", worked=True)
    second = start(uri, "b")
    found = run(uri, second.run_id)
    assert second.run_id == first.run_id
    assert found.info.status == "RUNNING"
    assert (found.data.tags[names.ATTEMPTS_TAG], found.data.tags[names.ATTEMPT_TAG]) == ("2", "b")


def test_another_name_digest_or_store_is_another_run(uri):
    same = start(uri).run_id
    others = [
        start(uri, store="s3://other"),
        start(uri, **{names.DIGEST_TAG: "d2"}),
        start(uri, **{names.RUN_TAG: "x"}),
    ]
    assert len({same, *(other.run_id for other in others)}) == 4


def test_a_store_that_was_moved_with_its_database_is_still_the_same_run(uri, tmp_path, migrated_database):
    before = start(uri, store=f"file://{tmp_path}")
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "mlflow.db", moved)
    there = f"sqlite:///{moved}/mlflow.db"
    assert start(there, store=f"file://{moved}").run_id != before.run_id  # the old folder is still there: two stores
    gone = start(uri, store=f"file://{tmp_path}/gone", **{names.DIGEST_TAG: "d9"})
    assert start(uri, store=f"file://{tmp_path}", **{names.DIGEST_TAG: "d9"}).run_id == gone.run_id


def test_drivers_that_start_at_once_share_one_parent(uri):
    with ThreadPoolExecutor(4) as pool:
        ids = {parent.run_id for parent in pool.map(lambda n: start(uri, str(n)), range(4))}
    client = tracking.client_of(uri)
    experiment = client.get_experiment_by_name("e").experiment_id
    standing = {one.info.run_id for one in client.search_runs([experiment])}
    assert ids == standing
    assert len(standing) == 1


def test_of_two_live_drivers_the_later_one_says_how_the_run_ended(uri):
    earlier, later = start(uri, "a"), start(uri, "b")
    tracking.close_parent(uri, earlier, "KILLED", worked=True)
    assert run(uri, later.run_id).info.status == "RUNNING"
    tracking.close_parent(uri, later, "FINISHED", worked=True)
    assert run(uri, later.run_id).info.status == "FINISHED"


def test_a_driver_that_finished_everything_says_so_even_if_a_later_one_was_killed(uri):
    earlier, killed = start(uri, "a"), start(uri, "b")
    tracking.close_parent(uri, earlier, "FINISHED", worked=True)
    assert run(uri, killed.run_id).info.status == "FINISHED"


def test_a_start_with_nothing_to_do_leaves_the_duration_as_it_was(uri):
    first = start(uri)
    tracking.close_parent(uri, first, "FINISHED", worked=True)
    ended = run(uri, first.run_id).info.end_time
    tracking.close_parent(uri, start(uri, "b"), "FINISHED", worked=False)
    assert run(uri, first.run_id).info.end_time == ended
    tracking.close_parent(uri, start(uri, "c"), "FINISHED", worked=True)
    assert run(uri, first.run_id).info.end_time > ended


def test_a_parent_that_somebody_deleted_is_opened_anew(uri):
    first = start(uri)
    tracking.client_of(uri).delete_run(first.run_id)
    assert start(uri).run_id != first.run_id


def test_a_step_that_another_experiment_has_is_linked_not_made_twice(uri):
    elsewhere = child(uri, start(uri).run_id, experiment="mae")
    assert child(uri, start(uri).run_id, experiment="mae-cats") == elsewhere


# --- the curve of pretraining


def points(steps) -> list[Point]:
    return [Point(s, 1000 + s, {"train/loss": 1 / s, "train/images_seen": 8.0 * s}) for s in steps]


def curve(uri, run_id) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracking.client_of(uri).get_metric_history(run_id, names.CURVE))


def test_the_curve_goes_to_every_run_of_the_step_by_images_seen_and_once(uri, tmp_path):
    first, second = start(uri).run_id, start(uri, store="s3://other").run_id
    step = child(uri, first)
    assert child(uri, second) == step
    journal = tracking.Journal(FileStore(tmp_path / "g0001"))
    journal.append(points([1, 2, 3]))
    Sender(uri, step, journal).send_next()
    Sender(uri, step, journal).send_next()  # another process begins at the start
    assert curve(uri, first) == curve(uri, second) == [(8, 1.0), (16, 1 / 2), (24, pytest.approx(1 / 3))]
    tracking.log_curve(uri, first, names.CURVE, [(24, 0.5, 0), (32, 0.25, 0)])
    assert [step for step, _ in curve(uri, first)] == [8, 16, 24, 32]


def test_a_deleted_parent_does_not_keep_the_curve_from_its_step(uri, tmp_path):
    parent = start(uri).run_id
    step = child(uri, parent)
    journal = tracking.Journal(FileStore(tmp_path / "g0001"))
    journal.append(points([1]))
    sender = Sender(uri, step, journal)
    sender.send_next()
    tracking.client_of(uri).delete_run(parent)
    journal.append(points([2]))
    with pytest.raises(tracking.TrackingError):  # noticed by the failure: the tracker tries again
        sender.send_next()
    sender.send_next()
    assert sorted(m.step for m in tracking.client_of(uri).get_metric_history(step, "train/loss")) == [1, 2]


def test_the_curve_of_a_fine_tuning_stays_with_its_step(uri, tmp_path):
    parent = start(uri).run_id
    step = child(uri, parent, kind="evaluate")
    journal = tracking.Journal(FileStore(tmp_path / "g0001"))
    journal.append(points([1]))
    Sender(uri, step, journal).send_next()
    assert curve(uri, parent) == []


# --- the registry


def register(uri, run_id, fingerprint, top1, data="cats") -> str:
    return tracking.register_encoder(
        uri,
        "cats",
        run_id=run_id,
        fingerprint=fingerprint,
        files_uri=f"s3://bucket/store/pretrain-{fingerprint}/g0001",
        linear=tracking.LinearScore(top1, data),
        tags={names.DATA_TAG: "cats"},
    )


def test_aliases_follow_the_newest_and_the_best_encoder(uri):
    parent, client = start(uri).run_id, tracking.client_of(uri)
    assert [register(uri, parent, name, top1) for name, top1 in (("f1", 0.5), ("f2", 0.7), ("f3", 0.6))] == [
        "1",
        "2",
        "3",
    ]
    assert register(uri, parent, "f2", 0.7) == "2"  # found again, not registered again
    model = client.get_registered_model("cats")
    assert {name: str(version) for name, version in model.aliases.items()} == {"newest": "3", "best-linear": "2"}
    best = client.get_model_version_by_alias("cats", names.BEST_LINEAR_ALIAS)
    assert best.source == "s3://bucket/store/pretrain-f2/g0001"
    assert (best.run_id, best.tags[names.URI_TAG], best.tags[LINEAR_TAG]) == (parent, best.source, "0.700000")


def test_a_better_score_on_other_data_is_not_better(uri):
    parent = start(uri).run_id
    register(uri, parent, "f1", 0.5)
    register(uri, parent, "f2", 0.9, data="easy")
    version = tracking.client_of(uri).get_model_version_by_alias("cats", names.BEST_LINEAR_ALIAS)
    assert str(version.version) == "1"


# --- the nodes


def test_a_node_that_pretrains_is_watched_on_the_run_that_started_it_last(uri):
    first, second = start(uri).run_id, start(uri, store="s3://other").run_id
    step = child(uri, first)
    child(uri, second)
    node = f"system/{socket.gethostname()}"
    with tracking.node_metrics(uri, step, every_s=0.05):
        wait_for(lambda: f"{node}/cpu_utilization_percentage" in run(uri, second).data.metrics)
    assert {f"{node}/system_memory_usage_percentage", f"{node}/disk_usage_percentage"} <= run(
        uri, second
    ).data.metrics.keys()
    assert not run(uri, first).data.metrics


def test_without_a_run_or_a_server_nodes_are_not_watched_and_nobody_waits(uri, caplog):
    caplog.set_level("INFO")
    with tracking.node_metrics(uri, "", every_s=0.01), tracking.node_metrics("", "r", every_s=0.01):
        assert not [thread for thread in threading.enumerate() if thread.name == "node-metrics"]
    with tracking.node_metrics(uri, "no-such-run", every_s=0.01):
        wait_for(lambda: "system metrics are not recorded" in caplog.text)
