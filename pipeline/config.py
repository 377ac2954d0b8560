"""YAML and --set become one validated, frozen RunConfig, before anything starts.

Unknown keys, wrong types and impossible values are refused with file, field and way out (ConfigError). mae_core's own dataclasses
and the recipes are validated in place: no field is declared twice. `resources`, `store`, `tracking` and `name` never decide
results; everything else does. Units are in the names."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mae_core.config import SIZES, MAEConfig
from pipeline.errors import ConfigError
from pipeline.training.spec import FinetuneRecipe, Recipe

Protocol = Literal["linear", "finetune"]


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Section):
    """Where the images come from and how they are stored."""

    source: str
    """A folder of class folders, a flat folder, or an s3:// prefix; train/, val/ and test/ on top are explicit splits."""
    snapshot: str = Field("1", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of the listing. A source is listed once a name: write another to take in what has changed since."""
    seed: int = 0
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


class DatasetConfig(Section):
    """A labelled dataset to evaluate on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    source: str | None = None
    """As data.source; left out: data.source itself."""
    protocols: tuple[Protocol, ...] = ("linear", "finetune")


class EvaluationConfig(Section):
    """What the encoder is put to, beside the same encoder with random weights."""

    datasets: tuple[DatasetConfig, ...] = (DatasetConfig(name="data"),)
    """Images without labels are passed over, and the tables say so."""
    seeds: tuple[int, ...] = (0,)
    """Every protocol is run once a seed; tables show mean and standard deviation."""
    train_labels: int | None = Field(None, ge=1)
    """Learn from so many labelled images only, equally many of each class; left out: from all."""
    linear: LinearConfig = LinearConfig()
    finetune: FinetuneRecipe = FinetuneRecipe()

    @model_validator(mode="after")
    def _unique(self) -> "EvaluationConfig":
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"datasets has a name twice: {names}; names must differ")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: write at least one, each once")
        return self


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
    checkpoint_every_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    log_every_steps: int = Field(20, ge=1)
    decode_threads: int = Field(1, ge=1)
    cache_directory: str = "~/.cache/mae-pipeline/shards"
    """Node-local cache for shards of a remote store."""
    cache_max_bytes: int = Field(50 * 2**30, ge=2**20)
    parallel_steps: int = Field(1, ge=1)
    """Steps of the graph at work at once."""
    max_failures: int = Field(3, ge=0)
    """Worker failures a training step survives by itself."""
    max_preemptions: int = Field(100, ge=0)
    collective_timeout_s: int = Field(600, ge=10)

    @field_validator("workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise ValueError(f"workers={value}: write a number from 1, or [min, max]")
        return value


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Left out: MLFLOW_TRACKING_URI, else SQLite beside the store."""
    experiment: str = Field("mae", min_length=1)


class RunConfig(Section):
    """One pipeline run, whole."""

    name: str = Field("mae", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    store: str = ".mae/store"
    """Object store: a folder or s3://bucket/prefix."""
    seed: int = Field(0, ge=0)
    """Of initial weights, order, crops and masks of pretraining."""
    data: DataConfig
    model: MAEConfig
    pretrain: Recipe = Recipe()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: Resources = Resources()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _from_size(cls, value: Any) -> Any:
        """`size: base` stands for its ViTConfig; what `encoder` says beside it wins."""
        if not isinstance(value, Mapping):
            return value
        rest = {key: item for key, item in value.items() if key not in ("size", "encoder")}
        size = value.get("size", "base")
        if size not in SIZES:
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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `a.b=value` overrides, validates. Local paths become absolute."""
    document = _read_yaml(path)
    for override in overrides:
        _override(document, override)
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, document, problem) for problem in error.errors())) from error
    return _with_absolute_paths(config)


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key written twice is an error rather than the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path}: cannot be read ({cause}). Give the path of a YAML file") from cause
    except yaml.YAMLError as cause:
        where = getattr(cause, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(cause, 'problem', cause)}). Mend that line") from cause
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path}: holds {type(document).__name__}, not a mapping of fields such as data, model, pretrain"
        )
    return document


def _override(document: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: write field=value, for example --set pretrain.epochs=100")
    *parents, last = dotted.strip().split(".")
    section = document
    for parent in parents:
        inner = section.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {parent} is not a section, it holds {inner!r}")
        section = inner
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from cause


def _explain(path: Path, document: Mapping[str, Any], problem: Any) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("function-", "tuple[", "int"))]
    field = ".".join(location)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_fields(problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{path}: {field} is not a field; {hint}"
    if problem["type"] == "missing":
        return f"{path}: {field} is missing; add it, or --set {field}=..."
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, (Mapping, BaseModel)) or str(given) in message else f" = {given!r}"
    return f"{path}: {field}{shown}: {message}"


def _known_fields(location: Sequence[Any]) -> list[str]:
    """Names of the fields at a place of the configuration."""
    kind: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            kind = DatasetConfig
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        elif dataclasses.is_dataclass(kind):
            kind = next(field.type for field in dataclasses.fields(kind) if field.name == part)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)] + (["size"] if kind is MAEConfig else [])
    return []


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Steps run in other processes and directories, so local addresses must not depend on the current one."""
    datasets = tuple(
        dataset.model_copy(update={"source": absolute(dataset.source)}) if dataset.source else dataset
        for dataset in config.evaluation.datasets
    )
    return config.model_copy(
        update={
            "store": absolute(config.store),
            "data": config.data.model_copy(update={"source": absolute(config.data.source)}),
            "evaluation": config.evaluation.model_copy(update={"datasets": datasets}),
        }
    )


def absolute(address: str) -> str:
    """A local path made absolute; addresses with a scheme as they are."""
    return address if "://" in address else str(Path(address).expanduser().absolute())
