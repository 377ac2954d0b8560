"""GPUs of a cluster with an autoscaler, in both of Ray's versions of it: asked for, waited for, or known not to come.

Ray's own provider of fake nodes starts them on this machine; their GPUs are but numbers, so nothing trains here."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_kit import RAY, until
from run_kit import end_with_parent, environment
from training_kit import attempt_at, in_a_process

from pipeline import cluster
from pipeline.training import room

pytestmark = pytest.mark.system
HEAD_ID = "f" * 51 + "00000"
"""What the provider calls the head."""
NO_COMMANDS = (
    *("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
"""Keys that the autoscaler's schema demands."""


def autoscaling(address: str, *, gpus: int) -> dict[str, Any]:
    """Return the autoscaler's configuration: workers of 2 CPUs, and with GPUs if there are any."""
    held = {"CPU": 2, "object_store_memory": 80_000_000}
    types = {"cpu": {"resources": held, "node_config": {}, "max_workers": 2}}
    if gpus:
        types["gpu"] = {"resources": held | {"GPU": gpus}, "node_config": {}, "max_workers": 2}
    provider = {
        "type": "external",  # `fake_multinode` needs a file that Ray's wheels lack
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
    }
    head = {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": provider,
        "available_node_types": types | {"ray.head.default": head},
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in NO_COMMANDS},
    }


@contextlib.contextmanager
def autoscaling_cluster(version: str, *, gpus: int) -> Iterator[str]:
    """Start a head of one CPU with an autoscaler; yield its address."""
    folder = Path(tempfile.mkdtemp(prefix="maeray-"))  # short, because Ray creates sockets in it
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.json").write_text(json.dumps(autoscaling(address, gpus=gpus)))
    chosen = {"RAY_enable_autoscaler_v2": "1"} if version == "v2" else {}
    head = subprocess.Popen(
        [
            RAY,
            *("start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--num-cpus=1"),
            *(f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}/ray", "--include-dashboard=false"),
            *("--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"),
            f"--autoscaling-config={folder}/config.json",
        ],
        env=environment(
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_FAKE_CLUSTER="1",
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD_ID,
            RAY_CLOUD_INSTANCE_ID=HEAD_ID,
            **chosen,
        ),
        stdout=(folder / "head.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )
    try:
        until(lambda: (folder / "head.log").read_text().count("Ray runtime started"), within_s=60)
        yield address
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(15)
        shutil.rmtree(folder, ignore_errors=True)


class Heard:
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def decided(address: str, folder: Path, patience_s: float) -> tuple[bool, bool, list[str]]:
    """Decide what two workers train on; return whether the cluster may grow, the decision, and what was said of it."""
    os.environ["RAY_ADDRESS"] = address
    room._ANSWER_S = patience_s
    heard = Heard()
    attempt = attempt_at(folder, executor="ray", workers=2, use_gpu="auto", node_wait_s=100.0)
    cluster.connect()
    try:
        deadline = time.monotonic() + 30  # the first version says nothing until its monitor has started
        while not cluster.may_grow() and time.monotonic() < deadline:
            time.sleep(0.5)
        grows = cluster.may_grow()
        made = room.with_hardware_decided(replace(attempt, progress=heard))
    finally:
        cluster.disconnect()
    return grows, made.resources.use_gpu is True, heard.lines


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_gpu_nodes_of_an_autoscaler_are_started_and_waited_for(version, tmp_path):
    with autoscaling_cluster(version, gpus=1) as address:
        grows, use_gpu, said = in_a_process(decided, address, tmp_path, 60.0)
    assert (grows, use_gpu) == (True, True)
    assert said[0].startswith("asking the autoscaler for GPUs for 2 workers")
    assert said[1:] == ["training on 2 GPUs"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_autoscaler_without_gpu_nodes_leaves_the_cpu(version, tmp_path):
    with autoscaling_cluster(version, gpus=0) as address:
        grows, use_gpu, said = in_a_process(decided, address, tmp_path, 10.0)
    assert (grows, use_gpu) == (True, False)
    assert said[1:] == [
        "training on the CPU: this cluster has no GPU, and its autoscaler starts no nodes that have what a worker needs"
    ]
