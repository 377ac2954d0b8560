"""Receipts mark finished steps; generations decide who may write. Both are small JSON objects, each created exactly once.

    <store>/<name>-<fingerprint[:12]>/gen/0007.json    claimed by put-if-absent before anything is written
                                      g0007/...        what that generation writes
                                      receipt.json     created last: names the generation whose files count

A driver that finds a higher generation than its own is fenced: it stops and never claims again. One that has not noticed yet
(a zombie) can only write into its own generation, which nobody reads.
Errors: Fenced; StorageError; DataError if a receipt cannot be read."""

import hashlib
import json
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, Fenced
from pipeline.graph.step import StageInput, StageResult, Step, StepKind, generation_key
from pipeline.storage import MissingObject, Store

RECEIPT = "receipt.json"
CLAIMS = "gen/"
PACKAGES = ("mae-pipeline", "torch", "deepspeed", "ray", "numpy", "webdataset", "pyarrow", "pillow", "simplejpeg")
"""Packages on which results depend; a receipt records their versions."""
UNKNOWN_REVISION = "unknown"


@dataclass(frozen=True)
class OutputFile:
    """A file that readers of the step rely on. `key` is relative to the generation's directory."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """A finished step. All but `generation` and `made` is reproducible: it does not depend on interruptions or machines."""

    step: str
    fingerprint: str
    identity: Mapping[str, Any]
    """What the fingerprint covers: name, version, the whole config and the fingerprints of the inputs."""
    facts: Mapping[str, Any]
    files: tuple[OutputFile, ...]
    generation: int
    made: Mapping[str, Any]
    """When and where it was made, with which package versions, and in how many seconds."""
    kind: StepKind

    def as_input(self, root_uri: str) -> StageInput:
        """Return the step as the stages that read it see it."""
        return StageInput(root_uri, self.generation, self.fingerprint, self.facts, self.made)


def read_receipt(root: Store) -> Receipt | None:
    """Return the receipt in a step's directory, or None if the step is not finished."""
    try:
        body = json.loads(root.read(RECEIPT))
        body["files"] = tuple(OutputFile(**file) for file in body["files"])
        body.setdefault("kind", _kind_before_it_was_recorded(body["step"]))
        return Receipt(**body)
    except MissingObject:
        return None
    except (ValueError, TypeError, KeyError) as cause:
        raise DataError(
            f"{root.uri}/{RECEIPT} is not a receipt ({cause}). Delete it, and the same command runs that step again"
        ) from cause


def finished_steps(store: Store) -> Iterator[tuple[str, Receipt]]:
    """Yield the directory and receipt of every finished step in a run's store. Lists every object of the store."""
    for info in store.list():
        directory, _, name = info.key.rpartition("/")
        # one level down only: a copy of a step's directory somewhere below is no step
        if name == RECEIPT and directory and "/" not in directory and (receipt := read_receipt(store.at(directory))):
            yield directory, receipt


def claims(root: Store) -> list[int]:
    """Return the generations claimed so far, in ascending order."""
    return sorted(int(info.key.rpartition("/")[2].removesuffix(".json")) for info in root.list(CLAIMS))


def read_claim(root: Store, generation: int) -> Mapping[str, Any]:
    """Return what was recorded when the generation was claimed."""
    return dict(json.loads(root.read(f"{CLAIMS}{generation:04d}.json")))


def claim(root: Store, *, continues: str) -> int:
    """Claim the next generation and return its number. Every earlier generation is fenced from now on.

    `continues` is the key of what this generation starts from, recorded so that nobody deletes it."""
    while True:  # the create fails if another driver took the number first
        generation = max(claims(root), default=0) + 1
        body = {"generation": generation, "continues": continues, "host": socket.gethostname(), "time": time.time()}
        if root.create(f"{CLAIMS}{generation:04d}.json", json.dumps(body).encode()):
            return generation


def check_fence(root: Store, generation: int) -> None:
    """Raise Fenced if a higher generation has been claimed."""
    highest = max(claims(root), default=generation)
    if highest > generation:
        raise Fenced(
            f"{root.uri}: generation {highest} was claimed by another run while {generation} was at work here. This run stops "
            "and the other one continues. Run the same command again after it has ended"
        )


def write_receipt(root: Store, step: Step, generation: int, result: StageResult, *, seconds: float) -> Receipt:
    """Complete the step and return its receipt. If another generation was quicker, its receipt stands and is returned.

    The receipt is read back from the store, so that readers of the step get the same JSON types (lists, text keys) whether the
    step was made in this run or in an earlier one."""
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
            "versions": installed_versions(),
            "revision": code_revision(),
            "notes": result.notes,
        },
    )
    body = json.dumps(asdict(receipt), indent=1, sort_keys=True).encode()
    # Narrows the window for a fenced driver but cannot close it. What slips through is harmless: it names its own
    # generation, whose files are whole, and the first receipt stands.
    check_fence(root, generation)
    root.create(RECEIPT, body)
    standing = read_receipt(root)
    if standing is None:
        raise DataError(f"{root.uri}/{RECEIPT} was deleted while it was being written. Run the same command again")
    return standing


def _kind_before_it_was_recorded(step_name: str) -> StepKind:
    """Receipts written before version 0.2 lack the kind. At that time, a step's name began with it."""
    kinds: dict[str, StepKind] = {"snapshot": "snapshot", "shard": "shard", "join": "join"}
    kinds |= {"pretrain": "pretrain", "report": "report"}
    return kinds.get(re.split("[.-]", step_name)[0], "evaluate")


def installed_versions() -> dict[str, str]:
    """Return the version of every package on which results depend. Those that are not installed are left out.

    A run in one process does without Ray, and a checkout is not installed as `mae-pipeline`."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@cache
def code_revision() -> str:
    """Return the commit of the running code, with `+` if the tree has changes; UNKNOWN_REVISION outside a checkout."""
    # not the working directory, which may be another repository
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN_REVISION


def _output_file(store: Store, key: str) -> OutputFile:
    # read back: a receipt vouches for what the store holds, not for what was sent to it
    data = store.read(key)
    return OutputFile(key, len(data), hashlib.sha256(data).hexdigest())
