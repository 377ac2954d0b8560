"""MLflow's SQLite file is created once and appears whole, in folders of any name."""

import contextlib
import fcntl
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import tracking
from pipeline.errors import TrackingError, WrongTrackingAddress
from pipeline.tracking import database, names
from pipeline.tracking.connection import artifact_location
from pipeline.tracking.database import create_database, sqlite_address, sqlite_file


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(database, "_QUIET_S", 0.05)


def create(path: Path) -> None:
    create_database(path, artifacts="/artifacts")


def rows(path: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def half_made(path: Path, *statements: str) -> None:
    """As MLflow leaves it when it is killed: some tables, no default experiment."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in (
            "CREATE TABLE alembic_version (version_num TEXT)",
            "CREATE TABLE experiments (experiment_id INTEGER, name TEXT)",
            "CREATE TABLE runs (run_uuid TEXT)",
            "CREATE TABLE _alembic_tmp_params (key TEXT)",
            *statements,
        ):
            connection.execute(statement)
        connection.commit()


def test_a_new_database_is_mlflows_own_at_its_newest_schema(tmp_path):
    uri = sqlite_address(tmp_path / "mlflow.db")
    tracking.check_tracking(uri)
    experiments = tracking.client_of(uri).search_experiments()
    assert [experiment.name for experiment in experiments] == ["Default"]
    assert experiments[0].artifact_location == f"{tmp_path}/mlartifacts/0"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mlflow.db.lock", "mlflow.db"]


def test_of_many_that_begin_at_once_one_creates_it(tmp_path, monkeypatch):
    filled, together = [], threading.Barrier(5)
    fill = database._fill
    monkeypatch.setattr(database, "_fill", lambda *arguments: (filled.append(1), fill(*arguments)))

    def begin(_):
        together.wait()
        create(tmp_path / "mlflow.db")

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(begin, range(5)))
    assert len(filled) == 1
    assert rows(tmp_path / "mlflow.db", "SELECT name FROM experiments") == [("Default",)]


def test_without_locks_the_first_one_named_stays(tmp_path, monkeypatch):
    """Each process fills a copy of its own; a hard link decides."""

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path, fill = tmp_path / "mlflow.db", database._fill

    def overtaken(target, artifacts):
        fill(target, artifacts)
        half_made(path, "INSERT INTO runs VALUES ('a run of the one that was faster')")

    monkeypatch.setattr(database, "_fill", overtaken)
    create(path)
    assert len(rows(path, "SELECT * FROM runs")) == 1
    path.unlink()
    half_made(path)
    with pytest.raises(TrackingError, match="delete it"):
        create(path)


def test_a_killed_creation_leaves_nothing_that_the_next_one_does_not_remove(tmp_path, monkeypatch):
    (tmp_path / ".tmp-mlflow.db.0123").write_bytes(b"half a copy")
    (tmp_path / ".tmp-mlflow.db.0123-journal").write_bytes(b"its journal")
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-mlflow.db.lock"]
    monkeypatch.undo()
    create(tmp_path / "mlflow.db")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mlflow.db.lock", "mlflow.db"]


@pytest.mark.parametrize("statements", [None, (), ("INSERT INTO alembic_version VALUES ('an earlier step')",)])
def test_a_half_made_database_without_runs_is_created_again(tmp_path, caplog, statements):
    path = tmp_path / "mlflow.db"
    if statements is None:
        path.touch()
    else:
        half_made(path, *statements)
        (tmp_path / "mlflow.db-wal").write_bytes(b"")
    create(path)
    assert rows(path, "SELECT name FROM experiments") == [("Default",)]
    assert not rows(path, "SELECT name FROM sqlite_master WHERE name = '_alembic_tmp_params'")
    assert [record.getMessage() for record in caplog.records] == [
        f"tracking database {path} was left half made and holds no runs: creating it again"
    ]


@pytest.mark.parametrize("content", ["INSERT INTO runs VALUES ('a')", "INSERT INTO experiments VALUES (1, 'digits')"])
def test_a_database_with_content_is_never_replaced(tmp_path, content):
    path = tmp_path / "mlflow.db"
    half_made(path, content)
    before = path.read_bytes()
    create(path)
    assert path.read_bytes() == before


def test_a_file_that_another_process_is_filling_in_place_is_left_to_it(tmp_path, monkeypatch):
    """An earlier version of ours, or `mlflow server`."""
    path = tmp_path / "mlflow.db"
    half_made(path)
    monkeypatch.setattr(database, "_QUIET_S", 0.3)
    monkeypatch.setattr(database, "_replace", lambda *_: pytest.fail("replaced while another process was at work"))

    def fill_slowly():
        with contextlib.closing(sqlite3.connect(path)) as connection:
            for number in range(10):
                connection.execute(f"CREATE TABLE t{number} (x)")
                threading.Event().wait(0.1)
            connection.execute("INSERT INTO experiments VALUES (0, 'Default')")
            connection.commit()

    other = threading.Thread(target=fill_slowly)
    other.start()
    create(path)
    other.join()
    assert len(rows(path, "SELECT name FROM sqlite_master WHERE name LIKE 't_'")) == 10


def test_a_wait_for_another_process_is_said_and_has_an_end(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(database, "_WAIT_S", 0.4)
    monkeypatch.setattr(database, "_SAY_AFTER_S", 0.1)
    with (tmp_path / ".tmp-mlflow.db.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TrackingError, match=r"mlflow\.db: another process .* End that process"):
            create(tmp_path / "mlflow.db")
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for another process that is creating {tmp_path}/mlflow.db"
    ]


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("this file is not a database\n" * 100)
    for path, words in ((tmp_path / "notes.txt", "not a readable SQLite file"), (tmp_path, "is a folder")):
        with pytest.raises(WrongTrackingAddress, match=words) as caught:
            tracking.check_tracking(f"sqlite:///{path}")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["plain", "feature%2Fvit", "a?b", "c#d", "e f+g", "h[i];j", "ü%41"])
def test_a_folder_of_any_name_holds_its_own_database_and_artifacts(tmp_path, name, migrated_database):
    folder = tmp_path / "ws" / name
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_bytes(migrated_database.read_bytes())
    uri = tracking.resolve_tracking_uri(None, store_uri=folder.as_uri())
    assert sqlite_file(uri) == folder / "mlflow.db"
    assert tracking.resolve_tracking_uri(uri, store_uri="/elsewhere") == uri
    tags = dict.fromkeys((names.RUN_TAG, names.DIGEST_TAG, names.STORE_TAG), "x")
    run = tracking.open_parent(uri, experiment="digits", name="run", attempt="a", tags=tags, params={"seed": 0}).run_id
    tracking.log_file(uri, run, b"png", "report/curve.png")
    assert rows(folder / "mlflow.db", "SELECT run_uuid FROM runs") == [(run,)]
    assert [path.read_bytes() for path in (folder / "mlartifacts").rglob("curve.png")] == [b"png"]
    assert [path.name for path in (tmp_path / "ws").iterdir()] == [name]  # no second folder under a quoted name
    artifacts = tracking.client_of(uri).list_artifacts(run, "report")
    assert [artifact.path for artifact in artifacts] == ["report/curve.png"]


def test_ordinary_addresses_are_as_ever():
    assert sqlite_address(Path("/data/a store/mlflow.db")) == "sqlite:////data/a store/mlflow.db"
    assert artifact_location("sqlite:////data/store/mlflow.db") == "/data/store/mlartifacts"
    assert sqlite_file("http://host:5000/x") is None
