"""What a worker is told to train: a task and its recipe, which decide results, and resources, which do not.

Small frozen values that travel from the stage to the workers. Units are in the field names."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from mae_core.config import ADDED_LATER, MAEConfig
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Samples, select
from pipeline.storage import expand_address, open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import Task
from pipeline.training.world import World


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What decides the encoder: the config of a pretraining step."""

    model: MAEConfig
    recipe: Recipe
    seed: int
    start: StartPoint | None = field(default=None, metadata=ADDED_LATER)
    """The checkpoint that a fork starts from; None for initial weights."""
    visible_patches_rounded_down: int | None = field(default=None, init=False, metadata=ADDED_LATER)
    """The number of visible patches, if versions that rounded it to the nearest kept one more; else None, so that what they
    trained still counts as done."""

    def __post_init__(self) -> None:
        patches, count = self.model.encoder.num_patches, self.model.visible_patches
        nearest = math.floor(patches * (1 - self.model.mask_ratio) + 0.5 + 1e-9)
        if count != nearest:
            object.__setattr__(self, "visible_patches_rounded_down", count)


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything a worker needs to train a task."""

    task: Task
    recipe: Recipe
    order: OrderConfig
    image_size: tuple[int, int]
    dataset: DatasetAddress
    train_samples: Samples
    """Which samples of the training split are trained on."""
    evaluation_split: str
    """Split to score after training; empty for none."""
    resources: Resources
    start: StartPoint | None = None
    """The checkpoint that a fork starts from; None for initial weights."""

    def cursor(self, order: SampleOrder) -> dict[str, object]:
        """Return what a position is bound to: under another of these values the same step means other samples."""
        return {
            "dataset": self.dataset.digest,
            "train_samples": self.train_samples,
            "global_batch": self.recipe.global_batch,
            **order.parameters(),
        }

    def loader(self, manifest: Manifest, split: str, world: World) -> Loader:
        """Return this worker's reader of a split: the training split in the computed order, any other split whole."""
        # A limit on labels is for learning; scores are over the whole split.
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
            cache=node_cache(self.dataset, self.resources),
            decode_workers=self.resources.decode_processes,
            pin_memory=world.device.type == "cuda",
            noise=self.task.noise,
            together=self.recipe.samples_together,
            answer_s=0.8 * self.resources.watchdog_s,  # a hung decode worker is replaced before the watchdog complains
            fetch_bytes=self.resources.cache_max_bytes // world.local_size,  # workers on a node share its cache
        )


def engine_settings(recipe: Recipe, resources: Resources, *, workers: int) -> EngineSettings:
    """Return the engine's settings; micro-batch and accumulation follow from the largest part of the global batch.

    The largest part counts on every worker, because all must run the same number of passes. Samples that belong together are in
    one micro-batch, even if that makes it larger than asked for.
    """
    together = recipe.samples_together
    largest_part = math.ceil(recipe.global_batch // together / workers) * together  # parts differ by one group at most
    micro_batch = min(max(resources.micro_batch // together, 1) * together, largest_part)
    return EngineSettings(
        precision=recipe.precision,
        zero_stage=resources.zero_stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(largest_part / micro_batch),
        betas=recipe.betas,
        average_decay=recipe.average_decay,
        max_grad_norm=recipe.max_grad_norm,
        offload=resources.offload,
        activation_checkpointing=resources.activation_checkpointing,
        compile=resources.compile,
    )


def node_cache(dataset: DatasetAddress, resources: Resources) -> ShardCache:
    """Return the node's cache for the shards of a dataset."""
    directory = Path(expand_address(resources.cache_directory))
    return ShardCache(open_store(dataset.root_uri), directory, max_bytes=resources.cache_max_bytes)
