"""Walks the graph: what has a receipt is cached, what is ready is claimed and run, what failed blocks what needs it.

The walker holds no state of its own: everything it knows is in the store, so that a killed driver started again goes on.
`plan_graph` is the same walk without acting."""

import json
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline import cluster
from pipeline.errors import ConfigError, Fenced, PipelineError, Stopped
from pipeline.graph.receipts import Receipt, claim, read_receipt, write_receipt
from pipeline.graph.step import Attempt, Executor, StageInput, Step, canonical
from pipeline.storage import Store, open_store

State = Literal["done", "cached", "failed", "stopped", "blocked"]
HISTORY = "history/"
"""Identities of finished steps by name, so that a plan can say which field made a step differ."""


@dataclass(frozen=True)
class Outcome:
    """What became of a step in this run."""

    step: Step
    state: State
    uri: str
    seconds: float = 0.0
    receipt: Receipt | None = None
    error: BaseException | None = None
    mlflow_run_id: str = ""


@dataclass(frozen=True)
class PlanRow:
    """What a run would do with a step."""

    step: Step
    state: Literal["cached", "to_run", "blocked"]
    differs: tuple[str, ...]
    """Fields in which the step differs from the most similar one done before; empty: none was, or nothing differs."""
    uri: str


class Hooks(Protocol):
    """What the run does around the steps: tracking and the terminal."""

    tracking_uri: str

    def begin(self, step: Step) -> str:
        """A step starts; returns its MLflow run (empty: none)."""
        ...

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Word from a step under way."""
        ...

    def end(self, outcome: Outcome) -> None:
        """A step ended, or was found done, or cannot run."""
        ...


@dataclass(frozen=True)
class _Direct:
    """Progress of a stage that runs in this process."""

    hooks: Hooks
    step_name: str

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        self.hooks.progress(self.step_name, done, total, unit, fields)


class Run:
    """One walk over a graph. `request_stop` may be called from a signal handler."""

    def __init__(
        self, steps: Sequence[Step], *, store: Store, executor: Executor, hooks: Hooks, parallel: int = 1
    ) -> None:
        self.steps = in_order(steps)
        self.store, self.executor, self.hooks, self.parallel = store, executor, hooks, parallel
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, tuple[Step, Attempt, cluster.Handle, float]] = {}
        self.at_work: tuple[Step, Attempt] | None = None
        self.stopping = False
        self.board: cluster.ProgressBoard | None = None

    def walk(self) -> list[Outcome]:
        """Runs all that is not done; returns what became of every step, in their order."""
        while len(self.outcomes) < len(self.steps):
            for step in self.steps:
                if (
                    step.name not in self.outcomes
                    and step.name not in self.running
                    and len(self.running) < self.parallel
                ):
                    self._consider(step)
            self._collect()
        return [self.outcomes[step.name] for step in self.steps]

    def request_stop(self) -> None:
        """Asks the steps under way to save and stop; nothing new is started. Steps that cannot save are cut off."""
        self.stopping = True
        at_work = [(step, attempt) for step, attempt, _, _ in self.running.values()]
        if self.at_work:
            at_work.append(self.at_work)
        for step, attempt in at_work:
            if step.resume_point is not None:
                attempt.root.create(stop_key(attempt.generation), b"{}")
            elif self.at_work:
                raise KeyboardInterrupt

    def _consider(self, step: Step) -> None:
        needed = [self.outcomes.get(source.name) for source in step.inputs.values()]
        if any(outcome is None for outcome in needed):
            return
        if any(outcome and outcome.receipt is None for outcome in needed):
            self._finish(Outcome(step, "blocked", self._uri(step)))
        elif (receipt := read_receipt(self.store.at(step.directory))) is not None:
            self._finish(Outcome(step, "cached", self._uri(step), float(receipt.made["seconds"]), receipt))
        elif self.stopping:
            self._finish(Outcome(step, "stopped", self._uri(step)))
        else:
            self._start(step)

    def _start(self, step: Step) -> None:
        root = self.store.at(step.directory)
        continues = step.resume_point(root) if step.resume_point else ""
        run_id = self.hooks.begin(step)
        if self.executor == "ray" and self.board is None:
            self.board = cluster.ProgressBoard()
        attempt = Attempt(
            root_uri=root.uri,
            generation=claim(root, continues=continues),
            continues=continues,
            step_name=step.name,
            fingerprint=step.fingerprint,
            resources=step.resources,
            executor=self.executor,
            progress=self.board.writer(step.name) if self.board else _Direct(self.hooks, step.name),
            tracking_uri=self.hooks.tracking_uri,
            mlflow_run_id=run_id,
        )
        inputs = {name: self._receipt(source).as_input(self._uri(source)) for name, source in step.inputs.items()}
        started = time.monotonic()
        if self.executor == "ray":
            self.running[step.name] = (step, attempt, cluster.submit(execute, step, inputs, attempt), started)
            return
        self.at_work = (step, attempt)
        try:
            receipt = execute(step, inputs, attempt)
            self._finish(self._done(step, attempt, receipt, started))
        except BaseException as error:  # noqa: BLE001 - classified and told below, never swallowed
            self._finish(self._undone(step, attempt, error, started))
        finally:
            self.at_work = None

    def _collect(self) -> None:
        for name, (step, attempt, handle, started) in list(self.running.items()):
            if self.stopping and step.resume_point is None:
                handle.cancel()
            if not handle.ready(timeout_s=0.2):
                continue
            try:
                outcome = self._done(step, attempt, handle.result(), started)
            except Exception as error:  # noqa: BLE001 - classified and told below, never swallowed
                outcome = self._undone(step, attempt, error, started)
            self._tell_progress()
            del self.running[name]
            self._finish(outcome)
        self._tell_progress()

    def _tell_progress(self) -> None:
        if self.board:
            for name, (done, total, unit, fields) in self.board.take().items():
                self.hooks.progress(name, done, total, unit, fields)

    def _done(self, step: Step, attempt: Attempt, receipt: Receipt, started: float) -> Outcome:
        self.store.write(
            f"{HISTORY}{step.name}/{step.fingerprint[:12]}.json", json.dumps(receipt.identity, sort_keys=True).encode()
        )
        seconds = time.monotonic() - started
        return Outcome(step, "done", self._uri(step), seconds, receipt, mlflow_run_id=attempt.mlflow_run_id)

    def _undone(self, step: Step, attempt: Attempt, error: BaseException, started: float) -> Outcome:
        gentle = isinstance(error, Stopped | Fenced | KeyboardInterrupt) or self.stopping
        if isinstance(error, Fenced):
            self.stopping = True
        return Outcome(
            step,
            "stopped" if gentle else "failed",
            self._uri(step),
            time.monotonic() - started,
            error=error,
            mlflow_run_id=attempt.mlflow_run_id,
        )

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step.name] = outcome
        self.hooks.end(outcome)

    def _receipt(self, step: Step) -> Receipt:
        receipt = self.outcomes[step.name].receipt
        if receipt is None:
            raise PipelineError(f"step {step.name} has no receipt, though a step that reads it was started")
        return receipt

    def _uri(self, step: Step) -> str:
        return self.store.at(step.directory).uri


def execute(step: Step, inputs: Mapping[str, StageInput], attempt: Attempt) -> Receipt:
    """Runs the stage's function and completes the step; on Ray this is the task that reserves no CPU."""
    started = time.monotonic()
    root = open_store(attempt.root_uri)
    try:
        result = step.function(step.config, inputs, attempt)
    except (PipelineError, ConfigError):
        raise
    except Exception:
        root.write(f"failure/{attempt.generation:04d}.txt", traceback.format_exc().encode())
        raise
    return write_receipt(root, step, attempt.generation, result, seconds=time.monotonic() - started)


