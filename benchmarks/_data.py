"""What the benchmarks of the data path share: photographs, real shards of them, and ratios.

Units:  seconds; a ratio is theirs / ours, above 1 where ours is faster.
Errors: SystemExit for a folder without usable JPEGs.
Source: median and quartiles over turns."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.images.photos import Photos, photos
from pipeline.errors import ConfigError
from pipeline.graph.step import Attempt, StageInput
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import SnapshotConfig, snapshot
from pipeline.storage import open_store

_CLASSES = 8
_OPTIONS = {"bad_share_stop": 0.05, "bad_share_warn": 0.01}


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value. Errors: none. Source: none."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times longer theirs takes, within each turn. Errors: none. Source: none."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def shown(value: Spread) -> str:
    """For a table. Errors: none. Source: none."""
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """What these benchmarks are all asked. Errors: SystemExit for a wrong option. Source: none."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--quick", action="store_true", help="a smaller shape: within 40 s on 2 cores")
    made.add_argument("--images", type=Path, metavar="DIR", help="JPEGs; left out: made-up ones")
    return made


def chosen_photos(asked: argparse.Namespace, *, count: int) -> Photos:
    """What --images names, or made-up ones. Errors: SystemExit for a folder without usable JPEGs. Source: none."""
    try:
        return photos(asked.images, count=count)
    except ConfigError as error:
        raise SystemExit(str(error)) from None


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch alone in its thread, as in a loader's worker. Errors: none. Source: none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_files(files: Sequence[bytes], folder: Path, *, copies: int = 1) -> Path:
    """A file each in class folders, as ImageFolder and our snapshot read them. Errors: OSError. Source: none."""
    for number in range(copies * len(files)):
        place = folder / f"class{number % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(files[number % len(files)])
    return folder


class _Silent:
    """Progress that nobody looks at."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """See Progress."""


def attempt(root: Path, *, executor: Executor = "in_process") -> Attempt:
    """Where a stage may write. Errors: none. Source: none."""
    return Attempt(str(root), 1, "", "benchmark", "0" * 64, Resources(), executor, _Silent(), options=_OPTIONS)


def listed(source: Path, root: Path) -> StageInput:
    """The real snapshot of a folder, all of it `train`. Errors: those of the stage. Source: none."""
    handed = attempt(root)
    result = snapshot(SnapshotConfig(source=str(source), test_share=0.0, seed=0), {}, handed)
    return StageInput(handed.root_uri, handed.generation, handed.fingerprint, result.facts)


def dataset(source: Path, root: Path, *, shards: int) -> StageInput:
    """Real shards of a folder, by the real stages, in this process. Errors: those of the stages. Source: none."""
    handed = attempt(root / "shards")
    config = ShardStageConfig(source=str(source), seed=0, shard_max_bytes=128 * 2**20, min_shards=shards)
    result = shard(config, {"snapshot": listed(source, root / "snapshot")}, handed)
    return StageInput(handed.root_uri, handed.generation, handed.fingerprint, result.facts)


def sharded(source: Path, root: Path, *, shards: int) -> Manifest:
    """The manifest of a `dataset`. Errors: those of the stages. Source: none."""
    made = dataset(source, root, shards=shards)
    return Manifest.open(made.store, open_store(made.root_uri))
