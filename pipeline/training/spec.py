"""What a worker is told: task, recipe (decides results) and placement (does not). Small frozen values that travel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mae_core.config import ADDED_LATER
from mae_core.schedules import scaled_lr, warmup_cosine, warmup_stable_decay
from pipeline.data.cache import ShardCache
from pipeline.data.images import AugmentConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import NO_LABEL, Manifest
from pipeline.data.order import OrderConfig, SampleOrder
from pipeline.data.selection import Selection
from pipeline.errors import ConfigError
from pipeline.graph.step import StageInput
from pipeline.storage import open_store
from pipeline.training.engine_settings import EngineSettings, Offload
from pipeline.training.guard import GuardConfig
from pipeline.training.host_copy import Room, in_memory, on_disk, pinned
from pipeline.training.retention import Retention
from pipeline.training.start import StartPoint
from pipeline.training.tasks import Task
from pipeline.training.world import World


@dataclass(frozen=True, kw_only=True)
class DatasetAddress:
    """A finished shard step: where its manifest and its shards lie."""

    manifest_uri: str
    root_uri: str
    digest: str
    """The manifest's: the identity of the dataset."""

    def open(self) -> Manifest:
        """Reads the manifest."""
        return Manifest.open(open_store(self.manifest_uri), open_store(self.root_uri))


def dataset_address(shards: StageInput) -> DatasetAddress:
    """Where a finished shard step left its dataset; a join's shards lie in the steps of its parts, beside its own."""
    joined = shards.facts.get("keys_from") == "store"
    root_uri = shards.root_uri.rpartition("/")[0] if joined else shards.root_uri
    return DatasetAddress(manifest_uri=shards.store.uri, root_uri=root_uri, digest=str(shards.facts["digest"]))


def unsuited(shards: StageInput) -> str:
    """Why a dataset cannot be evaluated on; empty: it can."""
    if not shards.facts["classes"]:
        return "no labels"
    if "test" not in shards.facts["splits"]:
        return "no test split"
    return ""


Samples = int | Literal["all", "labelled"]
"""Which samples of a split: all, those with a label, or so many of these, equally many of each class."""


def select(manifest: Manifest, split: str, samples: Samples, *, seed: int) -> Selection:
    """Opens the choice."""
    everything = Selection.all(manifest, split)
    if samples == "all":
        return everything
    if samples == "labelled":
        labels = [everything.rows(shard).labels for shard in range(len(everything.shards))]
        return Selection(manifest, split, tuple(np.flatnonzero(of_shard != NO_LABEL) for of_shard in labels))
    return Selection.balanced(manifest, split, count=samples, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task is optimised: all of it decides results. Defaults are MAE's for pretraining (arXiv 2111.06377, table 8)."""

    global_batch: int = 4096
    """Samples of one optimiser step, over all workers: micro-batch and accumulation are derived."""
    epochs: int = 800
    base_lr: float = 1.5e-4
    """Learning rate at a global batch of 256; the absolute rate is base_lr * global_batch / 256."""
    warmup_epochs: float = 40.0
    schedule: Literal["cosine", "warmup_stable_decay"] = field(default="cosine", metadata=ADDED_LATER)
    """After the warmup: half a cosine, or constant and then down over the last `decay_share`."""
    decay_share: float = field(default=0.2, metadata=ADDED_LATER)
    """Share of the epochs over which `warmup_stable_decay` comes down; `cosine` does not read it."""
    min_lr: float = 0.0
    """Absolute learning rate at the end."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = field(default=None, metadata=ADDED_LATER)
    """Gradients whose norm over all parameters is larger are scaled down to it; null, as in the paper: never."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What the model computes in; targets, softmax and loss are float32 either way."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    guard: GuardConfig = field(default=GuardConfig(), metadata=ADDED_LATER)
    """When a step is skipped, rolled back, or ends the training."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs", "base_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive: write a number above 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm={self.max_grad_norm} is not positive: write 1.0, or null for no clipping")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(f"warmup_epochs={self.warmup_epochs} is not in [0, epochs={self.epochs}): write fewer")
        most = 1 - self.warmup_epochs / self.epochs
        if self.schedule == "warmup_stable_decay" and not 0 < self.decay_share <= most:
            raise ConfigError(
                f"decay_share={self.decay_share} is not in (0, {most:.2g}], what the warmup leaves: write less"
            )

    def learning_rate(self, global_step: int, samples_per_epoch: int) -> float:
        """Absolute rate of a step: a pure function of images seen, so a resumed run cannot slip."""
        total_images = self.epochs * samples_per_epoch
        warmup_images = round(self.warmup_epochs * samples_per_epoch)
        curve = warmup_cosine
        if self.schedule == "warmup_stable_decay":
            decay_images = min(round(self.decay_share * total_images), total_images - warmup_images)
            curve = partial(warmup_stable_decay, decay_images=max(1, decay_images))
        return curve(
            global_step * self.global_batch,
            peak_lr=scaled_lr(self.base_lr, self.global_batch),
            warmup_images=warmup_images,
            total_images=total_images,
            min_lr=self.min_lr,
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Fine-tuning of all weights. Defaults are MAE's (arXiv 2111.06377, table 9, ViT-B)."""

    global_batch: int = 1024
    epochs: int = 100
    base_lr: float = 1e-3
    warmup_epochs: float = 5.0
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 0.75
    """The learning rate of each layer is this times that of the layer above."""
    drop_path: float = 0.1
    label_smoothing: float = 0.1


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
