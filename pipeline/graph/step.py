"""A step is what it computes, not where it runs: `Step`, its fingerprint, and what its function is handed.

A stage is a plain function `(config, inputs, attempt) -> StageResult`. Its module holds `VERSION`, a whole number bumped
by hand when the stage's results change. The fingerprint is a SHA-256 over name, version, canonical config and the
fingerprints of the inputs; `resources` and the store never enter it: the same work on other machines is the same step.
A field that a config gains later is marked ADDED_LATER: at its default it stays out, so that an upgrade runs nothing anew.
Errors: ConfigError when a config holds a value that has no stable form (a set, NaN, an object)."""

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

StepKind = Literal["snapshot", "shard", "join", "pretrain", "evaluate", "report"]
"""What a step does. Its name is for people and for the store; nothing reads meaning out of a name."""


@dataclass(frozen=True)
class StepGeneration:
    """One generation of one step: where its files are."""

    root_uri: str
    """The step's directory, `<store>/<name>-<fingerprint[:12]>`."""
    generation: int
    """Its files lie under `g%04d/`."""

    @property
    def root(self) -> Store:
        """The step's directory: content-addressed objects and put-if-absent rows, common to all generations."""
        return open_store(self.root_uri)

    @property
    def store(self) -> Store:
        """The generation's own directory."""
        return self.root.at(generation_key(self.generation))


@dataclass(frozen=True)
class StageInput(StepGeneration):
    """A finished step as its readers see it; the generation is the one that the receipt names."""

    fingerprint: str
    facts: Mapping[str, Any]
    """What the stage returned: small JSON values (digests, counts, scores)."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """When, where and in how many seconds it was made; for show only, never for results."""


@dataclass(frozen=True)
class Attempt(StepGeneration):
    """Where a stage may write, and how it may run: one claimed generation of one step."""

    continues: str
    """What this generation was claimed to continue from, a key in the step's directory (a checkpoint); empty: from nothing."""
    step_name: str
    fingerprint: str
    resources: Resources
    executor: Executor
    progress: Progress
    tracking_uri: str = ""
    """MLflow's address; empty: no tracking."""
    mlflow_run_id: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """As in the step."""


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves for the receipt."""

    facts: Mapping[str, Any]
    """Small JSON values, the same however often the work was interrupted."""
    files: tuple[str, ...] = ()
    """Keys, in the generation's directory, of the files that readers rely on."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How this attempt went (what it could take up from earlier ones); for show only."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node of the graph."""

    kind: StepKind
    """Outside the fingerprint."""
    name: str
    """Unique in a workflow; also the directory's name (`pretrain`, `finetune-digits-pretrained-s0`)."""
    function: Callable[[Any, Mapping[str, StageInput], Attempt], StageResult]
    """A top-level function of a stage's module, importable on any worker."""
    config: Any
    """A frozen dataclass or pydantic model; all of it enters the fingerprint."""
    inputs: Mapping[str, "Step"] = field(default_factory=dict)
    resources: Resources = Resources()
    """Where and how it runs; outside the fingerprint."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of this stage alone that change no result (`bad_share_stop`); outside the fingerprint."""
    resume_point: Callable[[Store], str] | None = None
    """Finds in the step's directory what a new generation continues from (a checkpoint's key, or nothing). A step that has it
    also stops gently when asked; the others are cut off, and their work is taken up again from what they left."""

    @property
    def version(self) -> int:
        """`VERSION` of the module that holds the function."""
        version = getattr(sys.modules[self.function.__module__], "VERSION", None)
        if not isinstance(version, int):
            raise ConfigError(f"step {self.name}: module {self.function.__module__} needs a whole number VERSION")
        return version

    def identity(self) -> dict[str, Any]:
        """Everything the fingerprint covers, as plain JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "config": canonical(self.config, f"step {self.name}: config"),
            "inputs": {key: step.fingerprint for key, step in sorted(self.inputs.items())},
        }

    @property
    def fingerprint(self) -> str:
        """64 hex digits."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def directory(self) -> str:
        """The step's place in the store."""
        return f"{self.name}-{self.fingerprint[:12]}"


def generation_key(generation: int) -> str:
    """Directory of one generation, `g0007`."""
    return f"g{generation:04d}"


def canonical(value: Any, where: str = "value") -> Any:
    """Plain JSON values with one stable form; anything else is refused rather than guessed at. `where` names it in the refusal."""
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
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise ConfigError(
        f"{where}={value!r} ({type(value).__name__}) has no stable form in a fingerprint: use numbers, text, lists, mappings"
    )


def _left_out(added: "dataclasses.Field[Any]", value: Any) -> bool:
    return added.metadata.items() >= ADDED_LATER.items() and bool(value == added.default)
