"""Why a worker should stop: what it learns itself (a signal, its node's notice) and, on rank 0, from the store and the cluster.

Each rank asks for itself and reports at the next step boundary, where all ranks agree on one reason (`loop/loop.py`). The store
and the cluster are asked by a thread: an endpoint that is down would hold every step of every worker for as long as its
timeouts and retries last. The loop's thread only reads what the last answers were.
Units: seconds."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, Self

from pipeline import cluster
from pipeline.errors import Fenced, StorageError
from pipeline.graph.receipts import check_fence
from pipeline.graph.runner import stop_request_key
from pipeline.graph.step import Attempt
from pipeline.training.world import World

log = logging.getLogger(__name__)
StopReason = Literal["", "fenced", "asked", "preempted", "resized"]
REASONS: tuple[StopReason, ...] = ("fenced", "asked", "preempted", "resized")
"""In order of precedence when workers report different ones.

fenced      a higher generation of this step has been claimed
asked       by a person, a signal to the driver, or the wall clock
preempted   a worker's node or process is about to go
resized     there is room for more workers
"""


class StopSignal(Protocol):
    """Something that may ask the loop to stop."""

    def stop_reason(self) -> StopReason:
        """Return why to stop, or an empty string. Called on every rank at every step boundary, so it must be cheap."""
        ...


STORE_POLL_S = 1.0
"""Between two looks at the store for a stop request or a higher generation."""
DRAIN_POLL_S = 2.0
"""Between two looks at whether this node is about to go. Notice is given 30 s (pods) to 120 s (spot machines) ahead."""
ROOM_POLL_S = 5.0
"""Between two looks for room for more workers. Two in a row must find some, because growing costs a restart."""
_TICK_S = 0.25
"""Between two rounds of questions; each question has its own, longer interval."""
_FIRST_ANSWERS_S = 5.0
"""How long training waits at its start, so that a request made before is heard before the first step."""
_terminated = threading.Event()  # of the process, as signal handlers are


def stop_on_sigterm() -> None:
    """Make SIGTERM to this process ask for a checkpoint instead of ending it. Call it in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Let SIGTERM ask for a checkpoint while the block runs, in a process that serves others before and after."""
    before = signal.getsignal(signal.SIGTERM)
    _terminated.clear()
    stop_on_sigterm()
    try:
        yield
    finally:
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL if before is None else before
        )  # None: a handler that is not Python's


def stop_on_sigterm_if_unhandled() -> None:
    """Do the same where nobody handles the signal yet: under torchrun. `mae run` has a handler of its own."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        stop_on_sigterm()


class StoreStopSignal:
    """Polls the store for a request to stop this generation."""

    def __init__(self, attempt: Attempt, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempt, self.clock, self.polled_at = attempt, clock, -STORE_POLL_S
        self.answer: StopReason = ""

    def stop_reason(self) -> StopReason:
        """Return `asked`, `fenced` or nothing, at most `STORE_POLL_S` old. It may block for as long as the store does.

        If the store fails, its last answer stands, and it is asked again later.
        """
        now = self.clock()
        if now - self.polled_at >= STORE_POLL_S:
            self.polled_at = now
            try:
                self.answer = self._ask()
            except StorageError as error:
                log.warning("cannot see whether this run is asked to stop: %s", error)
        return self.answer

    def _ask(self) -> StopReason:
        try:
            # Before the request: once a newer generation has claimed the step, this one must not even save.
            check_fence(self.attempt.root, self.attempt.generation)
        except Fenced:
            return "fenced"
        return "asked" if self.attempt.root.exists(stop_request_key(self.attempt.generation)) else ""


class DebouncedCheck:
    """True once a check has held `length` times in a row; it is made every `every_s` seconds at most."""

    def __init__(
        self, check: Callable[[], bool], *, every_s: float, length: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.check, self.every_s, self.length, self.clock = check, every_s, length, clock
        self.checked_at, self.held = clock(), 0

    def __call__(self) -> bool:
        """Return the current answer; make the check first if it is due."""
        now = self.clock()
        if now - self.checked_at >= self.every_s:
            self.checked_at = now
            self.held = self.held + 1 if self.check() else 0
        return self.held >= self.length


class CombinedStopSignal:
    """What the store and the cluster say to one worker. May block."""

    def __init__(self, store: StoreStopSignal | None, checks: Sequence[tuple[Callable[[], bool], StopReason]]) -> None:
        self.store, self.checks = store, checks

    def stop_reason(self) -> StopReason:
        """Return the store's reason, else the first of the checks that holds."""
        from_store: StopReason = self.store.stop_reason() if self.store else ""
        return from_store or next((reason for holds, reason in self.checks if holds()), "")


class PolledStopSignal:
    """Asks another stop signal in a thread, so that whatever it waits for holds no step up; hears SIGTERM by itself.

    A context manager: the thread begins and ends with it.
    """

    def __init__(self, source: StopSignal) -> None:
        self.source = source
        self._answer: StopReason = ""  # written by the thread, read by the loop
        self._answered, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._poll, name="stop-reasons", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._answered.wait(_FIRST_ANSWERS_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # not joined: the thread may be waiting for a store that does not answer

    def stop_reason(self) -> StopReason:
        """Return the last answer, or `preempted` after SIGTERM, whichever comes first in `REASONS`. Waits for nothing."""
        found = {self._answer, "preempted" if _terminated.is_set() else ""}
        return next((reason for reason in REASONS if reason in found), "")

    def _poll(self) -> None:
        while not self._ended.is_set():
            try:
                self._answer = self.source.stop_reason()
            except Exception as error:  # noqa: BLE001 - a thread that died would leave later requests unheard
                log.warning("cannot see whether this worker should stop: %s", error)
            self._answered.set()
            self._ended.wait(_TICK_S)


def stop_signal_of(attempt: Attempt, world: World) -> PolledStopSignal:
    """Return the stop signal of this worker. Rank 0 alone polls the store and the cluster, for all."""
    checks: list[tuple[Callable[[], bool], StopReason]] = []
    if attempt.executor == "ray":
        checks.append((DebouncedCheck(cluster.this_node_is_draining, every_s=DRAIN_POLL_S, length=1), "preempted"))
        _, most = attempt.resources.worker_range
        # A group at its maximum cannot grow, so it never asks.
        if world.is_first and world.size < most:
            need = attempt.resources.per_worker
            has_room = DebouncedCheck(
                lambda: cluster.worker_capacity(need, of="free") > 0, every_s=ROOM_POLL_S, length=2
            )
            checks.append((has_room, "resized"))
    return PolledStopSignal(CombinedStopSignal(StoreStopSignal(attempt) if world.is_first else None, checks))
