"""YAML and --set become one validated, frozen RunConfig, before anything starts.

Unknown keys, wrong types and impossible values are refused with file, field and way out (ConfigError). mae_core's own dataclasses
and the recipes are validated in place: no field is declared twice. `resources`, `store`, `tracking` and `name` never decide
results; everything else does. Units are in the names."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mae_core.config import SIZES, MAEConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import open_store
from pipeline.training.engine_settings import Offload
from pipeline.training.spec import FinetuneRecipe, Recipe
from pipeline.training.start import StartPoint

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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `a.b=value` overrides, validates. Local paths become absolute."""
    document = _read_yaml(path)
    given = [_override(document, override) for override in overrides]
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        complaints = [_explain(problem) for problem in error.errors()]
    else:
        complaints = list(_booleans_for_numbers(document, config))
    if complaints:
        # a union complains once a member: one line a field is enough
        lines = {field: f"{_origin(path, given, field)}: {field}{text}" for field, text in reversed(complaints)}
        raise ConfigError("\n".join(reversed(lines.values())))
    return _with_absolute_paths(config)


def document_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with `a.b=value` overrides in it, not validated."""
    document = _read_yaml(path)
    for override in overrides:
        _override(document, override)
    return document


def _origin(path: Path, given: Sequence[str], field: str) -> str:
    """Where a field was written: the file, or --set."""
    within = (pair for dotted in given for pair in ((field, dotted), (dotted, field)))
    return "--set" if any(f"{inner}.".startswith(f"{outer}.") for inner, outer in within) else str(path)


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key written twice is an error rather than the last one's."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is written twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as cause:
        words = cause.strerror if isinstance(cause, OSError) else "it is not text"
        raise ConfigError(f"{path}: cannot be read ({words}). Give the path of a YAML file") from cause
    except yaml.YAMLError as cause:
        where = getattr(cause, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not YAML ({getattr(cause, 'problem', cause)}). Mend that line") from cause
    if not isinstance(document, dict):
        held = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise ConfigError(f"{path}: {held}: write a mapping of fields such as data, model, pretrain")
    return document


def _override(document: dict[str, Any], override: str) -> str:
    """Writes one `a.b=value` (or `a.0.b=value`) into the document; returns `a.b`."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: write field=value, for example --set pretrain.epochs=100")
    try:
        value = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as cause:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value") from cause
    section: Any = document
    for parent, part in zip(["", *parts], parts, strict=False):
        key: Any = part
        if isinstance(section, list) and part.isdecimal() and int(part) < len(section):
            key = int(part)
        elif not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {parent} has no {part}, it holds {section!r}; write {parent} whole")
        if key is part and section.get(key) is None:
            section[key] = {}
        outer, section = section, section[key]
    outer[key] = value
    return ".".join(parts)


_WORDS: Mapping[str, str] = {
    "int_type": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "string_type": "is not text: write it in quotes",
    "string_too_short": "is empty: write a name",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "tuple_type": "is not a list: write [a, b]",
    "too_long": "has too many values: {max_length} at most",
    "literal_error": "is unknown: write {expected}",
    "greater_than": "is too small: write more than {gt}",
    "greater_than_equal": "is too small: write {ge} or more",
    "less_than": "is too large: write less than {lt}",
    "less_than_equal": "is too large: write {le} or less",
    "model_type": "is not a section: write its fields below it",
    "dataclass_type": "is not a section: write its fields below it",
}
"""Pydantic's kinds of complaint as they are said here; `{}`: its context."""


def _explain(problem: Any) -> tuple[str, str]:
    """What is wrong with which field: ("pretrain.epochs", " = 'three' is not a whole number")."""
    union = next((i for i, part in enumerate(problem["loc"]) if str(part).startswith(("tuple[", "int"))), None)
    location = [str(part) for part in problem["loc"][:union] if not str(part).startswith("function-")]
    field, kind = ".".join(location), problem["type"]
    if union is not None:
        return field, f" = {problem['input']!r}: {WORKERS}"
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        known = _known_fields(problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return field, f" is not a field; {hint}"
    if kind == "missing":
        if location[-1].isdecimal():
            return ".".join(location[:-1]), f" = {list(problem['input'])} has too few values"
        return field, f" is missing; add it, or --set {field}=..."
    if kind == "value_error":
        return _own_words(location, str(problem["ctx"]["error"]))
    if problem["input"] is None:
        return field, " is empty: give it a value, or leave it out"
    words = NAMING.get(problem["ctx"]["pattern"]) if kind == "string_pattern_mismatch" else None
    text = f"is not usable: write {words}" if words else _WORDS.get(kind, problem["msg"])
    return field, f" = {problem['input']!r} {text.format_map(problem.get('ctx', {}))}"


def _own_words(location: Sequence[str], message: str) -> tuple[str, str]:
    """Our own validators say `name=value ...` of a field of theirs: the name joins the address."""
    named = re.match(r"([a-z_]+(?:\.[a-z_]+)*)(=.*)", message, re.DOTALL)
    if not named:
        return ".".join(location), f": {message}" if not message.startswith("is ") else f" {message}"
    outer = location[:-1] if location and location[-1] == named[1] else location
    return ".".join([*outer, named[1]]), named[2].replace("=", " = ", 1)


def _booleans_for_numbers(value: Any, read: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """`epochs: yes` is true in YAML and 1 to pydantic: neither is what was meant."""
    if isinstance(value, bool) and not isinstance(read, bool):
        yield field, f" = {value} is not a number: YAML reads yes, no, on, off as true or false"
    pairs: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        pairs = ((key, (item, getattr(read, key, None))) for key, item in value.items())
    elif isinstance(value, list):
        pairs = ((index, (item, read[index])) for index, item in enumerate(value))
    for key, (item, inner) in pairs:
        yield from _booleans_for_numbers(item, inner, f"{field}.{key}" if field else str(key))


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
        dataset.model_copy(update=_absolute(dataset, "source", "labels")) for dataset in config.evaluation.datasets
    )
    return config.model_copy(
        update={
            "store": absolute(config.store),
            "data": config.data.model_copy(update=_absolute(config.data, "source", "labels")),
            "evaluation": config.evaluation.model_copy(update={"datasets": datasets}),
        }
    )


def _absolute(section: Section, *names: str) -> dict[str, str]:
    return {name: absolute(address) for name in names if (address := getattr(section, name)) is not None}


def absolute(address: str) -> str:
    """A local path made absolute; addresses with a scheme as they are, but for a slash at the end."""
    return address.rstrip("/") if "://" in address else str(Path(address).expanduser().absolute())
