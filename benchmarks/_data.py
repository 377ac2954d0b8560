"""What the benchmarks of the data path share: photographs, real shards of them, and ratios.

Units:  seconds; a ratio is theirs / ours, above 1 where ours is faster; median and quartiles over turns.
Errors: SystemExit for a folder without usable JPEGs."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from mae_core import MAEConfig
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.order import OrderConfig
from pipeline.data.images.photos import Photos, photos
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.errors import ConfigError
from pipeline.graph.step import Attempt, StageInput
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import snapshot
from pipeline.storage import open_store
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import MAETask
from pipeline.training.spec.train_spec import TrainSpec

_CLASSES = 8
_OPTIONS = {"bad_share_stop": 0.05, "bad_share_warn": 0.01}


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the median and quartiles of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return how many times longer theirs takes, within each turn."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def shown(value: Spread) -> str:
    """Format a spread for a table: median (quartiles)."""
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the command line that all these benchmarks share."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--quick", action="store_true", help="a smaller run: within 40 s on 2 cores")
    made.add_argument("--images", type=Path, metavar="DIR", help="JPEGs to use; default: generated ones")
    return made


def chosen_photos(options: argparse.Namespace, *, count: int) -> Photos:
    """Return the JPEGs in --images, or generated ones."""
    try:
        return photos(options.images, count=count)
    except ConfigError as error:
        raise SystemExit(str(error)) from None


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Limit torch to one thread, as in a worker of a loader."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_files(files: Sequence[bytes], folder: Path, *, copies: int = 1) -> Path:
    """Write each image to a file, `copies` times, in class folders that ImageFolder and our snapshot can read."""
    for number in range(copies * len(files)):
        place = folder / f"class{number % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(files[number % len(files)])
    return folder


class _Silent:
    """Progress that is not shown."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


def attempt(root: Path, *, executor: Executor = "in_process") -> Attempt:
    """Return an attempt that lets a stage write below `root`."""
    return Attempt(str(root), 1, "", "benchmark", "0" * 64, Resources(), executor, _Silent(), options=_OPTIONS)


def listed(source: Path, root: Path) -> StageInput:
    """Run the snapshot stage on a folder; all images are in `train`."""
    handed = attempt(root)
    result = snapshot(SnapshotConfig(source=str(source), test_share=0.0, seed=0), {}, handed)
    return StageInput(handed.root_uri, handed.generation, handed.fingerprint, result.facts)


def dataset(source: Path, root: Path, *, shards: int) -> StageInput:
    """Run the snapshot and shard stages on a folder, in this process."""
    handed = attempt(root / "shards")
    config = ShardStageConfig(source=str(source), seed=0, shard_max_bytes=128 * 2**20, min_shards=shards)
    result = shard(config, {"snapshot": listed(source, root / "snapshot")}, handed)
    return StageInput(handed.root_uri, handed.generation, handed.fingerprint, result.facts)


def pretraining(model: MAEConfig, recipe: Recipe, resources: Resources, made: StageInput, *, cache: Path) -> TrainSpec:
    """Return the pretraining of a model on `dataset(...)`, as the pretrain stage would hand it to the loop."""
    return TrainSpec(
        task=MAETask(model=model, weight_decay=recipe.weight_decay, seed=0),
        recipe=recipe,
        order=OrderConfig(seed=0),
        image_size=model.encoder.image_size,
        dataset=dataset_address(made),
        train_samples="all",
        evaluation_split="",
        resources=resources.model_copy(update={"cache_directory": str(cache)}),
    )


def sharded(source: Path, root: Path, *, shards: int) -> Manifest:
    """Return the manifest of `dataset(...)`."""
    made = dataset(source, root, shards=shards)
    return Manifest.open(made.store, open_store(made.root_uri))
