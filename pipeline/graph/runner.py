"""The runner of a graph: steps with a receipt are cached, ready ones are claimed and run, failed ones block their readers.

The runner keeps no state of its own. Everything it knows is in the store, so that a killed driver continues when it is started
again."""

import contextlib
import logging
import math
import platform
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pipeline import cluster
from pipeline.errors import ConfigError, Fenced, PipelineError, Stopped, StorageError
from pipeline.graph.plan import record_identity, topological_order
from pipeline.graph.receipts import Receipt, check_fence, claim, read_receipt, write_receipt
from pipeline.graph.step import Attempt, StageInput, Step, StepKind
from pipeline.storage import Store, open_store

log = logging.getLogger(__name__)

START_PATIENCE_S = 15.0
"""How long a stop waits for a training that has not reached its first step: nothing of it can be lost."""
State = Literal["done", "cached", "failed", "stopped", "blocked"]
Parallel = int | Callable[[StepKind], int]
"""How many steps may run at once: a number, of any kind, or a function that says how many of a kind would fill the cluster."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended in this run."""

    step: Step
    state: State
    uri: str
    seconds: float = 0.0
    receipt: Receipt | None = None
    error: BaseException | None = None
    mlflow_run_id: str = ""


class Hooks(Protocol):
    """What a run does around its steps. Called on the driver, from the thread that walks the graph."""

    tracking_uri: str

    def begin(self, step: Step) -> str:
        """Note that a step starts. Returns the id of its MLflow run, or an empty string if it has none."""
        ...

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Note how far a running step is. `step_name` is its title."""
        ...

    def say(self, step_name: str, text: str) -> None:
        """Show a line that a running step has to say. `step_name` is its title."""
        ...

    def end(self, outcome: Outcome) -> None:
        """Note that a step ended, was found finished, or cannot run."""
        ...


@dataclass(frozen=True)
class _InProcessProgress:
    """Passes the progress of a stage in this process straight to the walk and its hooks."""

    walk: "GraphRun"
    step_name: str

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        self.walk.note_progress(self.step_name, done, total, unit, fields)

    def say(self, text: str) -> None:
        self.walk.hooks.say(self.step_name, text)


@dataclass
class _RunningStep:
    """A step that is running."""

    step: Step
    attempt: Attempt
    started: float
    """Monotonic seconds."""
    stop_requested: bool = False
    stop_requested_at: float = 0.0
    """Monotonic seconds."""
    interrupted: bool = False
    """Whatever it raises, it raises because it was interrupted on request."""
    done: int = 0
    total: int = 0
    updates: int = 0
    """Times that it reported its progress; `total` of 0 is unknown."""
    first_update_at: float = 0.0
    last_update_at: float = 0.0

    def note(self, done: int, total: int) -> None:
        """Note a report of its progress."""
        self.last_update_at = time.monotonic()
        if not self.updates:
            self.first_update_at = self.last_update_at
        self.done, self.total, self.updates = done, total, self.updates + 1

    def waiting_for(self) -> str:
        """Return what a stop of it waits for, and about how long."""
        name = self.step.title
        if self.step.resume_point is None:
            return f"{name} is interrupted, which takes a second or two; its finished parts are kept"
        if not self.updates:
            return f"{name} is still starting and has nothing to save yet; it ends within {START_PATIENCE_S:g} s"
        if self.total and self.done >= self.total:
            return f"{name} has taken its last step and saves it; what it has not scored is left to the next run"
        if self.updates < 2:
            return f"{name} finishes the step it is at and saves a checkpoint"
        # It reports every `log_every_steps`, or less often; each report is followed by a look at whether to stop, at most 1 s old.
        steps = (self.updates - 1) * self.step.resources.log_every_steps
        about = 1 + (self.last_update_at - self.first_update_at) / steps
        return f"{name} finishes the step it is at, in about {math.ceil(about)} s, and saves a checkpoint"


class GraphRun:
    """One walk over a graph. `request_stop` may be called from a signal handler, the rest from one thread."""

    def __init__(
        self, steps: Sequence[Step], *, store: Store, executor: cluster.Executor, hooks: Hooks, parallel: Parallel = 1
    ) -> None:
        self.steps = topological_order(steps)
        self.store, self.executor, self.hooks, self.parallel = store, executor, hooks, parallel
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[str, tuple[_RunningStep, cluster.Handle]] = {}
        self.in_process: _RunningStep | None = None
        """The step that runs in this process."""
        self.stopping = False
        self.board: cluster.ProgressBoard | None = None

    def walk(self) -> list[Outcome]:
        """Run every step that is not finished. Returns one outcome per step, inputs before their readers."""
        while len(self.outcomes) < len(self.steps):
            for step in self.steps:
                if step.title not in self.outcomes and step.title not in self.running:
                    self._consider(step)
            self._collect()
        return [self.outcomes[step.title] for step in self.steps]

    def request_stop(self) -> None:
        """Start nothing new, and let running steps save and stop. Those that cannot save are interrupted.

        Raises KeyboardInterrupt to interrupt a step in this process. Does no I/O: a signal handler that waited for a lock held by
        the code that it interrupts would wait forever."""
        self.stopping = True
        # a step with a resume point is asked through the store by a thread: writing is no work for a handler
        if self.in_process and self.in_process.step.resume_point is None:
            self.in_process.stop_requested = self.in_process.interrupted = True
            raise KeyboardInterrupt

    def waiting_for(self) -> str:
        """Return what a stop would wait for at this moment, and about how long. Any thread may call it."""
        here = [self.in_process] if self.in_process else []
        running = [*here, *(work for work, _ in list(self.running.values()))]  # a copy: another thread may change it
        return "; ".join(work.waiting_for() for work in running) or "no step is running; the results are being recorded"

    def note_progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """Note and pass on how far a running step is."""
        work, _ = self.running.get(step_name, (self.in_process, None))
        if work:
            work.note(done, total)
        self.hooks.progress(step_name, done, total, unit, fields)

    def _consider(self, step: Step) -> None:
        """Start a step whose inputs are all settled, or settle it if there is nothing to start."""
        if any(one.title not in self.outcomes for one in step.inputs.values()) or not self._has_room(step):
            return
        inputs = {self.outcomes[one.title].state for one in step.inputs.values()}
        # after a stop, steps are still looked up, so that the summary tells what is finished, but none is started
        ready = inputs <= {"done", "cached"} and not self.stopping
        attempt = None
        try:
            receipt = read_receipt(self.store.at(step.directory))
            if receipt is None and ready and not self._is_fenced():
                step = self._decided(step)
                attempt = self._claim(step)
        except PipelineError as error:
            self._finish(Outcome(step, "failed", self._uri(step), error=error))
            return
        if receipt is not None:
            record_identity(self.store, receipt)  # again: a driver may have been killed right after the receipt
            self._finish(Outcome(step, "cached", self._uri(step), float(receipt.made["seconds"]), receipt))
        elif attempt is not None:
            self._start(_RunningStep(step, attempt, time.monotonic()))
        else:
            self._finish(Outcome(step, "blocked" if inputs & {"failed", "blocked"} else "stopped", self._uri(step)))

    def _has_room(self, step: Step) -> bool:
        """Return whether the step may start beside those that run."""
        if not self.running or isinstance(self.parallel, int):
            return len(self.running) < (self.parallel if isinstance(self.parallel, int) else 1)
        kinds = [step.kind, *(work.step.kind for work, _ in self.running.values())]
        # 1e-9: three thirds are one
        return sum(1 / self.parallel(kind) for kind in kinds) <= 1 + 1e-9

    def _is_fenced(self) -> bool:
        """Return whether another driver has taken a running step; this one then stops.

        Asked before each claim: of two drivers that start side by side, each would otherwise take a step of the other's."""
        try:
            for work, _ in self.running.values():
                check_fence(work.attempt.root, work.attempt.generation)
        except Fenced:
            self.stopping = True
        return self.stopping

    def _decided(self, step: Step) -> Step:
        """Return the step with the number of its workers decided for this cluster, if it evaluates."""
        if self.executor == "in_process" or step.kind != "evaluate":
            return step
        on_gpus = bool(cluster.hardware_decided(step.resources).use_gpu)
        return replace(step, resources=step.resources.for_evaluation(on_gpus=on_gpus))

    def _claim(self, step: Step) -> Attempt:
        root = self.store.at(step.directory)
        # read before the claim, whose record names it so that nobody deletes it
        continues = step.resume_point(root) if step.resume_point else ""
        generation = claim(root, continues=continues)
        # only now: an actor needs a cluster, and a run in which everything is cached starts none
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
            progress=self.board.writer(step.title) if self.board else _InProcessProgress(self, step.title),
            tracking_uri=self.hooks.tracking_uri,
            mlflow_run_id=self.hooks.begin(step),
        )

    def _start(self, work: _RunningStep) -> None:
        step = work.step
        inputs = {name: self._receipt(source).as_input(self._uri(source)) for name, source in step.inputs.items()}
        if self.executor == "ray":
            self.running[step.title] = (work, cluster.submit(execute_step, step, inputs, work.attempt))
            return
        try:
            self.in_process = work
            if self.stopping:  # the signal came between the claim and the line above
                self.request_stop()
            # only where a step can save: the others are interrupted by request_stop itself
            if step.resume_point is not None:
                threading.Thread(target=self._forward_stop_request, args=(work,), daemon=True).start()
            receipt = execute_step(step, inputs, work.attempt)
            # from here on only records are written, which a signal must not interrupt
            self.in_process = None
        except BaseException as error:  # noqa: BLE001 - becomes the step's outcome, never swallowed
            self.in_process = None
            outcome = self._unfinished(work, error)
        else:
            outcome = self._finished(work, receipt)
        self._finish(outcome)

    def _collect(self) -> None:
        # the only pause of the walk, so it does not spin while steps run
        cluster.wait_for_any([handle for _, handle in self.running.values()], timeout_s=0.2)
        # a copy: finished steps are deleted from it below
        for name, (work, handle) in list(self.running.items()):
            if not handle.ready(timeout_s=0):
                if self.stopping:
                    self._stop_on_cluster(work, handle)
                continue
            try:
                outcome = self._finished(work, handle.result())
            except Exception as error:  # noqa: BLE001 - becomes the step's outcome, never swallowed
                outcome = self._unfinished(work, error)
            self._forward_progress()  # before the outcome: the terminal must not show progress of a step that has ended
            del self.running[name]
            self._finish(outcome)
        self._forward_progress()

    def _forward_stop_request(self, work: _RunningStep) -> None:
        """Watch, in a thread of its own, for a request to stop, and pass it to the step through the store, as on a cluster."""
        while self.in_process is work and not work.stop_requested:
            if self.stopping:
                self._ask_to_stop(work)
            time.sleep(0.1)

    def _stop_on_cluster(self, work: _RunningStep, handle: cluster.Handle) -> None:
        """Ask a step to save and stop, or interrupt it if it cannot save, or has begun nothing that it could save."""
        if work.step.resume_point is not None and not work.stop_requested:
            self._ask_to_stop(work)
        overdue = work.stop_requested and time.monotonic() - work.stop_requested_at > START_PATIENCE_S
        if not work.interrupted and (work.step.resume_point is None or (overdue and not work.updates)):
            work.stop_requested = work.interrupted = True
            handle.cancel()

    def _ask_to_stop(self, work: _RunningStep) -> None:
        """Ask a step, through the store, to save and stop. A store that refuses is asked again at the next call."""
        try:
            work.attempt.root.create(stop_request_key(work.attempt.generation), b"{}")
        except StorageError as error:
            log.warning("%s: the request to stop could not be written, trying again: %s", work.step.name, error)
            # not yet marked as asked, so the next look tries again
            return
        # not `interrupted`: the step is trusted to end by itself until START_PATIENCE_S is over
        work.stop_requested, work.stop_requested_at = True, time.monotonic()

    def _forward_progress(self) -> None:
        if self.board:
            updates, lines = self.board.take()
            for name, text in lines:
                self.hooks.say(name, text)
            for name, (done, total, unit, fields) in updates.items():
                self.note_progress(name, done, total, unit, fields)

    def _finished(self, work: _RunningStep, receipt: Receipt) -> Outcome:
        record_identity(self.store, receipt)
        seconds, run_id = time.monotonic() - work.started, work.attempt.mlflow_run_id
        return Outcome(work.step, "done", self._uri(work.step), seconds, receipt, mlflow_run_id=run_id)

    def _unfinished(self, work: _RunningStep, error: BaseException) -> Outcome:
        if work.interrupted:
            where = "goes on from its last checkpoint" if work.step.resume_point else "runs it again"
            error = Stopped(f"{work.step.name}: interrupted on request; the same command {where}")
        stopped = isinstance(error, Stopped | Fenced | KeyboardInterrupt)
        self.stopping |= stopped  # one step that was stopped or fenced ends the whole run
        seconds, run_id = time.monotonic() - work.started, work.attempt.mlflow_run_id
        state: State = "stopped" if stopped else "failed"
        return Outcome(work.step, state, self._uri(work.step), seconds, error=error, mlflow_run_id=run_id)

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step.title] = outcome
        self.hooks.end(outcome)

    def _receipt(self, step: Step) -> Receipt:
        receipt = self.outcomes[step.title].receipt
        if receipt is None:
            raise PipelineError(f"step {step.name} has no receipt, though a step that reads it was started")
        return receipt

    def _uri(self, step: Step) -> str:
        return self.store.at(step.directory).uri


