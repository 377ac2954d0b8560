"""Tracking against the real MLflow, over SQLite files in a temporary folder."""

import contextlib
import http.server
import json
import shutil
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from mlflow_kit import wait_for

from pipeline import tracking
from pipeline.errors import StorageError, WrongTrackingAddress
from pipeline.storage import FileStore
from pipeline.tracking import Journal, Point, TrackingError, connection, names
from pipeline.tracking.connection import artifact_location
from pipeline.tracking.curves import journal
from pipeline.tracking.curves.writer import JournalTracker
from pipeline.tracking.experiments import experiment_named
from pipeline.tracking.mlflow_format import flatten_params
from pipeline.tracking.records import log_params

FINGERPRINT = "ab" * 32


@pytest.fixture
def uri(migrated_database, tmp_path) -> str:
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def client(uri):
    return tracking.client_of(uri)


def parent(uri, name="run") -> str:
    tags = {"git": "abc", names.RUN_TAG: name, names.DIGEST_TAG: "d1", names.STORE_TAG: "s3://b/p"}
    opened = tracking.open_parent(uri, experiment="digits", name=name, attempt="a", tags=tags, params={"seed": 0})
    return opened.run_id


def child(uri, parent_run_id, **more) -> str:
    settings = {"name": "pretrain", "fingerprint": FINGERPRINT, "tags": {}, "params": {}} | more
    return tracking.open_child(uri, experiment="digits", parent_run_id=parent_run_id, **settings)


