"""Receipts say that a step is complete; generations say who may write. Both are small JSON objects created once.

    <store>/<name>-<fingerprint[:12]>/gen/0007.json    claimed by put-if-absent before anything is written
                                      g0007/...        what that generation writes
                                      receipt.json     created last: present = complete, names the generation it used

A driver that finds a higher generation than its own is fenced: it stops and never claims again. A zombie writes into a
place that nobody reads. Errors: Fenced; StorageError; DataError when a receipt cannot be read."""

import hashlib
import json
import platform
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from pipeline.errors import DataError, Fenced
from pipeline.graph.step import StageInput, StageResult, Step, StepKind, generation_key
from pipeline.storage import MissingObject, Store

RECEIPT = "receipt.json"
CLAIMS = "gen/"
VERSIONS_OF = ("mae-pipeline", "torch", "deepspeed", "ray", "numpy", "webdataset", "pyarrow", "pillow", "simplejpeg")


@dataclass(frozen=True)
class OutputFile:
    """A file that readers of the step rely on; `key` is relative to the generation's directory."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """A complete step. Everything but `generation` and `made` is the same whoever made it, however often it was interrupted."""

    step: str
    fingerprint: str
    identity: Mapping[str, Any]
    """Name, version, full config and the fingerprints of the inputs."""
    facts: Mapping[str, Any]
    files: tuple[OutputFile, ...]
    generation: int
    made: Mapping[str, Any]
    """When, where, with which versions, in how many seconds."""
    kind: StepKind

    def as_input(self, root_uri: str) -> StageInput:
        """The step as the stages that read it see it."""
        return StageInput(root_uri, self.generation, self.fingerprint, self.facts, self.made)


def read_receipt(root: Store) -> Receipt | None:
    """The receipt of the step whose directory this is; None: not complete."""
    try:
        body = json.loads(root.read(RECEIPT))
        body["files"] = tuple(OutputFile(**file) for file in body["files"])
        body.setdefault("kind", _kind_before_it_was_recorded(body["step"]))
        return Receipt(**body)
    except MissingObject:
        return None
    except (ValueError, TypeError, KeyError) as cause:
        raise DataError(
            f"{root.uri}/{RECEIPT} is not a receipt ({cause}). Delete it, and the same command makes the step again"
        ) from cause


def finished_steps(store: Store) -> Iterator[tuple[str, Receipt]]:
    """Yield directory and receipt of every finished step of a run's store. Lists the whole store."""
    for info in store.list():
        directory, _, name = info.key.rpartition("/")
        if name == RECEIPT and directory and "/" not in directory and (receipt := read_receipt(store.at(directory))):
            yield directory, receipt


def claims(root: Store) -> list[int]:
    """Generations claimed so far, ascending."""
    return sorted(int(info.key.rpartition("/")[2].removesuffix(".json")) for info in root.list(CLAIMS))


def read_claim(root: Store, generation: int) -> Mapping[str, Any]:
    """What a generation wrote when it was claimed."""
    return dict(json.loads(root.read(f"{CLAIMS}{generation:04d}.json")))


def claim(root: Store, *, continues: str) -> int:
    """Claims the next generation; whoever held an earlier one is fenced from now on."""
    while True:
        generation = max(claims(root), default=0) + 1
        body = {"generation": generation, "continues": continues, "host": socket.gethostname(), "time": time.time()}
        if root.create(f"{CLAIMS}{generation:04d}.json", json.dumps(body).encode()):
            return generation


def check_fence(root: Store, generation: int) -> None:
    """Raises Fenced when a higher generation has been claimed."""
    highest = max(claims(root), default=generation)
    if highest > generation:
        raise Fenced(
            f"{root.uri}: generation {highest} was claimed by another run while {generation} was at work here; "
            f"this run stops, the other one goes on. Run the same command again when it has ended"
        )


def write_receipt(root: Store, step: Step, generation: int, result: StageResult, *, seconds: float) -> Receipt:
    """Completes the step. When another generation was quicker, its receipt stands and is returned.

    What is returned is read back, so that readers of the step see the same whether it was made in this run or in an earlier one."""
    store = root.at(generation_key(generation))
    receipt = Receipt(
        kind=step.kind,
        step=step.name,
        fingerprint=step.fingerprint,
        identity=step.identity(),
        facts=result.facts,
        files=tuple(_output_file(store, key) for key in result.files),
        generation=generation,
        made={
            "time": time.time(),
            "seconds": round(seconds, 3),
            "host": socket.gethostname(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "versions": versions(),
            "notes": result.notes,
        },
    )
    body = json.dumps(asdict(receipt), indent=1, sort_keys=True).encode()
    check_fence(root, generation)
    root.create(RECEIPT, body)
    standing = read_receipt(root)
    if standing is None:
        raise DataError(f"{root.uri}/{RECEIPT} vanished while it was read. Run the same command again")
    return standing


def _kind_before_it_was_recorded(step_name: str) -> StepKind:
    """Receipts written before version 0.2 lack the kind; step names were derived from it then."""
    kinds: dict[str, StepKind] = {"snapshot": "snapshot", "shard": "shard", "join": "join"}
    kinds |= {"pretrain": "pretrain", "report": "report"}
    return kinds.get(re.split("[.-]", step_name)[0], "evaluate")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    return {name: metadata.version(name) for name in VERSIONS_OF}


def _output_file(store: Store, key: str) -> OutputFile:
    data = store.read(key)
    return OutputFile(key, len(data), hashlib.sha256(data).hexdigest())