def execute_step(step: Step, inputs: Mapping[str, StageInput], attempt: Attempt) -> Receipt:
    """Run a step's stage and write its receipt. On a cluster this is the coordinating task, which reserves no CPU."""
    started = time.monotonic()
    root = open_store(attempt.root_uri)
    # before any work: other code would write results under this fingerprint
    if step.fingerprint != attempt.fingerprint:
        raise PipelineError(
            f"step {step.name}: the code on {platform.node()} gives it fingerprint {step.fingerprint[:12]}, the driver's gives "
            f"{attempt.fingerprint[:12]}. Install the same version of mae-pipeline on every machine"
        )
    try:
        result = step.function(step.config, inputs, attempt)
    # their messages say all there is; a traceback is kept for what nobody foresaw
    except (PipelineError, ConfigError):
        raise
    except Exception:
        with contextlib.suppress(
            StorageError
        ):  # the original error matters more than a traceback that cannot be stored
            root.write(f"failure/{attempt.generation:04d}.txt", traceback.format_exc().encode())
        raise
    return write_receipt(root, step, attempt.generation, result, seconds=time.monotonic() - started)


def stop_request_key(generation: int) -> str:
    """Return the key, in a step's directory, of the object that asks a generation to save and stop."""
    return f"stop/{generation:04d}.json"
