"""The fields of a run, their defaults, and what is impossible in each.

mae_core's own dataclasses and the recipes are validated in place: no field is declared twice. `resources`, `store`, `tracking` and
`name` never decide results; everything else does. Units are in the names. Errors: ValueError, which reading.py puts into words."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from mae_core.config import SIZES, MAEConfig
from pipeline.cluster.resources import Resources
from pipeline.data.images.intake import IntakePolicy
from pipeline.errors import StorageError
from pipeline.evaluation.protocols import PROTOCOL_NAMES, ProtocolName, protocol_named
from pipeline.storage import open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.spec.recipe import Recipe


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
    image_max_short_side: int = Field(IntakePolicy.image_max_short_side, ge=16)
    """See IntakePolicy."""
    image_max_pixels: int = Field(IntakePolicy.image_max_pixels, ge=1)
    """See IntakePolicy."""
    shard_max_bytes: int = Field(128 * 2**20, ge=2**16)
    min_shards: int = Field(16, ge=1)
    bad_share_warn: float = Field(0.01, ge=0, le=1)
    """Above this share of unreadable images the run ends with exit code 4."""
    bad_share_stop: float = Field(0.05, ge=0, le=1)
    """Above this share it stops. Both only judge: changing them makes nothing anew."""


class DatasetConfig(SourceConfig):
    """A labelled dataset to evaluate on."""

    name: ShortName
    source: Address | None = None
    """As data.source; left out: data.source itself, read as `data` says."""
    protocols: tuple[ProtocolName, ...] = ("linear", "finetune")

    @model_validator(mode="after")
    def _read_as_data_says(self) -> "DatasetConfig":
        for name, field in SourceConfig.model_fields.items():
            if self.source is None and (value := getattr(self, name)) != field.default:
                raise ValueError(f"{name}={value!r} is for a source of its own: write source too, or data.{name}")
        return self

    @field_validator("protocols")
    @classmethod
    def _each_once(cls, value: tuple[ProtocolName, ...]) -> tuple[ProtocolName, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"protocols={list(value)}: write each once")
        return value


def _with_protocol_settings(section: type[Section]) -> type[Section]:
    """Give the section a field for the settings of every protocol, so that only the protocol's own file declares them."""
    settings: dict[str, Any] = {name: protocol_named(name).settings for name in PROTOCOL_NAMES}
    fields: dict[str, Any] = {name: (kind, kind()) for name, kind in settings.items()}
    return create_model("EvaluationConfig", __base__=section, __module__=__name__, __doc__=section.__doc__, **fields)


@_with_protocol_settings
class EvaluationConfig(Section):
    """What the encoder is put to, beside the same encoder with random weights."""

    datasets: tuple[DatasetConfig, ...] = (DatasetConfig(name="data"),)
    """Images without labels are passed over, and the tables say so."""
    seeds: tuple[Seed, ...] = (0,)
    """Every protocol is run once a seed; tables show mean and standard deviation."""
    train_labels: int | None = Field(None, ge=1)
    """Learn from so many labelled images only, equally many of each class; left out: from all."""

    @model_validator(mode="after")
    def _unique(self) -> "EvaluationConfig":
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets={names} has a name twice: names must differ")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: write at least one, each once")
        return self

    def settings(self, protocol: ProtocolName) -> Any:
        """Return what the configuration says of a protocol."""
        return getattr(self, protocol)


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
    pretrain: Recipe = Recipe()
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
