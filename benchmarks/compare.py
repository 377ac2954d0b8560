"""The table of a thousand runs: `mae compare --all` in a new process, over an MLflow of that many runs in SQLite.

    python -m benchmarks.compare                 # 1,000 runs of 6 steps each; the median of five calls
    python -m benchmarks.compare --runs 5000
    python -m benchmarks.compare --quick         # 200 runs

The first run is written through MLflow's API, with the tags, parameters and metrics that a run of mae has. The others are copies
in the database with other names, ids and values. `client` is the same reading through MLflow's client, which servers need,
and `import mlflow` what of that is its import alone.

Units:  seconds of wall clock, from the start of the process to its end.
Errors: a call that fails, or whose table lacks a run, ends the benchmark."""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline import tracking
from pipeline.tracking import names

STEPS = 6
"""Child runs of each run."""
PARAMETERS, SCORES = 150, 12
LIMIT_S = 2.0
_COLUMNS = {
    "runs": "name, source_type, source_name, entry_point_name, user_id, status, start_time, end_time, source_version, "
    "lifecycle_stage, artifact_uri, experiment_id, deleted_time",
    "tags": "key, value",
    "params": "key, value",
    "latest_metrics": "key, value, timestamp, step, is_nan",
}


def fill(database: Path, runs: int) -> None:
    """Write runs with their steps into a new database."""
    uri = f"sqlite:///{database}"
    tracking.check_tracking(uri)
    client = tracking.client_of(uri)
    experiment = client.create_experiment("mae", artifact_location=str(database.parent / "artifacts"))
    children = {f"step{number}": _child(client, experiment, number) for number in range(STEPS)}
    tags = {
        names.RUN_TAG: "run-000000",
        names.DIGEST_TAG: "0" * 64,
        names.STORE_TAG: "file:///store",
        names.DATA_TAG: "imagenet",
        names.SIZE_TAG: "ViT-B/16",
        names.DIFFERS_TAG: "mask_ratio=0.5 epochs=100",
        **{f"{names.STEP_TAG}{name}": run_id for name, run_id in children.items()},
    }
    parent = client.create_run(experiment, tags=tags, run_name="run-000000").info.run_id
    tracking.log_scores(
        uri,
        parent,
        {
            **{
                f"{prefix}linear/data{number}/pretrained": 0.5
                for prefix in ("score/", "score_sd/")
                for number in range(SCORES)
            },
            **{f"score/linear/data{number}/random": 0.25 for number in range(SCORES)},
            **{f"score_n/linear/data{number}/pretrained": 3.0 for number in range(SCORES)},
            names.FINAL_LOSS: 0.4,
            names.BEST_LOSS: 0.39,
            names.IMAGES_PER_S: 12_345.0,
            names.MFU: 0.41,
            names.GPU_HOURS: 83.0,
            names.COST_USD: 207.5,
        },
    )
    from pipeline.tracking.records import log_params

    log_params(uri, parent, {f"section.field{number}": number for number in range(PARAMETERS)})
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for number in range(1, runs):
            for run_id in (parent, *children.values()):
                _copy(connection, run_id, number)
        connection.execute(
            "UPDATE tags SET value = 'run-' || substr(run_uuid, 1, 6) WHERE key = ? AND run_uuid != ?",
            (names.RUN_TAG, parent),
        )
        connection.execute("UPDATE latest_metrics SET value = value * (0.9 + (rowid % 100) / 500.0) WHERE is_nan = 0")


def _child(client: Any, experiment: str, number: int) -> str:
    tags = {names.FINGERPRINT_TAG: f"{number}" * 64, names.KIND_TAG: "evaluate", names.PARENT_TAG: "0"}
    made: str = client.create_run(experiment, tags=tags, run_name=f"step{number}").info.run_id
    return made


def _copy(connection: sqlite3.Connection, run_id: str, number: int) -> None:
    """Copy a run with all that belongs to it; the copy's id begins with its number."""
    copy = f"{number:06x}{run_id[6:]}"
    for table, columns in _COLUMNS.items():
        query = f"INSERT INTO {table} (run_uuid, {columns}) SELECT ?, {columns} FROM {table} WHERE run_uuid = ?"
        connection.execute(query, (copy, run_id))


def timed(command: Sequence[str], runs: int) -> float:
    """Return the seconds that a command takes; its output must name every run."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})
    seconds = time.monotonic() - began
    found = done.stdout.count("run-")
    if runs and found != runs:
        raise SystemExit(f"{' '.join(command[:4])} ...: {found} of {runs} runs in its table\n{done.stderr}")
    return seconds


def main() -> None:
    """Fill, time, print."""
    parser = argparse.ArgumentParser(description="Time the table of many runs.")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="200 runs, two calls")
    given = parser.parse_args()
    runs, times = (200, 2) if given.quick else (given.runs, given.times)
    with TemporaryDirectory(prefix="mae-benchmark-") as folder:
        database = Path(folder) / "mlflow.db"
        fill(database, runs)
        uri = f"sqlite:///{database}"
        call = [shutil.which("mae") or "mae", "compare", "--all", "--tracking", uri]
        through_client = (
            "from pipeline.tracking import parents_in; print(' '.join(run.tags['mae.run'] for run in "
            f"parents_in({uri!r}, query='attributes.start_time > 0')))"
        )
        client = [sys.executable, "-c", through_client]
        importing = [sys.executable, "-c", "from mlflow import MlflowClient"]
        # in turns, so that a busy moment of the machine affects all of them
        rounds = [(timed(call, runs), timed(client, runs), timed(importing, 0)) for _ in range(times)]
        imported = subprocess.run(
            [sys.executable, "-X", "importtime", *call], capture_output=True, text=True, check=True
        ).stderr
        size = database.stat().st_size
    heavy = [name for name in ("torch", "mlflow") if re.search(rf"\|\s+{name}$", imported, re.MULTILINE)]
    seconds, client_s, import_s = (median(column) for column in zip(*rounds, strict=True))
    print(f"{runs} runs with {STEPS} steps each, {size / 2**20:.0f} MiB; {platform.machine()}, {os.cpu_count()} CPUs\n")
    for name, value in (
        ("mae compare --all", seconds),
        ("through MLflow's client", client_s),
        ("import mlflow", import_s),
    ):
        print(f"{name:<26}{value:6.2f} s")
    print(f"\nheavy imports: {', '.join(heavy) or 'none'}; limit for 1,000 runs: {LIMIT_S:g} s")
    print(
        json.dumps(
            {
                "benchmark": "compare",
                "runs": runs,
                "seconds": round(seconds, 3),
                "client_seconds": round(client_s, 3),
                "import_mlflow_seconds": round(import_s, 3),
                "heavy_imports": heavy,
            }
        )
    )


if __name__ == "__main__":
    main()
