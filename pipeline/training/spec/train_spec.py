"""What a worker is told to train: a task and its recipe, which decide results, and resources, which do not.

Small frozen values that travel from the stage to the workers. Units are in the field names."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from mae_core.config import ADDED_LATER, MAEConfig
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Part, Samples, Selection, select
from pipeline.storage import expand_address, open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import Task
from pipeline.training.world import World

HELD_OUT = "train/held_out"
"""In place of a split's name: the tenth of the training samples that a spec holds back (`TrainSpec.holds_out`)."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What decides the encoder: the config of a pretraining step."""

    model: MAEConfig
    recipe: Recipe
    seed: int
    start: StartPoint | None = field(default=None, metadata=ADDED_LATER)
    """The checkpoint that a fork starts from; None for initial weights."""
    start_sha256: str = field(default="", metadata=ADDED_LATER)
    """Digest of the imported weights that training starts from; empty for initial weights and for a fork."""
    visible_patches_rounded_down: int | None = field(default=None, init=False, metadata=ADDED_LATER)
    """The number of visible patches, if versions that rounded it to the nearest kept one more; else None, so that what they
    trained still counts as done."""

    def __post_init__(self) -> None:
        patches, count = self.model.encoder.num_patches, self.model.visible_patches
        nearest = math.floor(patches * (1 - self.model.mask_ratio) + 0.5 + 1e-9)
        if count != nearest:
            object.__setattr__(self, "visible_patches_rounded_down", count)


class CheckpointScorer(Protocol):
    """Scores a checkpoint; small enough to be sent to a task."""

    def __call__(self, root_uri: str, key: str, device: Literal["cuda", "cpu"]) -> Mapping[str, float]:
        """Return the scores of the checkpoint `key` in a step's directory."""
        ...


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
    milestones: CheckpointScorer | None = None
    """Scores checkpoints while training goes on; None for no scores."""
    holds_out: bool = False
    """Whether a tenth of the training samples of each class is not trained on, but scored as well, to choose by."""

    def cursor(self, order: SampleOrder) -> dict[str, object]:
        """Return what a position is bound to: under another of these values the same step means other samples."""
        return {
            "dataset": self.dataset.digest,
            "train_samples": self.train_samples,
            "global_batch": self.recipe.global_batch,
            **order.parameters(),
            # Only where it is true: older checkpoints lack the key.
            **({"holds_out": True} if self.holds_out else {}),
        }

    def selection(self, manifest: Manifest, split: str) -> Selection:
        """Return the samples of a split or HELD_OUT."""
        if split not in ("train", HELD_OUT):  # a limit on labels is for learning; scores are over the whole split
            return select(manifest, split, "all", seed=self.order.seed)
        part: Part = "held_out" if split == HELD_OUT else "kept" if self.holds_out else "whole"
        return select(manifest, "train", self.train_samples, seed=self.order.seed, part=part)

    def loader(self, manifest: Manifest, split: str, world: World) -> Loader:
        """Return this worker's reader of a split or HELD_OUT: what is trained on in the computed order, other splits whole."""
        selection = self.selection(manifest, split)
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
        precision="bf16" if recipe.precision == "bf16" else "fp32",  # to DeepSpeed, tf32 is fp32
        gradient_precision=recipe.gradient_precision,
        zero_stage=resources.zero_stage,
        micro_batch=micro_batch,
        accumulation=math.ceil(largest_part / micro_batch),
        betas=recipe.betas,
        average_decay=recipe.average_decay,
        max_grad_norm=recipe.max_grad_norm,
        offload=resources.offload,
        activation_checkpointing=resources.activation_checkpointing,
        compile=resources.compile,
        overlap_comm=resources.overlap_comm,
    )


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Let float32 matrix products be those of `Recipe.precision` inside, and what they were before afterwards.

    torch keeps this per process, and a process may train several models. Not on a CPU: some round with this setting too.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" and device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def node_cache(dataset: DatasetAddress, resources: Resources) -> ShardCache:
    """Return the node's cache for the shards of a dataset."""
    directory = Path(expand_address(resources.cache_directory))
    return ShardCache(open_store(dataset.root_uri), directory, max_bytes=resources.cache_max_bytes)
