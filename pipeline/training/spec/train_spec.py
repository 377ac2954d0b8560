"""What a worker is told: task, recipe (decides results) and placement (does not). Small frozen values that travel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Samples, select
from pipeline.storage import open_store
from pipeline.training.checkpoints.host_copy import Room, in_memory, on_disk, pinned
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.checkpoints.retention import Retention
from pipeline.training.engine.settings import EngineSettings, Offload
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import Task
from pipeline.training.world import World


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How it runs here: nothing of it decides results beyond rounding."""

    zero_stage: Literal[1, 2, 3]
    micro_batch: int
    """Largest number of samples in one forward pass of a worker."""
    offload: Offload
    activation_checkpointing: bool
    checkpoint_every_steps: int
    keep_checkpoints: int
    keep_every_steps: int | None
    keep_best: int
    checkpoint_copy: Literal["memory", "disk"]
    log_every_steps: int
    profile_steps: tuple[int, int] | None
    """(first, count), counted from 1."""
    decode_threads: int
    cache_directory: str
    cache_max_bytes: int
    watchdog_s: float
    """Longest that a phase of a step may last before every stack is written down."""

    @classmethod
    def from_resources(cls, resources: Mapping[str, Any]) -> "Placement":
        """Takes what concerns the loop from a step's resources."""
        return cls(**{field.name: resources[field.name] for field in fields(cls)})

    @property
    def retention(self) -> Retention:
        """Which checkpoints stay."""
        return Retention(last=self.keep_checkpoints, every_steps=self.keep_every_steps, best=self.keep_best)

    def room(self, device: torch.device) -> Room:
        """For the copy of a worker's state that is written while training goes on."""
        if self.checkpoint_copy == "disk":
            return on_disk(Path(self.cache_directory).expanduser() / "copies")
        return pinned if device.type == "cuda" else in_memory

    def cache(self, dataset: DatasetAddress) -> ShardCache:
        """The node's cache of the dataset's shards."""
        directory = Path(self.cache_directory).expanduser()
        return ShardCache(open_store(dataset.root_uri), directory, max_bytes=self.cache_max_bytes)


def engine_settings(recipe: Recipe, placement: Placement, *, workers: int) -> EngineSettings:
    """Micro-batch and accumulation follow from the global batch and the largest slice of a worker."""
    largest_slice = math.ceil(recipe.global_batch / workers)
    micro_batch = min(placement.micro_batch, largest_slice)
    return EngineSettings(
        precision=recipe.precision,
        zero_stage=placement.zero_stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(largest_slice / micro_batch),
        betas=recipe.betas,
        max_grad_norm=recipe.max_grad_norm,
        offload=placement.offload,
        activation_checkpointing=placement.activation_checkpointing,
    )


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything a worker needs to train a task."""

    task: Task
    recipe: Recipe
    order: OrderConfig
    image_size: tuple[int, int]
    dataset: DatasetAddress
    train_samples: Samples
    """What of the training split is trained on."""
    evaluation_split: str
    """Split to score after training; empty: none."""
    placement: Placement
    start: StartPoint | None = None
    """Where it begins; None: with initial weights."""

    def cursor(self, order: SampleOrder) -> dict[str, object]:
        """What a position is bound to."""
        return {
            "dataset": self.dataset.digest,
            "train_samples": self.train_samples,
            "global_batch": self.recipe.global_batch,
            **order.parameters(),
        }

    def loader(self, manifest: Manifest, split: str, world: World) -> Loader:
        """This worker's reader of a split: the training split in the computed order, others whole."""
        samples = self.train_samples if split == "train" else "all"
        selection = select(manifest, split, samples, seed=self.order.seed)
        return Loader(
            selection,
            SampleOrder(selection.counts, self.order),
            global_batch=self.recipe.global_batch,
            rank=world.rank,
            world_size=world.size,
            augment=self.recipe.augment,
            image_size=self.image_size,
            seed=self.order.seed,
            cache=self.placement.cache(self.dataset),
            decode_threads=self.placement.decode_threads,
            pin_memory=world.device.type == "cuda",
            fetch_bytes=self.placement.cache_max_bytes // world.local_size,
        )
