"""The fields of a run's configuration, their defaults and their checks.

mae_core's dataclasses, the recipes and the protocols' settings are validated in place, so that no field is declared twice.
`resources`, `store`, `tracking`, `name` and `data.bad_share_*` never change a result; everything else does. Units are in the names.
Errors: ValueError, which `reading` turns into one line per field."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from mae_core.config import SIZES, MAEConfig
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.facts import ScoredSplit
from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sources.splits import SplitFrom
from pipeline.errors import StorageError
from pipeline.evaluation.presets import PresetName, size_of, with_preset
from pipeline.evaluation.protocols import PROTOCOL_NAMES, ProtocolName, protocol_named
from pipeline.storage import expand_address, open_store
from pipeline.training.checkpoints.resume import StartPoint
from pipeline.training.spec.recipe import PretrainRecipe, fitting_warmup


def _check_address(address: str) -> str:
    if not address.strip():
        raise ValueError("is empty: write a folder or s3://bucket/prefix")
    address = expand_address(address)
    if re.match(r"[a-z0-9]+:/(?!/)", address):
        raise ValueError(f"{address!r} has one slash too few: write {address.replace(':/', '://', 1)}")
    try:
        open_store(address)  # connects to nothing yet
    except StorageError as cause:
        raise ValueError(str(cause)) from cause
    return address


Address = Annotated[str, AfterValidator(_check_address)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NAME = r"^[A-Za-z0-9._-]{1,64}$"
Name = Annotated[str, Field(pattern=NAME)]
ShortName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
SHA256 = r"^[0-9a-f]{64}$"
PATTERN_MEANINGS = {
    SHA256: "64 hexadecimal digits",
    NAME: "1 to 64 letters, digits, dots, _ or -",
    r"^[a-z0-9][a-z0-9_-]{0,31}$": "1 to 32 lower-case letters, digits, _ or -",
}
"""The patterns above, as error messages describe them."""


MOST_SEEDS = 1000
"""More is more likely one seed than a number of seeds."""


class Section(BaseModel):
    """Base of the configuration's sections: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _snapshot_names(value: Any) -> Any:
    """Check one name or a list of distinct names. Whole numbers are taken as names, too."""
    names = [
        str(name) if type(name) is int else name for name in (value if isinstance(value, list | tuple) else [value])
    ]
    for name in names:
        if not isinstance(name, str) or not re.match(NAME, name):
            raise ValueError(
                f"snapshot={name!r} is not a name: write {PATTERN_MEANINGS[NAME]}, or a list of such names"
            )
    if not names or len(set(names)) < len(names):
        raise ValueError(f"snapshot={names}: write at least one name, and each only once")
    return tuple(names) if isinstance(value, list | tuple) else names[0]


class Moved(NamedTuple):
    """Where the files of a source are now, if its fingerprints keep the address under which it was listed."""

    source: str
    labels: str | None
    compared_at: float
    """When they were found to be the listed files, in seconds since the epoch."""


class SourceConfig(Section):
    """How to read a source whose folders alone do not give labels and splits."""

    labels: Address | None = None
    """For folders of images: a CSV, JSON Lines or Parquet file with columns path, label and, optionally, split."""
    image_column: str = Field("image", min_length=1)
    """For Parquet tables: the column with the image, as bytes or as Hugging Face's struct of bytes and path."""
    label_column: str | None = Field("label", min_length=1)
    """For Parquet tables, the column with the label; for tars, the field of the sample's .json. Whole numbers or text. null for no
    labels."""
    split_column: str | None = Field(None, min_length=1)
    """For Parquet tables: the column with train, val or test. If left out, folder or file names decide, or else a keyed hash."""
    split_from: SplitFrom | None = None
    """What decides the split: path (the folders), name (the file's own name), column (split_column, or that of the labels file) or
    hash (test_share of all, whatever the names say). If left out: a column, else words such as train/, valid/ and test/ in the
    names of folders, or of tars and tables; names that can be read in two ways are refused."""
    # Private, so that no fingerprint, dump or submitted job holds it: it is found out again from the store (`runs.moved`).
    _moved: Moved | None = PrivateAttr(None)

    @property
    def moved(self) -> Moved | None:
        """Where the files are now; None if they are at `source`."""
        return self._moved

    def recorded_at(self, source: str, labels: str | None, *, now: Moved) -> Self:
        """Return the section with the addresses under which the source was listed, read from where it is now."""
        recorded = self.model_copy(update={"source": source, "labels": labels})
        recorded._moved = now
        return recorded


