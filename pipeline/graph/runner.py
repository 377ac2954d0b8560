"""Walks the graph: what has a receipt is cached, what is ready is claimed and run, what failed blocks what needs it.

The walker holds no state of its own: everything it knows is in the store, so that a killed driver started again goes on."""

import contextlib
import logging
import platform
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline import cluster
from pipeline.errors import ConfigError, Fenced, PipelineError, Stopped, StorageError
from pipeline.graph.plan import PlannedStep as PlannedStep
from pipeline.graph.plan import in_order, remember
from pipeline.graph.plan import plan_graph as plan_graph
from pipeline.graph.receipts import Receipt, claim, read_receipt, write_receipt
from pipeline.graph.step import Attempt, StageInput, Step
from pipeline.storage import Store, open_store

log = logging.getLogger(__name__)

State = Literal["done", "cached", "failed", "stopped", "blocked"]


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


@dataclass
class _RunningStep:
    """A step at work; `asked`: it has been told to stop."""

    step: Step
    attempt: Attempt
    started: float
    asked: bool = False


class GraphRun:
    """One walk over a graph. `request_stop` may be called from a signal handler."""

    def __init__(
        self, steps: Sequence[Step], *, store: Store, executor: cluster.Executor, hooks: Hooks, parallel: int = 1
    ) -> None:
        self.steps = in_order(steps)
        self.store, self.executor, self.hooks, self.parallel = store, executor, hooks, parallel
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, tuple[_RunningStep, cluster.Handle]] = {}
        self.here: _RunningStep | None = None
        """The step at work in this process."""
        self.stopping = False
        self.board: cluster.ProgressBoard | None = None

    def walk(self) -> list[Outcome]:
        """Runs all that is not done; returns what became of every step, in their order."""
        while len(self.outcomes) < len(self.steps):
            for step in self.steps:
                if step.name not in self.outcomes and step.name not in self.running:
                    self._consider(step)
            self._collect()
        return [self.outcomes[step.name] for step in self.steps]

    def request_stop(self) -> None:
        """Starts nothing new; steps under way save and stop, those that cannot save are cut off (in process: by the
        KeyboardInterrupt that this raises). It does no I/O: a signal handler must not wait for what it interrupts."""
        self.stopping = True
        if self.here and self.here.step.resume_point is None:
            self.here.asked = True
            raise KeyboardInterrupt

    def _consider(self, step: Step) -> None:
        """Settles a step whose inputs are settled, or starts it."""
        if len(self.running) >= self.parallel or any(one.name not in self.outcomes for one in step.inputs.values()):
            return
        inputs = {self.outcomes[one.name].state for one in step.inputs.values()}
        ready = inputs <= {"done", "cached"} and not self.stopping
        attempt = None
        try:
            receipt = read_receipt(self.store.at(step.directory))
            if receipt is None and ready:
                attempt = self._claim(step)
        except PipelineError as error:
            self._finish(Outcome(step, "failed", self._uri(step), error=error))
            return
        if receipt is not None:
            remember(self.store, receipt)  # a driver killed right after the receipt had no time to
            self._finish(Outcome(step, "cached", self._uri(step), float(receipt.made["seconds"]), receipt))
        elif attempt is not None:
            self._start(_RunningStep(step, attempt, time.monotonic()))
        else:
            self._finish(Outcome(step, "blocked" if inputs & {"failed", "blocked"} else "stopped", self._uri(step)))

    def _claim(self, step: Step) -> Attempt:
        root = self.store.at(step.directory)
        continues = step.resume_point(root) if step.resume_point else ""
        generation = claim(root, continues=continues)
        if self.executor == "ray" and self.board is None:
            self.board = cluster.ProgressBoard()
        return Attempt(
            root_uri=root.uri,
            generation=generation,
            continues=continues,
            step_name=step.name,
            fingerprint=step.fingerprint,
            resources=step.resources,
            options=step.options,
            executor=self.executor,
            progress=self.board.writer(step.name) if self.board else _Direct(self.hooks, step.name),
            tracking_uri=self.hooks.tracking_uri,
            mlflow_run_id=self.hooks.begin(step),
        )

    def _start(self, work: _RunningStep) -> None:
        step = work.step
        inputs = {name: self._receipt(source).as_input(self._uri(source)) for name, source in step.inputs.items()}
        if self.executor == "ray":
            self.running[step.name] = (work, cluster.submit(execute, step, inputs, work.attempt))
            return
        try:
            self.here = work
            if self.stopping:  # asked since the claim
                self.request_stop()
            if step.resume_point is not None:
                threading.Thread(target=self._pass_on_stop, args=(work,), daemon=True).start()
            receipt = execute(step, inputs, work.attempt)
            self.here = None
        except BaseException as error:  # noqa: BLE001 - classified and told below, never swallowed
            self.here = None
            outcome = self._undone(work, error)
        else:
            outcome = self._done(work, receipt)
        self._finish(outcome)

    def _collect(self) -> None:
        for name, (work, handle) in list(self.running.items()):
            if not handle.ready(timeout_s=0.2):
                if self.stopping and not work.asked:
                    self._ask(work, handle)
                continue
            try:
                outcome = self._done(work, handle.result())
            except Exception as error:  # noqa: BLE001 - classified and told below, never swallowed
                outcome = self._undone(work, error)
            self._tell_progress()
            del self.running[name]
            self._finish(outcome)
        self._tell_progress()

    def _pass_on_stop(self, work: _RunningStep) -> None:
        """Beside a step that runs in this process: a request to stop reaches it through the store, as on a cluster."""
        while self.here is work and not work.asked:
            if self.stopping:
                self._ask(work, None)
            time.sleep(0.1)

    def _ask(self, work: _RunningStep, handle: cluster.Handle | None) -> None:
        if work.step.resume_point is not None:
            try:
                work.attempt.root.create(stop_key(work.attempt.generation), b"{}")
            except StorageError as error:
                log.warning("%s: cannot be asked to stop, trying again: %s", work.step.name, error)
                return
        elif handle is not None:
            handle.cancel()
        work.asked = True

    def _tell_progress(self) -> None:
        if self.board:
            for name, (done, total, unit, fields) in self.board.take().items():
                self.hooks.progress(name, done, total, unit, fields)

    def _done(self, work: _RunningStep, receipt: Receipt) -> Outcome:
        remember(self.store, receipt)
        seconds, run_id = time.monotonic() - work.started, work.attempt.mlflow_run_id
        return Outcome(work.step, "done", self._uri(work.step), seconds, receipt, mlflow_run_id=run_id)

    def _undone(self, work: _RunningStep, error: BaseException) -> Outcome:
        if work.asked and work.step.resume_point is None:  # whatever was raised, cutting it off is why
            error = Stopped(f"{work.step.name}: cut off, as asked; the same command runs it again")
        stopped = isinstance(error, Stopped | Fenced | KeyboardInterrupt)
        self.stopping |= stopped
        seconds, run_id = time.monotonic() - work.started, work.attempt.mlflow_run_id
        state: State = "stopped" if stopped else "failed"
        return Outcome(work.step, state, self._uri(work.step), seconds, error=error, mlflow_run_id=run_id)

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
    if step.fingerprint != attempt.fingerprint:
        raise PipelineError(
            f"step {step.name}: the code on {platform.node()} gives it fingerprint {step.fingerprint[:12]}, the driver's gives "
            f"{attempt.fingerprint[:12]}. Install the same version of mae-pipeline on every machine"
        )
    try:
        result = step.function(step.config, inputs, attempt)
    except (PipelineError, ConfigError):
        raise
    except Exception:
        with contextlib.suppress(StorageError):  # the error itself is worth more
            root.write(f"failure/{attempt.generation:04d}.txt", traceback.format_exc().encode())
        raise
    return write_receipt(root, step, attempt.generation, result, seconds=time.monotonic() - started)


def stop_key(generation: int) -> str:
    """The object, in a step's directory, that asks this generation to save and stop."""
    return f"stop/{generation:04d}.json"
