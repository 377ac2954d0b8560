"""`mae compare` in processes of its own: what it refuses, and how little the table of many runs needs."""

import json
import subprocess
import sys

import pytest
from run_kit import ROOT, environment, mae, migrated_database

from benchmarks.compare import fill

__all__ = ["migrated_database"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name runs, or write --all or --filter, one of the three"),
        (["some", "--all"], "name runs, or write --all or --filter, one of the three"),
        (["--lineage"], "--lineage needs a run, a shard, an image or another file of a store"),
        (
            ["--all", "--tracking", "none"],
            "--all and --filter search MLflow, and tracking is none: name stores instead",
        ),
        (
            ["some", "--tracking", "none"],
            "no run is named 'some', and no id begins with it (no MLflow, since tracking is none)",
        ),
        (["some", "--store", "/nowhere"], "there is no tracking database /nowhere/mlflow.db"),
        (["/nowhere/store"], "/nowhere/store holds no finished pretraining or report"),
        (["/nowhere/cat.png", "--lineage"], "is no file of a finished step, and no image of a dataset"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = mae("compare", *arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []  # a reader creates neither store nor database


def test_a_database_that_is_not_mlflows_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database\n" * 100)
    done = mae("compare", "--all", "--store", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"tracking database {tmp_path}/mlflow.db cannot be read as MLflow's" in done.stderr


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    database = tmp_path_factory.mktemp("thirty") / "mlflow.db"
    fill(database, 30)
    return f"sqlite:///{database}"


def test_the_table_of_many_runs_needs_neither_torch_nor_mlflow(thirty):
    code = f"""
import sys
from jobs.cli import app
try:
    app(["compare", "--all", "--tracking", {thirty!r}])
except SystemExit as end:
    assert not end.code
print("HEAVY", sorted({{"torch", "mlflow", "altair", "scipy", "pyarrow"}} & set(sys.modules)))
"""
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60, env=environment())
    assert "HEAVY []" in done.stdout
    table = done.stdout.splitlines()
    assert sum(line.startswith("run-") for line in table) == 30
    assert "30 runs. Name 20 at most" in done.stdout


def test_many_runs_as_json_and_no_page_for_them(thirty, tmp_path):
    runs = json.loads(mae("compare", "--all", "--tracking", thirty, "--json").stdout)["runs"]
    assert len({run["run_id"] for run in runs}) == 30
    assert runs[0]["scores"]["linear/data0/pretrained"]["n"] >= 2
    done = mae("compare", "--all", "--tracking", thirty, "--out", tmp_path / "page")
    assert done.returncode == 2
    assert "--out: 30 runs do not fit on a page; name 20 at most" in done.stderr
    assert not (tmp_path / "page").exists()
