"""Clusters that `connect` starts on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest
from ray_kit import until
from run_kit import end_with_parent

from pipeline import cluster
from pipeline.cluster import connection
from pipeline.cluster.jobs import _reason
from pipeline.errors import PipelineError

TWICE = """
import ray  # reads the authentication mode, before `connect` has set it
from pipeline import cluster
for _ in range(2):
    cluster.connect(cpus=1)
    print(cluster.map_tasks(abs, [-3, 2], executor="ray"))
    cluster.disconnect()
"""

SIGNALLED = """
import contextlib, json, os, signal, sys, psutil
from pipeline import cluster
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
cluster.connect(cpus=1)
started, alike = [], []
for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(process.pid) == os.getpgid(0) or os.getsid(process.pid) == os.getsid(0):
            alike.append(process.pid)
        started.append(process.pid)
os.killpg(0, signal.SIGTERM)
answer = cluster.map_tasks(abs, [-3, 2], executor="ray")
print(json.dumps({"heard": heard, "answer": answer, "started": started, "alike": alike}), flush=True)
sys.stdin.read()
"""


@pytest.mark.system
def test_a_process_may_start_a_cluster_more_than_once():
    """Ray's client keeps using its first token, so the second cluster must accept it."""
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False, timeout=180)
    assert done.stdout.splitlines() == ["[3, 2]", "[3, 2]"], done.stderr


@pytest.fixture(autouse=True)
def authentication_restored(monkeypatch):
    """`connect` sets the two variables."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("error", "variables", "words"),
    [
        (
            OSError("AF_UNIX path length cannot exceed 107 bytes: /long"),
            {"TMPDIR": "/long"},
            "TMPDIR=/long says.*RAY_TMPDIR",
        ),
        (
            PermissionError(13, "Permission denied", "/tmp/ray"),
            {},
            "'/tmp/ray'.*in /tmp/ray, as neither.*Set RAY_TMPDIR",
        ),
        (
            OSError(28, "No space left on device"),
            {"RAY_TMPDIR": "/full", "TMPDIR": "/x"},
            "No space.*RAY_TMPDIR=/full says",
        ),
        (RuntimeError("timed out\nduring startup"), {}, "timed out during startup.*--in-process"),
    ],
)
def test_a_cluster_of_its_own_that_cannot_start_is_one_line(monkeypatch, error, variables, words):
    import ray

    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=words) as caught:
        cluster.connect()
    assert "\n" not in str(caught.value)
    assert "RAY_ADDRESS" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_does_not_answer_is_named(monkeypatch, address):
    """Before Ray waits for it in C++, where no signal is heard."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PipelineError, match=f"Ray {address}: no cluster answers there .*RAY_ADDRESS"):
        cluster.connect()


@pytest.mark.parametrize(
    ("greeting", "words"), [(b"", "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not Ray")]
)
def test_what_listens_but_is_no_cluster_is_named(monkeypatch, greeting, words):
    """Ray would try it again for minutes."""
    monkeypatch.setattr(connection, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def answer() -> None:
            accepted.append(server.accept()[0])
            accepted[0].sendall(greeting)

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(PipelineError, match=f"Ray {address}: no cluster answers there .*{words}"):
            cluster.connect()
        accepted[0].close()


@pytest.mark.system
def test_a_signal_to_the_drivers_group_leaves_ray_alone_and_its_death_ends_ray():
    driver = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )
    try:
        assert driver.stdout is not None
        said = json.loads(driver.stdout.readline())
        assert (said["heard"], said["answer"], said["alike"]) == ([signal.SIGTERM], [3, 2], [])
        assert said["started"]
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()

    def ended() -> bool:
        return not any(
            psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in said["started"]
        )

    until(
        ended
    )  # Ray's agents look for the raylet every few seconds, and tell the dead GCS of its end for up to a minute


LOG = """pretrain: running  starting 1 worker on Ray
pretrain: {ended}
report: stopped
pretrain  ■ stopped  46 s  bbe92cdf4c77
stopped, nothing is lost: the same command goes on from here
{{"run": "6be8", "verdict": "stopped"}}"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("Traceback\nmae: data.source='/x' does not exist\n", "mae: data.source='/x' does not exist"),
        (LOG.format(ended="failed  4 s  the disk is full"), "pretrain: failed  4 s  the disk is full"),
        (
            LOG.format(ended="stopped  4 s  another run has claimed it"),
            "pretrain: stopped  4 s  another run has claimed it",
        ),
        ("/bin/sh: 1: mae: not found\n", "/bin/sh: 1: mae: not found"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failed_job_is_found_in_its_log(log, reason):
    assert _reason(log.splitlines()) == reason


def status_of_monitor(**types: str) -> bytes:
    return json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()


@pytest.mark.parametrize(
    ("status", "grows"),
    [(status_of_monitor(a1="node_a1", b2="node_b2"), False), (status_of_monitor(a1="head"), True), (None, False)],
)
def test_a_cluster_with_an_autoscaler_may_grow(monkeypatch, status, grows):
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: status)
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    assert cluster.may_grow() == grows
