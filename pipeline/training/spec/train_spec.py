"""What a worker is told: task, recipe (decides results) and placement (does not). Small frozen values that travel."""

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
from pipeline.storage import open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import Task
from pipeline.training.world import World


def engine_settings(recipe: Recipe, resources: Resources, *, workers: int) -> EngineSettings:
    """Micro-batch and accumulation follow from the global batch and the largest slice of a worker."""
    largest_slice = math.ceil(recipe.global_batch / workers)
    micro_batch = min(resources.micro_batch, largest_slice)
    return EngineSettings(
        precision=recipe.precision,
        zero_stage=resources.zero_stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(largest_slice / micro_batch),
        betas=recipe.betas,
        max_grad_norm=recipe.max_grad_norm,
        offload=resources.offload,
        activation_checkpointing=resources.activation_checkpointing,
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
    resources: Resources
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
            cache=node_cache(self.dataset, self.resources),
            decode_threads=self.resources.decode_threads,
            pin_memory=world.device.type == "cuda",
            fetch_bytes=self.resources.cache_max_bytes // world.local_size,
        )


def node_cache(dataset: DatasetAddress, resources: Resources) -> ShardCache:
    """Return the node's cache for the shards of a dataset."""
    directory = Path(resources.cache_directory).expanduser()
    return ShardCache(open_store(dataset.root_uri), directory, max_bytes=resources.cache_max_bytes)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What decides the encoder."""

    model: MAEConfig
    recipe: Recipe
    seed: int
    start: StartPoint | None = field(default=None, metadata=ADDED_LATER)
    """A checkpoint to go on from; None: initial weights."""