class DataConfig(SourceConfig):
    """Where the images come from and how they are stored."""

    source: Address
    """A folder or s3:// prefix with images (in class folders or flat), WebDataset tars or Parquet tables. Folders train/, val/ and
    test/ are explicit splits."""
    snapshot: Annotated[str | tuple[str, ...], BeforeValidator(_snapshot_names)] = "1"
    """Name of the listing. A source is listed once per name: write another name to list it again, or a list of names to grow the
    dataset. Each further name adds, as a part of its own, the images that the earlier ones do not have."""
    seed: Seed = 0
    """Decides the random split and which shard an image goes to."""
    test_share: float = Field(0.1, ge=0, lt=1)
    """Share of the images held out as `test` when the source has no explicit splits."""
    image_max_short_side: int = Field(IntakePolicy.image_max_short_side, ge=16)
    """Pixels. A larger image is resized to this short side once, when it is stored."""
    image_max_pixels: int = Field(IntakePolicy.image_max_pixels, ge=1)
    """An image with more pixels is quarantined without being decoded."""
    shard_max_bytes: int = Field(128 * 2**20, ge=2**16)
    """Bytes of images after which a new shard begins."""
    min_shards: int = Field(16, ge=1)
    """Smallest number of shards of the training split, if it has enough images. The order of images is shuffled by shards."""
    bad_share_warn: float = Field(0.01, ge=0, le=1)
    """Share of unreadable images above which the run ends with exit code 4."""
    bad_share_stop: float = Field(0.05, ge=0, le=1)
    """Share of unreadable images above which the run stops. Changing this or bad_share_warn repeats no finished work."""


class DatasetConfig(SourceConfig):
    """A labelled dataset to evaluate on."""

    name: ShortName
    """Its name in tables, in the report and in the names of steps."""
    source: Address | None = None
    """Like data.source. If left out, it is data.source itself, read as `data` says."""
    protocols: tuple[ProtocolName, ...] = ("linear", "finetune")
    """How to score an encoder on it."""

    @model_validator(mode="after")
    def _reading_needs_a_source(self) -> "DatasetConfig":
        for name, field in SourceConfig.model_fields.items():
            if self.source is None and (value := getattr(self, name)) != field.default:
                raise ValueError(
                    f"{name}={value!r} only applies to a source of its own: add source, or write data.{name}"
                )
        return self

    @field_validator("protocols")
    @classmethod
    def _each_once(cls, value: tuple[ProtocolName, ...]) -> tuple[ProtocolName, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"protocols={list(value)}: write each only once")
        return value


def _seeds(value: Any) -> Any:
    """Return the seeds that a number of them means."""
    if type(value) is not int:  # not isinstance: `true` is an int too, and refused later
        return value
    if not 1 <= value <= MOST_SEEDS:
        raise ValueError(f"seeds={value}: write how many, from 1 to {MOST_SEEDS}, or a list of seeds such as [{value}]")
    return tuple(range(value))


def _with_fitting_warmup(value: Any, defaults: Any) -> Any:
    """Add the warmup that fits the epochs, where none is written."""
    if not isinstance(value, Mapping) or "warmup_epochs" in value or not hasattr(defaults, "warmup_epochs"):
        return value
    epochs = value.get("epochs", defaults.epochs)
    warmup = fitting_warmup(epochs, default=defaults.warmup_epochs, of_epochs=defaults.epochs)
    return {**value, "warmup_epochs": warmup}


def _with_protocol_settings(section: type[Section]) -> type[Section]:
    """Add one field per protocol with its settings, so that they are declared only in the protocol's own file."""
    settings: dict[str, Any] = {name: protocol_named(name).settings for name in PROTOCOL_NAMES}
    fields: dict[str, Any] = {name: (kind, kind()) for name, kind in settings.items()}
    return create_model("EvaluationConfig", __base__=section, __module__=__name__, __doc__=section.__doc__, **fields)


