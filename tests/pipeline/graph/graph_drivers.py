"""Drivers of the small graph in processes of their own, to be killed, and the state that every such history must end in.

The processes are forked from a server that has already imported torch, which takes seconds. This process is their parent and
waits for them."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graph_stages import OUT, small_graph

from pipeline import cluster
from pipeline.cluster.tasks import Executor
from pipeline.graph.receipts import read_receipt
from pipeline.graph.runner import GraphRun, Outcome
from pipeline.graph.step import Step
from pipeline.storage import open_store

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pipeline.graph.runner"])
MARK = "MAE_TEST_RUN"
"""Environment variable of a driver and of all that it starts, by which its Ray processes are found after its death."""

HERE = str(Path(__file__).parent)
"""The PYTHONPATH with which Ray's workers find the stages."""


class Silent:
    """Hooks that record their calls."""

    tracking_uri = ""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.updates: list[tuple[str, int, int, str, Mapping[str, float]]] = []
        self.ended: list[tuple[str, str]] = []

    def begin(self, step: Step) -> str:
        self.begun.append(step.name)
        return ""

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        self.updates.append((step_name, done, total, unit, dict(fields)))

    def end(self, outcome: Outcome) -> None:
        self.ended.append((outcome.step.name, outcome.state))


def drive(folder: str, tick_s: float, executor: Executor, mark: str, wire: Any) -> None:
    """Life of a driver: report ready, wait for the start, walk the graph, report the states of the steps."""
    os.environ[MARK] = mark
    if executor == "ray":
        os.environ.pop("RAY_ADDRESS", None)
        os.environ["PYTHONPATH"] = HERE
        cluster.connect(cpus=2)
    steps = small_graph({"log": f"{folder}/log", "tick_s": tick_s})
    walk = GraphRun(steps, store=open_store(f"{folder}/store"), executor=executor, hooks=Silent())
    wire.send("ready")
    wire.recv()
    states = {outcome.step.name: outcome.state for outcome in walk.walk()}
    if executor == "ray":
        cluster.disconnect()
    wire.send(states)


class Driver:
    """A driver that is ready to walk."""

    def __init__(self, folder: Path, *, tick_s: float, executor: Executor = "in_process", mark: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.wire, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=drive, args=(str(folder), tick_s, executor, mark, other))
        self.process.start()
        other.close()
        assert self.wire.recv() == "ready"

    def go(self) -> None:
        self.wire.send("go")

    def killed_after(self, seconds: float) -> bool:
        """Kill the driver at that moment, unless it has already ended. Returns whether it was killed."""
        if self.wire.poll(seconds):
            return False
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        return True

    def states(self) -> dict[str, str]:
        """Wait for the end of the process and return the states of the steps."""
        states: dict[str, str] = self.wire.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return states


def walk_to_the_end(
    folder: Path, *, tick_s: float, executor: Executor = "in_process", mark: str = ""
) -> dict[str, str]:
    driver = Driver(folder, tick_s=tick_s, executor=executor, mark=mark)
    driver.go()
    return driver.states()


def results(folder: Path) -> dict[str, Any]:
    """Return all that a store guarantees: every receipt (except `generation` and `made`), its files and shared objects."""
    found: dict[str, Any] = {}
    for step in small_graph({}):
        root = open_store(f"{folder}/store").at(step.directory)
        receipt = read_receipt(root)
        assert receipt is not None, step.name
        body = {key: value for key, value in asdict(receipt).items() if key not in ("generation", "made")}
        store = receipt.as_input(root.uri).store
        for file in receipt.files:
            assert hashlib.sha256(store.read(file.key)).hexdigest() == file.sha256
        shared = {info.key: hashlib.sha256(root.read(info.key)).hexdigest() for info in root.list("objects/")}
        assert all(key == f"objects/{name}" for key, name in shared.items())
        found[step.name] = {"receipt": body, "out": store.read(OUT), "objects": shared}
    return found


def kill_and_go_on(folder: Path, *, seed: int, tick_s: float, span_s: float, executor: Executor, mark: str = "") -> int:
    """Kill a driver up to 3 times at random moments within `span_s`, restarting it until it ends. Returns the number of kills."""
    moments = random.Random(seed)
    for kills in range(3):
        driver = Driver(folder, tick_s=tick_s, executor=executor, mark=mark)
        driver.go()
        if not driver.killed_after(moments.uniform(0, span_s)):
            assert set(driver.states().values()) <= {"done", "cached"}
            return kills
    assert set(walk_to_the_end(folder, tick_s=tick_s, executor=executor, mark=mark).values()) <= {"done", "cached"}
    return 3


def check_like_undisturbed(folder: Path, undisturbed: Mapping[str, Any], *, kills: int) -> None:
    """Check that results are the same, that the kills cost no more work than they must, and that nothing is left to do."""
    assert results(folder) == undisturbed
    lines = (folder / "log").read_text().splitlines()
    # In process, a kill costs at most the current tick, or the current plain step. On Ray, a worker that outlives its driver for a
    # moment may record one tick more.
    assert len(lines) - len(set(lines)) <= 2 * kills
    assert set(walk_to_the_end(folder, tick_s=0).values()) == {"cached"}
    assert (folder / "log").read_text().splitlines() == lines


def processes_of(mark: str) -> dict[int, str]:
    """Return the live processes with the mark in their environment: pid -> command."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
            except OSError:
                continue
    return found


def left_behind(mark: str, *, within_s: float) -> dict[int, str]:
    """Return the processes of a mark that are still alive after `within_s`, and kill them one by one."""
    until = time.monotonic() + within_s
    while (found := processes_of(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found
