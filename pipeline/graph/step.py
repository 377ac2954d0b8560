"""A node of the graph, its fingerprint, and the values that its function receives and returns.

A *step* is a node of the graph (a training step, one update of the weights, is a `global_step`). A *stage* is the plain function
`(config, inputs, attempt) -> StageResult` that a step runs. Its module holds `VERSION`, a whole number that is raised by hand
whenever the stage's results change.

The fingerprint is a SHA-256 over name, version, canonical config and the fingerprints of the inputs. `resources` and the store
never enter it: the same work on other machines is the same step. A field that a config gains later is marked ADDED_LATER and
stays out of the fingerprint at its default, so that an upgrade repeats no finished work.
Errors: ConfigError if a config holds a value without a stable form (a set, NaN, an arbitrary object)."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_core.config import ADDED_LATER as ADDED_LATER
from mae_core.errors import ConfigError
from pipeline.cluster.progress import Progress
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.storage import Store, open_store

StepKind = Literal["snapshot", "shard", "join", "pretrain", "import", "evaluate", "report"]
"""What a step does. Code asks for the kind; names are for people and for the store."""


@dataclass(frozen=True)
class StepGeneration:
    """Where the files of one generation of a step are."""

    root_uri: str
    """The step's directory, `<store>/<name>-<fingerprint[:12]>`."""
    generation: int
    """Its files lie under `g%04d/`."""

    @property
    def root(self) -> Store:
        """The step's directory. What all generations share (content-addressed objects, put-if-absent rows) is here."""
        return open_store(self.root_uri)

    @property
    def store(self) -> Store:
        """The directory that only this generation writes."""
        return self.root.at(generation_key(self.generation))


@dataclass(frozen=True)
class StageInput(StepGeneration):
    """A finished step as its readers see it. The generation is the one that the receipt names."""

    fingerprint: str
    facts: Mapping[str, Any]
    """What the stage returned: small JSON values such as digests, counts and scores."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """When, where and in how many seconds it was made. To be shown, never to be computed with."""


@dataclass(frozen=True)
class Attempt(StepGeneration):
    """One claimed generation of a step: where its stage may write, and how it runs."""

    continues: str
    """Key, in the step's directory, of the checkpoint from which this generation continues; empty if it starts from nothing."""
    step_name: str
    fingerprint: str
    resources: Resources
    executor: Executor
    progress: Progress
    tracking_uri: str = ""
    """Address of MLflow; empty for no tracking."""
    mlflow_run_id: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of the step."""


@dataclass(frozen=True)
class StageResult:
    """What a stage returns for the receipt."""

    facts: Mapping[str, Any]
    """Small JSON values that do not depend on how often the work was interrupted."""
    files: tuple[str, ...] = ()
    """Keys, in the generation's directory, of the files that readers rely on. The receipt holds their hashes."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How this attempt went, such as how much of earlier attempts it could reuse. To be shown only."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node of the graph."""

    kind: StepKind
    """Not part of the fingerprint."""
    name: str
    """Unique in a run; begins the directory's name (`pretrain`, `finetune-digits-pretrained-s0`)."""
    function: Callable[[Any, Mapping[str, StageInput], Attempt], StageResult]
    """A top-level function of a stage's module, so that any worker can import it."""
    config: Any
    """A frozen dataclass or pydantic model; all of it enters the fingerprint."""
    inputs: Mapping[str, "Step"] = field(default_factory=dict)
    resources: Resources = Resources()  # noqa: RUF009 - frozen
    """Where and how it runs; not part of the fingerprint."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of this stage that change no result (`bad_share_stop`); not part of the fingerprint."""
    resume_point: Callable[[Store], str] | None = None
    """Returns the key of what a new generation continues from (a checkpoint in the step's directory), or an empty string. A step
    that has a resume point saves and stops when asked to; the others are interrupted and reuse what they had written."""
    label: str = ""
    """Tells steps of one name apart where several runs share a graph; not part of the fingerprint."""

    @property
    def title(self) -> str:
        """The name, with the label if there is one: unique in a graph."""
        return f"{self.name} [{self.label}]" if self.label else self.name

    @property
    def version(self) -> int:
        """`VERSION` of the module that holds the function."""
        version = getattr(sys.modules[self.function.__module__], "VERSION", None)
        if not isinstance(version, int):
            raise ConfigError(f"step {self.name}: module {self.function.__module__} needs a whole number VERSION")
        return version

    def identity(self) -> dict[str, Any]:
        """Return everything that the fingerprint covers, as plain JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "config": canonical(self.config, f"step {self.name}: config"),
            "inputs": {key: step.fingerprint for key, step in sorted(self.inputs.items())},
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, 64 hex digits."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def directory(self) -> str:
        """The step's directory in the store."""
        return f"{self.name}-{self.fingerprint[:12]}"


def generation_key(generation: int) -> str:
    """Return the name of a generation's directory, such as `g0007`."""
    return f"g{generation:04d}"


def canonical(value: Any, where: str = "value") -> Any:
    """Return a value as plain JSON with exactly one form, so that equal values have equal fingerprints.

    Raises ConfigError, naming the value by `where`, for anything that has no such form."""
    # a class has model_dump too; only instances are values
    if hasattr(value, "model_dump") and not isinstance(value, type):
        return canonical(value.model_dump(mode="python"), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entering = (f for f in dataclasses.fields(value) if not _left_out(f, getattr(value, f.name)))
        return {f.name: canonical(getattr(value, f.name), f"{where}.{f.name}") for f in entering}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{where}={value!r} has keys that are not text: a fingerprint needs text keys")
        return {key: canonical(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}={value!r} has no stable form in a fingerprint: write a finite number")
        # 1.0 and 1 are the same value in YAML; beyond 2**53 a float no longer holds every whole number
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ConfigError(
        f"{where}={value!r} ({type(value).__name__}) has no stable form in a fingerprint: use numbers, text, lists, mappings"
    )


def _left_out(config_field: "dataclasses.Field[Any]", value: Any) -> bool:
    # >=: a field's metadata may hold more than this mark
    return config_field.metadata.items() >= ADDED_LATER.items() and bool(value == config_field.default)