def history(uri, run_id, key="train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


# --- addresses


def test_the_configured_address_wins_then_the_environment_then_the_store(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking.resolve_tracking_uri("http://cfg:5000", store_uri=str(tmp_path)) == "http://cfg:5000"
    assert tracking.resolve_tracking_uri(None, store_uri=str(tmp_path)) == "http://env:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for store in (str(tmp_path), f"file://{tmp_path}"):
        assert tracking.resolve_tracking_uri(None, store_uri=store) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve_tracking_uri(None, store_uri="s3://b/p") == f"sqlite:///{tmp_path}/.mae/mlflow.db"
    assert tracking.resolve_tracking_uri("sqlite:///my.db", store_uri="s3://b/p") == f"sqlite:///{tmp_path}/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking.resolve_tracking_uri("none", store_uri=str(tmp_path)) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert tracking.resolve_tracking_uri(None, store_uri=str(tmp_path)) == ""


def test_an_unusable_address_fails_early_and_clearly(tmp_path):
    with pytest.raises(WrongTrackingAddress, match=r"write .* sqlite:///"):
        tracking.check_tracking(f"file://{tmp_path}")
    (tmp_path / "plain").write_text("")
    with pytest.raises(WrongTrackingAddress, match="cannot be created"):
        tracking.check_tracking(f"sqlite:///{tmp_path}/plain/mlflow.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://user:pw@127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TrackingError, match="the server is up") as failure:
            tracking.check_tracking(address)
    assert "pw@" not in str(failure.value)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:5000",
        "/a/folder",
        "http://",
        "http://host:port",
        "http://host:99999",
        "htp://host:5000",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "postgresql://u:pw@10.255.255.1/db",
    ],
)
def test_what_cannot_be_an_address_is_refused_before_anything_waits(address):
    began = time.monotonic()
    with pytest.raises(WrongTrackingAddress, match="http://host:port") as failure:
        tracking.check_tracking(address)
    assert time.monotonic() - began < 1
    assert "pw@" not in str(failure.value)


def test_a_server_that_never_answers_is_named_in_time(monkeypatch):
    """It accepts the connection, as a stopped process or a wrong port may."""
    monkeypatch.setattr(connection, "_ANSWER_S", 0.2)
    monkeypatch.setattr(connection, "_ANSWER_PAUSE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(TrackingError, match=rf"{address} does not answer \(.*timed out"):
            tracking.check_tracking(address)
    assert time.monotonic() - began < 5


def test_a_server_that_speaks_no_tls_is_told_apart(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving_plainly() as port, pytest.raises(TrackingError, match="Check http:// or https://"):
        tracking.check_tracking(f"https://127.0.0.1:{port}")


@contextlib.contextmanager
def serving_plainly():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bucket_without_a_server_says_where_its_runs_are_kept(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    tracking.resolve_tracking_uri(None, store_uri=str(tmp_path))
    assert caplog.messages == []
    tracking.resolve_tracking_uri(None, store_uri="s3://bucket/runs")
    (message,) = caplog.messages
    assert "tracking.uri is not set" in message
    assert f"{tmp_path}/.mae/mlflow.db" in message


def test_a_bare_database_is_refused_for_want_of_a_place_for_artifacts():
    assert artifact_location("http://h:5000") is None
    with pytest.raises(TrackingError, match="bare database") as failure:
        artifact_location("postgresql://u:pw@h/db")
    assert "pw@" not in str(failure.value)


# --- parent and child runs


def test_a_step_is_a_child_of_its_run_and_the_run_names_it(uri):
    top = parent(uri)
    step = child(uri, top)
    run = client(uri).get_run(step)
    assert run.data.tags["mlflow.parentRunId"] == top
    assert run.data.tags["mae.fingerprint"] == FINGERPRINT
    assert client(uri).get_run(top).data.tags["mae.step.pretrain"] == step
    assert run.info.run_name == "pretrain"


def test_a_later_attempt_resumes_the_child_of_this_fingerprint_and_links_the_new_parent(uri):
    first, second = parent(uri, "first"), parent(uri, "second")
    step = child(uri, first)
    tracking.close_run(uri, step, "FAILED")
    assert child(uri, second) == step
    run = client(uri).get_run(step)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mae.later_parents"] == second
    assert child(uri, second, fingerprint="cd" * 32) != step
    assert tracking.find_child(uri, experiment="digits", fingerprint="00") is None


def test_a_cached_step_is_linked_not_run_again(uri):
    step = child(uri, parent(uri, "first"))
    tracking.close_run(uri, step, "FINISHED")
    second = parent(uri, "second")
    found = tracking.find_child(uri, experiment="digits", fingerprint=FINGERPRINT)
    tracking.link_child(uri, parent_run_id=second, name="pretrain", run_id=found)
    assert found == step
    assert client(uri).get_run(step).info.status == "FINISHED"
    assert client(uri).get_run(second).data.tags["mae.step.pretrain"] == step


def test_two_processes_may_create_the_experiment_at_once(uri):
    with ThreadPoolExecutor(6) as pool:
        ids = set(pool.map(lambda _: experiment_named(uri, "same"), range(6)))
    assert len(ids) == 1


# --- parameters, datasets, scores and artifacts


def test_parameters_are_flat_redacted_cut_and_may_be_repeated(uri):
    config = {
        "model": {"mask_ratio": 0.75},
        "data": {"source": "s3://b"},
        "auth": {"token": "t0p"},
        "notes": "x" * 9000,
    }
    many = {f"k{i}": i for i in range(250)}
    run = parent(uri)
    for _ in range(2):
        log_params(uri, run, config | many)
    log_params(uri, run, {"model": {"mask_ratio": 0.6}})
    data = client(uri).get_run(run).data
    assert data.params["model.mask_ratio"] == "0.75"
    assert data.params["auth.token"] == "***"
    assert len(data.params["notes"]) == 6000
    assert data.params["k249"] == "249"
    assert data.tags["mae.changed.model.mask_ratio"] == "0.6"


def test_secrets_are_hidden_but_not_numbers_under_similar_keys():
    config = {
        "num_tokens": 196,
        "aws_secretAccessKey": "AKIA",
        "tokens": ["a", "b"],
        "password": None,
        "credentials": {"user": "me"},
        "tracking": "postgresql://me:pa@ss@db/x",
        "link": "https://h/o?X-Amz-Signature=abc&part=1",
        "path": "s3://bucket/a@b",
    }
    assert tracking.redact(config) == {
        "num_tokens": 196,
        "aws_secretAccessKey": "***",
        "tokens": ["***", "***"],
        "password": None,
        "credentials": {"user": "***"},
        "tracking": "postgresql://***@db/x",
        "link": "https://h/o?X-Amz-Signature=***&part=1",
        "path": "s3://bucket/a@b",
    }


def test_flatten_keeps_lists_of_plain_values_together():
    config = {"a": {"b": [1, {"c": None}]}, "sizes": [1, 2], "on": True, "s": "text"}
    assert flatten_params(config) == {"a.b.0": "1", "a.b.1.c": "null", "sizes": "[1, 2]", "on": "true", "s": "text"}


def test_a_dataset_digest_is_cut_for_mlflow_and_whole_in_a_tag(uri):
    run = parent(uri)
    tracking.log_dataset(uri, run, name="digits", digest="c0ffee" * 10 + "beef", source="s3://b/d", context="training")
    found = client(uri).get_run(run)
    dataset = found.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", ("c0ffee" * 10)[:32])
    assert json.loads(dataset.dataset.source) == {"uri": "s3://b/d"}
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "training"}
    assert found.data.tags["mae.dataset.digits.digest"] == "c0ffee" * 10 + "beef"


def test_scores_are_logged_once(uri):
    run = parent(uri)
    for _ in range(2):
        tracking.log_scores(uri, run, {"score/linear/digits/pretrained": 0.97, "score/nan": float("nan")})
    assert history(uri, run, "score/linear/digits/pretrained") == [(0, 0.97)]


def test_artifacts_lie_beside_the_database_not_in_the_working_directory(uri, tmp_path, monkeypatch):
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = parent(uri)
    tracking.log_file(uri, run, b"png", "curve.png")
    tracking.log_file(uri, run, b"png", "report/curve.png")
    files = {
        str(p.relative_to(tmp_path / "mlartifacts" / run)) for p in tmp_path.rglob("mlartifacts/**/*") if p.is_file()
    }
    assert files == {"artifacts/curve.png", "artifacts/report/curve.png"}
    assert list(elsewhere.iterdir()) == []


# --- metrics during training


def send(uri, run, store, points) -> bool:
    tracker = JournalTracker(uri, run, store, every_s=0.05)
    for step, metrics in points:
        tracker.log(step, metrics)
    return tracker.close()


def journalled(store) -> list[int]:
    """The steps of the points in the journal."""
    lines = [line for info in store.list("journal/part-") for line in store.read(info.key).splitlines()]
    return [json.loads(line)["step"] for line in lines]


def generations(folder):
    """The directories that the first, second, ... attempt writes to."""
    return (FileStore(folder / f"g{number:04d}") for number in range(1, 9999))


def test_a_replay_after_a_resume_leaves_no_duplicates(uri, tmp_path):
    run, stores = child(uri, parent(uri)), generations(tmp_path)
    assert send(uri, run, next(stores), [(s, {"train/loss": 1 / s, "train/lr": 0.1}) for s in range(1, 7)])
    # killed at 6 and resumed from the checkpoint at 4; the validation at 6 had not been sent
    again = [(s, {"train/loss": 1 / s, "train/lr": 0.1}) for s in range(5, 9)]
    assert send(uri, run, next(stores), [*again, (6, {"val/loss": 0.5})])
    assert history(uri, run) == [(s, 1 / s) for s in range(1, 9)]
    assert history(uri, run, "val/loss") == [(6, 0.5)]


def test_more_metrics_than_one_call_takes_arrive_complete(uri, tmp_path):
    run = parent(uri)
    send(uri, run, FileStore(tmp_path / "g"), [(s, {f"m{i}": float(s) for i in range(30)}) for s in range(100)])
    assert len(history(uri, run, "m29")) == 100


def test_non_finite_values_become_a_tag(uri, tmp_path):
    run, store = parent(uri), FileStore(tmp_path / "g")
    points = [(1, {"train/loss": float("nan"), "train/lr": 0.1}), (2, {"train/loss": float("inf")})]
    send(uri, run, store, points)
    assert history(uri, run) == []
    assert history(uri, run, "train/lr") == [(1, 0.1)]
    assert client(uri).get_run(run).data.tags["mae.nonfinite.train/loss"] == "inf at step 2"
    for line in store.read("journal/part-00000001.jsonl").splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_without_tracking_there_is_nothing_to_send(tmp_path):
    tracker = tracking.open_tracker("", "", FileStore(tmp_path))
    tracker.log(1, {"train/loss": 1.0})
    assert tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_the_journal_grows_in_whole_parts_that_are_read_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "PART_POINTS", 4)
    store = FileStore(tmp_path)
    first = Journal(store)
    for step in range(1, 7):
        first.append([Point(step, step, {"a": 0.5})])
    first.append([Point(step, step, {"a": 0.5}) for step in range(7, 12)])
    assert journalled(store) == list(range(1, 12))
    assert [info.key for info in store.list()] == [f"journal/part-{n:08d}.jsonl" for n in (1, 2, 3)]
    # a later process of the generation repeats no point of the first one, and leaves its parts alone
    second = Journal(store)
    second.append([Point(step, step, {"a": 0.5}) for step in range(3, 15)])
    assert journalled(store) == [*range(1, 12), *range(11, 15)]
    for reader in (second, Journal(store)):
        cursor, steps = journal.JournalCursor(), []
        while (found := reader.after(cursor))[0]:
            steps += [point.step for point in found[0]]
            cursor = found[1]
        assert steps == journalled(store)
    # the first process is not dead after all: once its part is full, it starts another one of its own
    first.append([Point(15, 15, {"a": 0.5})])
    assert journalled(store)[-1] == 14
    assert 15 in journalled(store)


def test_a_damaged_part_is_named_not_skipped(uri, tmp_path):
    store = FileStore(tmp_path / "g")
    store.write("journal/part-00000001.jsonl", b'{"step": 1, "metr')
    with pytest.raises(TrackingError, match=r"part-00000001.jsonl is damaged .* Delete it"):
        tracking.deliver(store, uri, parent(uri))


def test_a_history_fills_what_a_kill_left_out_of_the_journal(uri, tmp_path):
    """Killed after the checkpoint at 4, before 3 and 4 were in the journal: the next generation begins with the history."""
    run, (before, after) = child(uri, parent(uri)), islice(generations(tmp_path), 2)
    Journal(before).append([Point(step, 1000 + step, {"train/loss": 1 / step}) for step in (1, 2)])
    tracker = JournalTracker(uri, run, after, every_s=0.05)
    tracker.resume([Point(step, 1000 + step, {"train/loss": 1 / step}) for step in (1, 2, 3, 4)])
    tracker.log(5, {"train/loss": 1 / 5})
    assert tracker.close()
    assert history(uri, run) == [(step, 1 / step) for step in range(1, 6)]
    times = {m.step: m.timestamp for m in client(uri).get_metric_history(run, "train/loss")}
    assert times[3] == 1003  # when it was measured, not when it was sent
    assert not Journal(after).has_unsent(run)


def test_after_a_rollback_the_curve_continues_in_its_own_child(uri, tmp_path):
    run, stores = child(uri, parent(uri)), generations(tmp_path)
    tracker = JournalTracker(uri, run, next(stores), every_s=0.05)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.rolled_back(1)
    for step in (2, 3):
        tracker.log(step, {"train/loss": 2.0})
    assert tracker.close()
    other = tracking.find_child(uri, experiment="digits", fingerprint=FINGERPRINT)  # what a later attempt resumes
    assert other != run
    assert history(uri, run) == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert history(uri, other) == [(2, 2.0), (3, 2.0)]
    tags = client(uri).get_run(other).data.tags
    assert (tags["mae.rollbacks"], tags["mae.rolled_back_to"]) == ("1", "1")
    assert tags["mlflow.parentRunId"] == client(uri).get_run(run).data.tags["mlflow.parentRunId"]
    assert client(uri).get_run(run).info.status == "KILLED"

    tracker = JournalTracker(uri, other, next(stores), every_s=0.05)
    tracker.resume([Point(1, 1, {"train/loss": 1.0}), Point(2, 2, {"train/loss": 2.0})], rollbacks=1)
    for step in (3, 4):
        tracker.log(step, {"train/loss": 2.0})
    assert tracker.close()
    assert history(uri, other) == [(2, 2.0), (3, 2.0), (4, 2.0)]
    assert len(history(uri, run)) == 3


def test_a_file_of_the_generation_becomes_an_artifact_once(uri, tmp_path):
    run, store = child(uri, parent(uri)), FileStore(tmp_path / "g")
    store.write("profile/steps.txt", b"a table")
    tracker = JournalTracker(uri, run, store, every_s=0.05)
    tracker.keep(3, "profile/steps.txt")
    assert tracker.close()
    tracking.deliver(store, uri, run)
    (kept,) = client(uri).list_artifacts(run, "profile")
    assert (kept.path, kept.file_size) == ("profile/steps.txt", 7)


class Away:
    """A store that does not answer until `there` is set."""

    def __init__(self, store):
        self.store, self.there = store, False

    def __getattr__(self, name):
        if not self.there and name in {"create", "write", "list", "read", "delete"}:
            raise StorageError("no answer")
        return getattr(self.store, name)


def test_a_store_that_is_away_for_a_while_gets_every_point_later(uri, tmp_path):
    run, store = child(uri, parent(uri)), Away(FileStore(tmp_path / "g"))
    tracker = JournalTracker(uri, run, store, every_s=0.02)
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1.0})
        time.sleep(0.05)
    assert history(uri, run) == []  # the journal comes first
    store.there = True
    assert tracker.close()
    assert history(uri, run) == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_what_a_closed_tracker_could_not_send_is_delivered_later(uri, tmp_path, caplog):
    run, store = child(uri, parent(uri)), FileStore(tmp_path / "g")
    away = "http://127.0.0.1:9"  # nobody listens there
    tracker = JournalTracker(away, run, store, every_s=0.05, close_within_s=1.0)
    began = time.monotonic()
    for step in range(1, 1001):
        tracker.log(step, {"train/loss": 1 / step})
    assert time.monotonic() - began < 0.5  # a thousand refused connections would take tens of seconds
    wait_for(lambda: tracker.failures > 0)
    assert not tracker.close()
    assert time.monotonic() - began < 10
    assert sum("training goes on" in record.message for record in caplog.records) == 1
    assert sum("waits in" in record.message for record in caplog.records) == 1
    assert journalled(store) == list(range(1, 1001))
    assert Journal(store).has_unsent(run)
    for _ in range(2):  # a second delivery changes nothing
        tracking.deliver(store, uri, run)
    assert history(uri, run) == [(s, 1 / s) for s in range(1, 1001)]
    assert not Journal(store).has_unsent(run)


def test_without_a_run_the_journal_alone_is_written(tmp_path):
    """As when MLflow was away at the start of the step."""
    store = FileStore(tmp_path / "g")
    assert not send("http://127.0.0.1:9", "", store, [(1, {"train/loss": 1.0})])
    assert journalled(store) == [1]
    assert Journal(store).has_unsent("")


# --- serving


def test_the_server_listens_on_loopback_and_keeps_files_beside_the_database():
    command = tracking.serve_command("sqlite:////d/mlflow.db", port=5001)
    assert command[:4] == [sys.executable, "-m", "mlflow", "server"]
    settings = dict(zip(command[4::2], command[5::2], strict=True))
    assert settings["--host"] == "127.0.0.1"
    assert settings["--artifacts-destination"] == "/d/mlartifacts"


def test_a_port_in_use_is_reported_before_the_server_starts(uri):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="is already in use"):
            tracking.serve(uri, port=taken.getsockname()[1])
