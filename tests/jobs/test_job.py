"""`mae job` against a real Ray head on loopback that asks for a token."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from run_kit import document, end_with_parent, environment, mae, migrated_database, write_config, write_images

__all__ = ["migrated_database"]
TOKEN = "0123456789abcdef" * 4


class Head(NamedTuple):
    """A cluster's dashboard."""

    address: str

    def job(self, *arguments: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        """`mae job ...`."""
        secrets = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        return mae("job", *arguments, "--address", self.address, **secrets)

    def status(self, job: str) -> str:
        done = self.job("status", job)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["status"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start_command(port: int, dashboard: int, agent: int, folder: Path) -> Sequence[str]:
    return [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        "--object-store-memory=200000000", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={agent}",  # its default is the same for every cluster of a machine
    ]  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """End the head and everything it started: all of its session, by its id."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(15)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="maeray-"))  # short: Ray puts sockets below it, whose paths are limited
    port, dashboard, agent = free_ports(3)
    process = subprocess.Popen(
        start_command(port, dashboard, agent, folder / "ray"),
        env=environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED="0"),
        stdout=(folder / "head.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )
    try:
        there = Head(f"http://127.0.0.1:{dashboard}")
        deadline = time.monotonic() + 90
        while there.job("list").returncode:
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, there.job("list").stderr
        yield there
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def written(folder: Path, database: Path, *, epochs: int) -> Path:
    (folder / "store").mkdir()
    shutil.copy(database, folder / "store" / "mlflow.db")
    content: dict[str, Any] = document(folder / "store", write_images(folder / "images", 40))
    content["pretrain"]["epochs"] = epochs
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["linear"]}]
    content["resources"] |= {"cpus_per_worker": 0.5, "checkpoint_every_steps": 20, "log_every_steps": 20}
    return write_config(folder / "run.yaml", content)


def submitted(head: Head, config: Path) -> str:
    done = head.job("submit", config)
    assert done.returncode == 0, done.stderr
    assert "store" in done.stderr
    assert "is a folder: every node of the cluster must see it under this path" in done.stderr
    assert f"mae job logs {done.stdout.strip()} --address {head.address} --follow" in done.stderr
    return done.stdout.strip()


def until(condition: Any, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.system
def test_a_run_is_submitted_once_stopped_and_resumed(head, tmp_path, migrated_database):
    config = written(tmp_path, migrated_database, epochs=5000)  # the commands before the stop take seconds each
    job = submitted(head, config)
    assert job.startswith("tiny-")
    assert job.endswith("-1")
    assert submitted(head, config) == job  # it is running, so it is not started a second time
    until(lambda: list((tmp_path / "store").glob("pretrain-*/g0001/checkpoints/*/manifest.json")), within_s=240)
    assert head.status(job) == "RUNNING"
    assert "pretrain: running" in head.job("logs", job).stdout

    done = head.job("stop", job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"job": job, "status": "STOPPED", "message": json.loads(done.stdout)["message"]}
    text = head.job("logs", job).stdout
    assert "saved; the same command goes on from there" in text
    assert "stopped, nothing is lost" in text
    assert TOKEN not in text

    second = submitted(head, config)
    assert second.endswith("-2")
    until(lambda: list((tmp_path / "store").glob("pretrain-*/gen/0002.json")), within_s=240)
    (claim,) = (tmp_path / "store").glob("pretrain-*/gen/0002.json")
    assert json.loads(claim.read_text())["continues"].startswith("g0001/")
    assert head.job("stop", second).returncode == 0
    rows = [json.loads(line) for line in head.job("list").stdout.splitlines()]
    assert {row["job"]: row["status"] for row in rows} == {job: "STOPPED", second: "STOPPED"}


@pytest.mark.system
def test_what_the_cluster_refuses_is_one_clear_line(head):
    for arguments, token, words in [
        (["list"], "f" * 64, "Set RAY_AUTH_TOKEN to the cluster's token"),
        (["status", "nothing-1"], TOKEN, "nothing-1"),
        (["logs", "nothing-1"], TOKEN, "nothing-1"),
        (["logs", "nothing-1", "--follow"], TOKEN, "nothing-1"),
        (["stop", "nothing-1"], TOKEN, "nothing-1"),
    ]:
        done = head.job(*arguments, token=token)
        assert done.returncode == 1, arguments
        assert "Traceback" not in done.stderr
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert TOKEN not in done.stderr


def test_nobody_at_the_address_is_one_clear_line():
    (port,) = free_ports(1)
    done = Head(f"http://127.0.0.1:{port}").job("list")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"mae: http://127.0.0.1:{port}: " in done.stderr
    done = Head("nowhere").job("list")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_a_wrong_configuration_is_refused_before_the_cluster_is_asked(tmp_path):
    config = write_config(tmp_path / "run.yaml", document("/s", "/i") | {"sede": 1})
    done = Head("http://127.0.0.1:1").job("submit", config)
    assert done.returncode == 2
    assert "sede is not a field; did you mean seed?" in done.stderr


@pytest.mark.system
def test_a_job_runs_to_its_end_and_its_log_is_followed(head, tmp_path, migrated_database):
    config = written(tmp_path, migrated_database, epochs=2)
    job = submitted(head, config)
    done = head.job("logs", job, "--follow")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert {step["state"] for step in json.loads(last)["steps"]} == {"done"}
    until(lambda: head.status(job) == "SUCCEEDED", within_s=20)
    again = submitted(head, config)
    assert again != job
    head.job("logs", again, "--follow")
    until(lambda: head.status(again) == "SUCCEEDED", within_s=20)
