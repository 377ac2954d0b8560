"""A new store under five runs that begin at once, and a creation of its database that is killed at 20 moments."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from run_kit import ROOT, document, environment, mae, write_config, write_images

pytestmark = pytest.mark.system

KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from pipeline import tracking

def forked(work):
    # mlflow is imported once: a child begins at once, so that the moments fall into its work
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

def timed(work):
    began = time.monotonic()
    assert os.waitpid(forked(work), 0)[1] == 0
    return time.monotonic() - began

def kill(work, after_s):
    child = forked(work)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

root, how, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def creation(folder):
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    if how == "ours":
        return lambda: tracking.check_tracking(uri)
    return lambda: SqlAlchemyStore(uri, str(folder))  # in place, as a version before did

root.mkdir()
takes_s = timed(creation(root))
seen = []
for number in range(kills):
    folder = root / f"{number:02d}"
    folder.mkdir()
    kill(creation(folder), takes_s * (number + 0.5) / kills)
    seen.append((folder / "mlflow.db").exists())
    timed(lambda: tracking.check_tracking(f"sqlite:///{folder / 'mlflow.db'}"))
print(json.dumps(seen))
"""


def killed(root: Path, how: str, kills: int) -> list[bool]:
    """Whether the database was there after each kill; every one is opened again afterwards, or this fails."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), how, str(kills)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_databases(root: Path, kills: int) -> None:
    for number in range(kills):
        folder = root / f"{number:02d}"
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("SELECT name FROM experiments").fetchall() == [("Default",)]
        assert {path.name for path in folder.iterdir()} - {".tmp-mlflow.db.lock"} == {"mlflow.db"}


def test_a_creation_killed_at_20_moments_is_taken_up_by_the_next(tmp_path):
    there = killed(tmp_path / "stores", "ours", 20)
    assert not all(there)  # the kills did fall into the work
    check_databases(tmp_path / "stores", 20)


def test_what_mlflow_leaves_half_made_is_healed(tmp_path):
    there = killed(tmp_path / "stores", "mlflow's", 6)
    assert sum(there) >= 3
    check_databases(tmp_path / "stores", 6)


def test_five_runs_that_begin_at_once_on_a_new_store_all_end_well(tmp_path):
    content = document(tmp_path / "store", write_images(tmp_path / "images", 40))
    content["evaluation"]["datasets"] = []
    paths = []
    for number in range(5):
        own = content | {"name": f"run-{number}", "seed": number}
        paths.append(write_config(tmp_path / f"run-{number}.yaml", own))
    with ThreadPoolExecutor(5) as pool:
        done = list(pool.map(lambda path: mae("run", path, "--in-process", timeout=500), paths))
    assert [one.returncode for one in done] == [0] * 5, [one.stderr[-2000:] for one in done]
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "mlflow.db")) as connection:
        names = connection.execute("SELECT name FROM runs WHERE name LIKE 'run-%' AND status = 'FINISHED'").fetchall()
    assert sorted(name for (name,) in names) == [f"run-{number}" for number in range(5)]
