"""A real Ray cluster of several nodes on this machine's loopback: each is a `ray start` with a raylet of its own, ended by id."""

import contextlib
import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import psutil
from run_kit import ROOT, end_with_parent, environment

RAY = str(Path(sys.executable).parent / "ray")
RAY_ENV = ROOT / "infra/ray/ray.env"
QUICK = dict(line.split("=", 1) for line in RAY_ENV.read_text().splitlines() if line and not line.startswith("#")) | {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "40",
}
PATIENCE_S = 120.0
"""Limit for what takes seconds on an idle machine."""
ALIVE = """
import json, sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(json.dumps({node.node_name: node.node_id.hex() for node in nodes if node.state == 0}))
"""
T = TypeVar("T")


def until(condition: Callable[[], T], *, within_s: float = PATIENCE_S, alive: subprocess.Popen[str] | None = None) -> T:
    """Wait until the condition is true and return its value. Fails if the process `alive`, which should make it so, has ended."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        assert alive is None or alive.poll() is None, alive.communicate()[1]
        time.sleep(0.1)
    return found


class Node:
    """One node: a `ray start --block` in a session of its own."""

    def __init__(self, name: str, call: list[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.known = name, {}
        self.process = subprocess.Popen(
            [
                RAY,
                "start",
                "--block",
                "--disable-usage-stats",
                "--node-ip-address=127.0.0.1",
                f"--node-name={name}",
                *call,
            ],
            env=dict(env),
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
        )

    def raylet(self) -> psutil.Process | None:
        """Return its raylet, if there is one."""
        return next((one for one in self._below(self.process.pid) if one.name() == "raylet"), None)

    def workers(self) -> list[psutil.Process]:
        """Return the training workers on it."""
        raylet = self.raylet()
        return [one for one in self._below(raylet.pid) if _is_worker(one)] if raylet else []

    def kill(self) -> None:
        """Kill the node like a power cut: first the raylet, then everything that runs on it."""
        raylet = self.raylet()
        below = self._below(self.process.pid)
        if raylet:
            raylet.kill()
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.kill()
        self.process.wait(15)

    def _below(self, pid: int) -> list[psutil.Process]:
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


class Cluster:
    """A head without CPUs, on which drivers run, and nodes with one CPU each."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="maeray-"))  # short, because Ray creates sockets in it
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.secrets = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = environment(**(QUICK | self.secrets | {"RAY_ADDRESS": self.address}))
        self.nodes: dict[str, Node] = {}
        self.head = self._start(
            "head", "--head", f"--port={self.port}", "--num-cpus=0", f"--temp-dir={self.folder}/ray"
        )
        until(self._answers)

    def add(self, name: str) -> Node:
        """Start a node and wait until the head counts it."""
        self.nodes[name] = self._start(name, f"--address={self.address}", "--num-cpus=1")
        until(lambda: name in self.alive())
        return self.nodes[name]

    def only(self, *names: str) -> list[Node]:
        """Kill and start nodes until exactly these are alive."""
        for name in [name for name in self.nodes if name not in names or name not in self.alive()]:
            self.nodes.pop(name).kill()
        until(lambda: set(self.alive()) <= {"head", *names})
        return [self.nodes.get(name) or self.add(name) for name in names]

    def alive(self) -> dict[str, str]:
        """Return the ids of the live nodes by name."""
        done = subprocess.run(
            [sys.executable, "-c", ALIVE, self.address], env=self.env, capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray may print lines of its own
        return dict(json.loads(lines[-1])) if lines else {}

    def drain(self, name: str, *, deadline_s: int) -> None:
        """Announce the node's end, as a cloud does for a spot instance."""
        options = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--node-id={self.alive()[name]}"]
        call = [RAY, "drain-node", f"--address={self.address}", f"--deadline-remaining-seconds={deadline_s}", *options]
        subprocess.run(call, env=self.env, check=True, capture_output=True)

    def end(self) -> None:
        """Kill all nodes, the head last."""
        for node in [*self.nodes.values(), self.head]:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *call: str) -> Node:
        shared = ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
        ports = [f"--dashboard-agent-listen-port={_free_port()}", "--include-log-monitor=false"]
        dashboard = ["--include-dashboard=false"] if name == "head" else []
        return Node(name, [*call, *shared, *ports, *dashboard], self.env, self.folder / f"{name}.log")

    def _answers(self) -> bool:
        assert self.head.process.poll() is None, (self.folder / "head.log").read_text()
        return "head" in self.alive()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that ends with the block."""
    made = Cluster()
    try:
        yield made
    finally:
        made.end()
