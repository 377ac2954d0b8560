"""Tiny real stages for the tests of the graph: they write files and record what they did, line by line, in a log.

The log's path and the length of a tick are options, so that they are not part of any fingerprint."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import errors
from pipeline.errors import Stopped
from pipeline.graph.receipts import check_fence, claims
from pipeline.graph.runner import stop_request_key
from pipeline.graph.step import Attempt, StageInput, StageResult, Step, generation_key

VERSION = 1
OUT = "out.txt"


@dataclass(frozen=True)
class Work:
    value: int = 0
    ticks: int = 4


def record(attempt: Attempt, line: str) -> None:
    """Append a line. Short appends by several processes do not mix."""
    with Path(attempt.options["log"]).open("a") as file:
        file.write(line + "\n")


def tick(attempt: Attempt) -> None:
    time.sleep(attempt.options.get("tick_s", 0.0))
    check_fence(attempt.root, attempt.generation)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finished(attempt: Attempt, text: str) -> StageResult:
    attempt.store.write(OUT, text.encode())
    return StageResult(facts={"digest": digest(text), "shape": (1, 2), "per_label": {7: 1}}, files=(OUT,))


def write(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Hash the configuration and what the inputs wrote."""
    record(attempt, attempt.step_name)
    for done in range(config.ticks):
        attempt.progress.update(done, config.ticks, unit="ticks", half=0.5)
        tick(attempt)
    read = {name: one.store.read(OUT).decode() for name, one in sorted(inputs.items())}
    return finished(attempt, digest([config.value, read]))


def objects(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Write content-addressed objects into the step's root, each with a put-if-absent row. A new generation adds missing ones."""
    keys = []
    for index in range(config.ticks):
        row = f"rows/{index}.json"
        if not attempt.root.exists(row):
            tick(attempt)
            record(attempt, f"{attempt.step_name} {index}")
            data = digest([config.value, index]).encode() * 500
            key = f"objects/{hashlib.sha256(data).hexdigest()}"
            attempt.root.write(key, data)
            attempt.root.create(row, key.encode())
        keys.append(attempt.root.read(row).decode())
    return finished(attempt, "\n".join(keys))


def count(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Compute a chain of hashes, saved at every link. Continues from the link that its generation was claimed with."""
    saved = json.loads(attempt.root.read(attempt.continues)) if attempt.continues else {"done": 0, "chain": ""}
    for done in range(saved["done"], config.ticks):
        attempt.progress.update(done, config.ticks, unit="links")
        tick(attempt)
        if attempt.root.exists(stop_request_key(attempt.generation)):
            raise Stopped(f"stopped at {done} of {config.ticks}, saved")
        record(attempt, f"{attempt.step_name} {done}")
        saved = {"done": done + 1, "chain": digest([config.value, done, saved["chain"]])}
        attempt.store.write(f"links/{done:04d}.json", json.dumps(saved).encode())
    return finished(attempt, saved["chain"])


def newest_link(root: Any) -> str:
    """Return the furthest link of any generation."""
    links = [info.key for number in claims(root) for info in root.list(f"{generation_key(number)}/links/")]
    return max(links, key=lambda key: key.rpartition("/")[2], default="")


def fails(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Raise the pipeline's error that the option `broken` names, or ZeroDivisionError for any other name."""
    record(attempt, attempt.step_name)
    if broken := attempt.options["broken"]:
        raise getattr(errors, broken, ZeroDivisionError)("images/7.jpg is not an image. Remove it")
    return finished(attempt, "repaired")


def dies_once(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Write half of the output and kill the process; succeed the second time."""
    record(attempt, attempt.step_name)
    attempt.store.write("half.txt", b"half")
    if attempt.generation == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return finished(attempt, "alive")


def meets(config: Work, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """End only when two steps run at the same time."""
    meeting = Path(attempt.options["meeting"])
    (meeting / attempt.step_name).touch()
    for _ in range(600):
        if len(list(meeting.iterdir())) == 2:
            return finished(attempt, "met")
        time.sleep(0.1)
    raise TimeoutError("nobody came")


def small_graph(options: Mapping[str, Any], *, ticks: int = 4) -> list[Step]:
    """Return a graph of the pipeline's shape: listing -> shards -> training -> two probes -> page."""
    listing = Step(kind="report", name="listing", function=write, config=Work(1, ticks), options=options)
    shards = Step(
        kind="report",
        name="shards",
        function=objects,
        config=Work(2, ticks),
        inputs={"listing": listing},
        options=options,
    )
    training = Step(
        kind="report",
        name="training",
        function=count,
        config=Work(3, 2 * ticks),
        inputs={"shards": shards},
        options=options,
        resume_point=newest_link,
    )
    near = Step(
        kind="report", name="near", function=write, config=Work(4, ticks), inputs={"shards": shards}, options=options
    )
    far = Step(
        kind="report", name="far", function=write, config=Work(5, ticks), inputs={"training": training}, options=options
    )
    page = Step(
        kind="report",
        name="page",
        function=write,
        config=Work(6, ticks),
        inputs={"near": near, "far": far},
        options=options,
    )
    return [listing, shards, training, near, far, page]