def stop_key(generation: int) -> str:
    """The object, in a step's directory, that asks this generation to save and stop."""
    return f"stop/{generation:04d}.json"


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps with every input before what reads it; each name once."""
    ordered: dict[str, Step] = {}

    def add(step: Step) -> None:
        if step.name in ordered:
            if ordered[step.name].fingerprint != step.fingerprint:
                raise PipelineError(f"two different steps are named {step.name}: give one of them another name")
            return
        for source in step.inputs.values():
            add(source)
        ordered[step.name] = step

    for step in steps:
        add(step)
    return list(ordered.values())


def plan_graph(steps: Sequence[Step], *, store: Store, unable: Iterable[str] = ()) -> list[PlanRow]:
    """What a run would do; writes nothing. `unable`: names of steps that could not run (their source is absent)."""
    rows: dict[str, PlanRow] = {}
    for step in in_order(steps):
        root = store.at(step.directory)
        if read_receipt(root) is not None:
            rows[step.name] = PlanRow(step, "cached", (), root.uri)
            continue
        stuck = step.name in unable or any(rows[source.name].state == "blocked" for source in step.inputs.values())
        differs = nearest_difference(step.identity(), _history(store, step.name))
        rows[step.name] = PlanRow(step, "blocked" if stuck else "to_run", differs, root.uri)
    return list(rows.values())


def _history(store: Store, name: str) -> list[Mapping[str, Any]]:
    return [json.loads(store.read(info.key)) for info in store.list(f"{HISTORY}{name}/")]


def nearest_difference(identity: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """How `identity` differs from the one of `earlier` that differs least: lines `config.mask_ratio: 0.75 -> 0.8`."""
    differences = [_difference(flatten(before), flatten(identity)) for before in earlier]
    return min(differences, key=len, default=())


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    lines = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        if old != new:
            lines.append(f"{key}: made anew" if key.startswith("inputs.") else f"{key}: {old} -> {new}")
    return tuple(lines)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay whole."""
    if not isinstance(value, Mapping):
        return {prefix: canonical(value)}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat
