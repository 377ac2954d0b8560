"""The fields of a run, their defaults, and what is impossible in each.

mae_core's own dataclasses and the recipes are validated in place: no field is declared twice. `resources`, `store`, `tracking` and
`name` never decide results; everything else does. Units are in the names. Errors: ValueError, which reading.py puts into words."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from mae_core.config import SIZES, MAEConfig
from pipeline.errors import StorageError
from pipeline.storage import open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.engine.settings import Offload
from pipeline.training.spec.recipe import FinetuneRecipe, Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def _usable_address(address: str) -> str:
    if not address.strip():
        raise ValueError("is empty: write a folder or s3://bucket/prefix")
    if re.match(r"[a-z0-9]+:/(?!/)", address):
        raise ValueError(f"{address!r} has one slash too few: write {address.replace(':/', '://', 1)}")
    try:
        open_store(address)
    except StorageError as cause:
        raise ValueError(str(cause)) from cause
    return address


def _possible(recipe: AnyRecipe) -> AnyRecipe:
    """Refuses what would fail, or train nothing, hours later."""
    fractions = ("drop_path", "label_smoothing")
    for name in ("weight_decay", "min_lr", *fractions):
        value = getattr(recipe, name, 0.0)
        if value < 0 or (name in fractions and value >= 1):
            raise ValueError(
                f"{name}={value} is not {'in [0, 1)' if name in fractions else '0 or more'}: write 0 for none"
            )
    if not all(0 <= beta < 1 for beta in recipe.betas):
        raise ValueError(f"betas={recipe.betas} are not both in [0, 1): write [0.9, 0.95]")
    decay = getattr(recipe, "layer_decay", 1.0)
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay={decay} is not in (0, 1]: write 1 for the same rate in all layers")
    return recipe


Protocol = Literal["linear", "finetune"]
Address = Annotated[str, AfterValidator(_usable_address)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NAME = r"^[A-Za-z0-9._-]{1,64}$"
Name = Annotated[str, Field(pattern=NAME)]
ShortName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
NAMING = {
    NAME: "1 to 64 letters, digits, dots, _ or -",
    r"^[a-z0-9][a-z0-9_-]{0,31}$": "1 to 32 small letters, digits, _ or -",
}
"""The patterns in words."""


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _snapshot_names(value: Any) -> Any:
    """One name, or a list of names that differ; whole numbers are names too."""
    names = [
        str(name) if type(name) is int else name for name in (value if isinstance(value, list | tuple) else [value])
    ]
    for name in names:
        if not isinstance(name, str) or not re.match(NAME, name):
            raise ValueError(f"snapshot={name!r} is not usable: write {NAMING[NAME]}, or a list of such names")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"snapshot={names}: write at least one name, each once")
    return tuple(names) if isinstance(value, list | tuple) else names[0]


class SourceConfig(Section):
    """How a source is read where its folders do not say it all."""

    labels: Address | None = None
    """For folders of images: a CSV, JSON lines or Parquet file with columns path, label and, optionally, split."""
    image_column: str = Field("image", min_length=1)
    """Of Parquet tables: bytes, or Hugging Face's struct of bytes and path."""
    label_column: str | None = Field("label", min_length=1)
    """Of Parquet tables, and the field of a tar's .json: whole numbers or text; null: no labels."""
    split_column: str | None = Field(None, min_length=1)
    """Of Parquet tables: train, val or test; left out: folders or names of the files say it, else a keyed hash."""


class DataConfig(SourceConfig):
    """Where the images come from and how they are stored."""

    source: Address
    """A folder or s3:// prefix of images (class folders or flat), WebDataset tars or Parquet tables; train/, val/ and test/ on
    top are explicit splits."""
    snapshot: Annotated[str | tuple[str, ...], BeforeValidator(_snapshot_names)] = "1"
    """Name of the listing. A source is listed once a name: write another to list it anew, or a list of names, of which each
    takes in what the earlier ones lack, as a part of its own."""
    seed: Seed = 0
    """Of the random split and of the assignment of images to shards."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of the images held out as `test` when the source has no explicit splits."""
    image_max_short_side: int = Field(512, ge=16)
    """Larger images are resized to this short side once, when they are stored."""
    image_max_pixels: int = Field(100_000_000, ge=1)
    """Images of more pixels are quarantined, not decoded."""
    shard_max_bytes: int = Field(128 * 2**20, ge=2**16)
    min_shards: int = Field(16, ge=1)
    bad_share_warn: float = Field(0.01, ge=0, le=1)
    """Above this share of unreadable images the run ends with exit code 4."""
    bad_share_stop: float = Field(0.05, ge=0, le=1)
    """Above this share it stops. Both only judge: changing them makes nothing anew."""


class LinearConfig(Section):
    """A linear classifier on frozen features, standardised as by BatchNorm without affine (arXiv 2111.06377, A.1)."""

    pool: Literal["cls", "mean"] = "cls"
    """Feature: the class token or the mean of the patch tokens, both after the encoder's final norm."""
    epochs: int = Field(90, ge=1)
    batch: int = Field(16384, ge=1)
    base_lr: float = Field(0.1, gt=0)
    """At a batch of 256; SGD with momentum 0.9, cosine."""
    warmup_epochs: float = Field(10.0, ge=0)

    @model_validator(mode="after")
    def _warm_before_the_end(self) -> "LinearConfig":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is not in [0, epochs={self.epochs}): write fewer")
        return self


class DatasetConfig(SourceConfig):
    """A labelled dataset to evaluate on."""

    name: ShortName
    source: Address | None = None
    """As data.source; left out: data.source itself, read as `data` says."""
    protocols: tuple[Protocol, ...] = ("linear", "finetune")

    @model_validator(mode="after")
    def _read_as_data_says(self) -> "DatasetConfig":
        for name, field in SourceConfig.model_fields.items():
            if self.source is None and (value := getattr(self, name)) != field.default:
                raise ValueError(f"{name}={value!r} is for a source of its own: write source too, or data.{name}")
        return self

    @field_validator("protocols")
    @classmethod
    def _each_once(cls, value: tuple[Protocol, ...]) -> tuple[Protocol, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"protocols={list(value)}: write each once")
        return value


class EvaluationConfig(Section):
    """What the encoder is put to, beside the same encoder with random weights."""

    datasets: tuple[DatasetConfig, ...] = (DatasetConfig(name="data"),)
    """Images without labels are passed over, and the tables say so."""
    seeds: tuple[Seed, ...] = (0,)
    """Every protocol is run once a seed; tables show mean and standard deviation."""
    train_labels: int | None = Field(None, ge=1)
    """Learn from so many labelled images only, equally many of each class; left out: from all."""
    linear: LinearConfig = LinearConfig()
    finetune: Annotated[FinetuneRecipe, AfterValidator(_possible)] = FinetuneRecipe()

    @model_validator(mode="after")
    def _unique(self) -> "EvaluationConfig":
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets={names} has a name twice: names must differ")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: write at least one, each once")
        return self


ProfileSteps = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=20)]]
WORKERS = "write a number from 1, or [min, max]"


