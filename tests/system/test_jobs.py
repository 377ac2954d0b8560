"""Whole runs on a real local Ray cluster by the command: a bucket and two workers, Ctrl-C as a terminal sends it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from typing import Any

import pytest
from ray_kit import until
from run_kit import (
    ROOT,
    document,
    end_with_parent,
    environment,
    mae,
    migrated_database,
    store,
    write_config,
    write_images,
)

from pipeline.storage import open_store

__all__ = ["migrated_database", "store"]
pytestmark = pytest.mark.system
SECRET = "wJalrXUtnFEMI-not-to-be-seen"


def states(stdout: str) -> set[str]:
    return {step["state"] for step in json.loads(stdout.strip().splitlines()[-1])["steps"]}


def test_two_workers_train_from_a_bucket_and_leave_no_secret(tmp_path, s3_bucket, s3_endpoint, migrated_database):
    database = tmp_path / "mlflow.db"
    shutil.copy(migrated_database, database)
    images = write_images(tmp_path / "images", 200)
    bucket = open_store(f"s3://{s3_bucket}")
    for path in images.rglob("*.png"):
        bucket.upload(f"images/{path.relative_to(images)}", path)
    content: dict[str, Any] = document(f"s3://{s3_bucket}/runs", f"s3://{s3_bucket}/images")
    content["tracking"] = {"uri": f"sqlite:///{database}"}
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    content["resources"] |= {"workers": 2, "cache_directory": str(tmp_path / "cache"), "checkpoint_every_steps": 20}
    config = write_config(tmp_path / "run.yaml", content)
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET}
    done = mae("run", config, "--json", timeout=300, **secrets)
    assert done.returncode == 0, done.stderr
    assert states(done.stdout) == {"done"}
    manifest = next(
        info.key for info in bucket.list("runs/") if "/pretrain-" in f"/{info.key}" and "manifest" in info.key
    )
    assert json.loads(bucket.read(manifest))["world_size"] == 2
    for text in (database.read_bytes().decode("latin-1"), done.stdout, done.stderr):
        assert SECRET not in text
    assert not [info.key for info in bucket.list("runs/") if SECRET.encode() in bucket.read(info.key)]
    again = mae("run", config, "--json", timeout=60, **secrets)
    assert (again.returncode, states(again.stdout)) == (0, {"cached"})


EPOCHS, TOTAL_STEPS = 300, 1125
"""Of 30 training images in batches of 8."""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "timeout"])
def test_a_signal_to_the_whole_group_still_saves_and_the_same_command_goes_on(tmp_path, store, how):
    """As a terminal sends Ctrl-C and its end to the foreground group, and `timeout` and batch systems send SIGTERM."""
    content: dict[str, Any] = document(store, write_images(tmp_path / "images", 40))
    content["pretrain"]["epochs"] = EPOCHS
    content["evaluation"]["datasets"] = []
    content["resources"] |= {"workers": 2, "cpus_per_worker": 0.5, "checkpoint_every_steps": 50, "log_every_steps": 50}
    config = write_config(tmp_path / "run.yaml", content)
    limit = ["timeout", "--preserve-status", "-s", "TERM", "600"] if how == "timeout" else []
    process = subprocess.Popen(
        [*limit, sys.executable, "-m", "jobs.cli", "run", str(config), "--json"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )
    try:
        until(lambda: list(store.glob("pretrain-*/g0001/checkpoints/*/manifest.json")), alive=process)
        if how == "timeout":
            process.send_signal(signal.SIGALRM)  # its 600 s are over: it sends SIGTERM to the command, and to the group
        else:
            os.killpg(process.pid, how)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 3, stderr
    name = "SIGTERM" if how == "timeout" else how.name
    assert f"asked to stop by {name}: pretrain finishes the step it is at" in stderr
    assert "saved; the same command goes on from there" in stderr
    assert states(stdout) == {"done", "stopped"}

    saved = max(path.parent.name for path in store.glob("pretrain-*/g0001/checkpoints/*/manifest.json"))
    done = mae("run", config, "--json")
    assert done.returncode == 0, done.stderr
    (claim,) = store.glob("pretrain-*/gen/0002.json")
    assert json.loads(claim.read_text())["continues"] == f"g0001/checkpoints/{saved}"
    (receipt,) = store.glob("pretrain-*/receipt.json")
    assert json.loads(receipt.read_text())["facts"]["global_step"] == TOTAL_STEPS > int(saved.removeprefix("step-"))