@_with_protocol_settings
class EvaluationConfig(Section):
    """How the encoder is evaluated, next to the same encoder with random weights."""

    preset: PresetName = "none"
    """A published recipe that gives the sections of the protocols their defaults (docs/evaluation.md lists the values); what is
    written there wins. mae-paper follows the size of the encoder; small-images is for images of a few dozen pixels."""
    datasets: tuple[DatasetConfig, ...] = (DatasetConfig(name="data"),)
    """A dataset without labels is skipped, and the tables say so."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_seeds)] = (0,)
    """Every protocol runs once per seed; tables show mean and sample standard deviation. A number n means the seeds 0 to n - 1."""
    split: ScoredSplit = "test"
    """The split that is scored: test, or val where there is no test split with labels."""
    train_labels: int | None = Field(None, ge=1)
    """Learn from only this many labelled images, equally many per class. If left out, from all."""
    milestone_images: int = Field(10_000, ge=0)
    """Most images on which checkpoints are scored while pretraining runs, where a CPU or GPU is free; 0: none are. Changes no
    result."""
    milestone_probe_epochs: int = Field(0, ge=0)
    """Epochs of a linear probe that scores each of these checkpoints as well, on the same images; 0: none. Changes no result."""

    # check_fields: the decorator adds these fields once the class is made
    @field_validator(*PROTOCOL_NAMES, mode="before", check_fields=False)
    @classmethod
    def _fitting_warmup(cls, value: Any, info: ValidationInfo) -> Any:
        return _with_fitting_warmup(value, cls.model_fields[str(info.field_name)].default)

    @model_validator(mode="after")
    def _unique(self) -> "EvaluationConfig":
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets={names} has a name twice: give each dataset a name of its own")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: write at least one, and each only once")
        return self

    def settings(self, protocol: ProtocolName) -> Any:
        """Return the settings of a protocol."""
        return getattr(self, protocol)


class TrackingConfig(Section):
    """MLflow."""

    uri: Annotated[str, AfterValidator(expand_address)] | None = None
    """If left out: MLFLOW_TRACKING_URI, or else an SQLite file in the store (in ./.mae/ if the store is remote). With `none`, no
    runs are kept in MLflow; the curves are in the store and the report."""
    experiment: str | None = Field(None, min_length=1)
    """The MLflow experiment that the run belongs to. If left out: one for each data set, `mae-<name of the data>`."""
    usd_per_hour: float | None = Field(None, ge=0)
    """What an hour of one GPU costs you, or of one CPU core where there is no GPU, in USD. The run then shows its cost."""


class WeightsConfig(Section):
    """Weights from elsewhere, which are evaluated in place of a pretraining. `mae evaluate` fills this section."""

    file: Address
    """The file or folder. Where it lies changes no fingerprint."""
    sha256: str = Field(pattern=SHA256)
    """Digest of what is read there."""
    prefix: str | None = None
    """Which of several models in the file, such as model_ema or teacher.backbone."""
    assumed: tuple[str, ...] = ()
    """Fields of the encoder that neither the file nor a person stated, as field=value. For the report; changes no result."""


class RunConfig(Section):
    """The whole configuration of a pipeline run."""

    name: Name = "mae"
    """Name of the run in MLflow and of its jobs on a cluster."""
    store: Address = ".mae/store"
    """Where everything is written: a folder or s3://bucket/prefix."""
    seed: Seed = 0
    """Decides initial weights, order, crops and masks of pretraining."""
    data: DataConfig
    """Where the images come from and how they are stored."""
    model: MAEConfig
    """The encoder, the decoder and the task. Write `size: base` for a named size."""
    pretrain: PretrainRecipe = PretrainRecipe()
    """How the autoencoder is trained. Defaults are the paper's (arXiv 2111.06377, table 8)."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the encoder is evaluated, next to the same encoder with random weights."""
    resources: Resources = Resources()
    """Where and how a run works. Changing a field never makes a finished step run again."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, which records every run."""
    weights: WeightsConfig | None = None
    """If given, nothing is pretrained: these weights are evaluated. `mae evaluate` writes it."""
    fork: StartPoint | None = None
    """Checkpoint of another pretraining, in the same store, from which this one continues. `mae fork` writes it."""
    # Private, as it says how the configuration was written, not what it is: `load_config` sets it.
    _overridden: tuple[str, ...] = PrivateAttr(())

    @property
    def overridden(self) -> tuple[str, ...]:
        """The fields that were written elsewhere than in the file: those of a sweep, then those of --set."""
        return self._overridden

    def written_with(self, overridden: Sequence[str]) -> Self:
        """Return the configuration with the fields that were written elsewhere than in its file."""
        copy = self.model_copy()
        copy._overridden = tuple(overridden)
        return copy

    @field_validator("pretrain", mode="before")
    @classmethod
    def _fitting_warmup(cls, value: Any) -> Any:
        return _with_fitting_warmup(value, PretrainRecipe())

    @field_validator("evaluation", mode="before")
    @classmethod
    def _complete_by_preset(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        model = info.data.get("model")  # absent if it was refused
        return with_preset(value, size_of(model.encoder) if model else "base")

    @field_validator("model", mode="before")
    @classmethod
    def _from_size(cls, value: Any) -> Any:
        """Replace `size: base` by its ViTConfig. Fields of `encoder` that are given as well override it."""
        if not isinstance(value, Mapping):
            return value
        rest = {key: item for key, item in value.items() if key not in ("size", "encoder")}
        size = value.get("size", "base")
        if not isinstance(size, str) or size not in SIZES:
            raise ValueError(f"size={size!r} is unknown: write one of {', '.join(SIZES)}")
        encoder = value.get("encoder", {})
        if not isinstance(encoder, Mapping):
            raise ValueError(f"encoder={encoder!r} is not a section: write its fields below it")
        if type(side := encoder.get("image_size")) is int:
            encoder = {**encoder, "image_size": [side, side]}
        return {**rest, "encoder": {**dataclasses.asdict(SIZES[size]()), **encoder}}

    @model_validator(mode="after")
    def _own_head_needs_weights(self) -> Self:
        if self.weights is None and any("own_head" in dataset.protocols for dataset in self.evaluation.datasets):
            raise ValueError(
                "evaluation.datasets: own_head scores the head of weights from elsewhere: use it with `mae evaluate`"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.fork and self.pretrain.start:
            raise ValueError(
                f"pretrain.start={self.pretrain.start!r} and fork cannot both be written: a fork takes its weights from a "
                "checkpoint. Leave one of them out"
            )
        return self

    @field_validator("model")
    @classmethod
    def _rgb(cls, value: MAEConfig) -> MAEConfig:
        if value.encoder.in_channels != 3:
            raise ValueError(
                f"encoder.in_channels={value.encoder.in_channels} is not 3: shards hold RGB images, write 3"
            )
        return value