class Resources(Section):
    """Where and how it runs: changing any of this makes nothing anew."""

    workers: int | tuple[int, int] = 1
    """Training workers, or [min, max] for an elastic range."""
    cpus_per_worker: float = Field(1.0, gt=0)
    use_gpu: bool | None = None
    """One GPU a worker; left out: when the cluster has as many."""
    zero_stage: Literal[1, 2, 3] = 1
    micro_batch: int = Field(64, ge=1)
    """Most samples in one forward pass of a worker; accumulation is derived."""
    offload: Offload = "none"
    """`optimizer`: its state and its step are the CPU's, 12 bytes a weight less on the GPUs together; on CPU workers no change."""
    activation_checkpointing: bool = False
    """Blocks keep their input alone and are computed again in the backward pass: a third more work, far less memory."""
    checkpoint_every_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    """The newest; what a receipt, a later generation or a fork names is kept beside them."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Keeps those of every so many steps, too; left out: none."""
    keep_best: int = Field(1, ge=0)
    """Keeps so many of the lowest loss, too."""
    checkpoint_copy: Literal["memory", "disk"] = "memory"
    """Where a worker's state, 12 bytes a weight over all workers, is copied to before it is written: training waits for the copy.
    `disk`, a file in cache_directory, takes no memory and the disk's time."""
    log_every_steps: int = Field(20, ge=1)
    profile_steps: ProfileSteps | None = None
    """[first, count] of the steps, counted from 1, that torch's profiler watches on rank 0: `profile/` in the step's generation
    and in MLflow holds a trace and a table. At most 20."""
    decode_threads: int = Field(1, ge=1)
    cache_directory: str = "~/.cache/mae-pipeline/shards"
    """Node-local cache for shards of a remote store."""
    cache_max_bytes: int = Field(50 * 2**30, ge=2**20)
    parallel_steps: int = Field(1, ge=1)
    """Steps of the graph at work at once."""
    max_failures: int = Field(3, ge=0)
    """Worker failures in a row, without a new checkpoint in between, that a training step survives by itself."""
    max_preemptions: int = Field(100, ge=0)
    """The same for workers whose nodes were taken away."""
    node_wait_s: float = Field(1800.0, ge=0)
    """After nodes were taken away, how long a training step waits until its fewest workers fit; then it stops, exit code 3."""
    wall_clock_s: float | None = Field(None, gt=0)
    """The run is asked to stop `grace_s` before it has taken so long; left out: it may take for ever."""
    grace_s: float = Field(120.0, ge=0)
    """Time for the last checkpoint, under wall_clock_s."""
    collective_timeout_s: int = Field(600, ge=10)
    watchdog_s: float = Field(300, gt=0)
    """When a phase of a training step lasts longer, every worker writes its stacks to the store; after twice that, workers that Ray
    Train restarts end themselves."""

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError(f"workers={value}: {WORKERS}")
        return value

    @model_validator(mode="after")
    def _time_to_save(self) -> "Resources":
        if self.wall_clock_s is not None and self.wall_clock_s <= self.grace_s:
            raise ValueError(
                f"wall_clock_s={self.wall_clock_s:g} leaves nothing to train in: write more than grace_s={self.grace_s:g}"
            )
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Left out: MLFLOW_TRACKING_URI, else SQLite beside the store."""
    experiment: str = Field("mae", min_length=1)


class RunConfig(Section):
    """One pipeline run, whole."""

    name: Name = "mae"
    store: Address = ".mae/store"
    """Object store: a folder or s3://bucket/prefix."""
    seed: Seed = 0
    """Of initial weights, order, crops and masks of pretraining."""
    data: DataConfig
    model: MAEConfig
    pretrain: Annotated[Recipe, AfterValidator(_possible)] = Recipe()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: Resources = Resources()
    tracking: TrackingConfig = TrackingConfig()
    fork: StartPoint | None = None
    """Pretraining goes on from this checkpoint of another one in the same store; `mae fork` writes it."""

    @field_validator("model", mode="before")
    @classmethod
    def _from_size(cls, value: Any) -> Any:
        """`size: base` stands for its ViTConfig; what `encoder` says beside it wins."""
        if not isinstance(value, Mapping):
            return value
        rest = {key: item for key, item in value.items() if key not in ("size", "encoder")}
        size = value.get("size", "base")
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"size={size!r} is unknown: write one of {', '.join(SIZES)}")
        encoder = value.get("encoder", {})
        if not isinstance(encoder, Mapping):
            raise ValueError(f"encoder={encoder!r} is not a mapping of the encoder's fields")
        return {**rest, "encoder": {**dataclasses.asdict(SIZES[size]()), **encoder}}

    @field_validator("model")
    @classmethod
    def _rgb(cls, value: MAEConfig) -> MAEConfig:
        if value.encoder.in_channels != 3:
            raise ValueError(f"encoder.in_channels={value.encoder.in_channels}: shards hold RGB images, write 3")
        return value
