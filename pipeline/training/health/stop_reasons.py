"""Why this worker should stop: what it learns itself (a signal, its node's notice) and, on rank 0, from the store and the cluster.

Each rank asks for itself and says so at the next step boundary, where all agree (loop.py). Units: seconds."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from pipeline import cluster
from pipeline.errors import Fenced, StorageError
from pipeline.graph.receipts import check_fence
from pipeline.graph.runner import stop_request_key
from pipeline.graph.step import Attempt
from pipeline.training.world import World

log = logging.getLogger(__name__)
StopReason = Literal["", "fenced", "asked", "preempted", "resized"]
REASONS: tuple[StopReason, ...] = ("fenced", "asked", "preempted", "resized")
"""Where workers say different ones, the first counts: a higher generation; a person, a signal to the driver or the wall clock; a
worker's node or process is about to go; there is room for more workers."""


class Supervisor(Protocol):
    """Who may ask the loop to stop."""

    def should_stop(self) -> StopReason:
        """Asked on every rank at every step boundary; must be cheap."""
        ...


ASK_EVERY_S = 1.0
"""Between two looks at the store for a request to stop or a higher generation."""
DRAIN_EVERY_S = 2.0
"""Between two looks at whether this node is about to go: notices come 30 s (pods) to 120 s (spot machines) before."""
GROW_EVERY_S = 5.0
"""Between two looks for room for more workers, which costs a restart: twice in a row there must be some."""
_terminated = threading.Event()


def listen() -> None:
    """SIGTERM to this process asks for a checkpoint instead of ending it. To be called in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())


def listen_when_alone() -> None:
    """The same where nobody else has claimed the signal: under torchrun; `mae run` has a handler of its own."""
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        listen()


class StoreSupervisor:
    """Reads, now and then, whether the store asks this generation to stop."""

    def __init__(self, attempt: Attempt, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempt, self.clock, self.asked_at = attempt, clock, -ASK_EVERY_S

    def should_stop(self) -> StopReason:
        """`asked`, `fenced` or nothing; a store that does not answer is asked again later, and training goes on."""
        now = self.clock()
        if now - self.asked_at < ASK_EVERY_S:
            return ""
        self.asked_at = now
        try:
            check_fence(self.attempt.root, self.attempt.generation)
            return "asked" if self.attempt.root.exists(stop_request_key(self.attempt.generation)) else ""
        except Fenced:
            return "fenced"
        except StorageError as error:
            log.warning("cannot see whether this run is asked to stop: %s", error)
            return ""


class Streak:
    """True once a question was answered with yes `length` times in a row; asked every `every_s` seconds at most."""

    def __init__(
        self, question: Callable[[], bool], *, every_s: float, length: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.question, self.every_s, self.length, self.clock = question, every_s, length, clock
        self.asked_at, self.yes = clock(), 0

    def __call__(self) -> bool:
        """The answer as it stands now."""
        now = self.clock()
        if now - self.asked_at >= self.every_s:
            self.asked_at = now
            self.yes = self.yes + 1 if self.question() else 0
        return self.yes >= self.length


class Supervision:
    """All reasons of one worker."""

    def __init__(self, store: StoreSupervisor | None, notices: Sequence[tuple[Callable[[], bool], StopReason]]) -> None:
        self.store, self.notices = store, notices

    def should_stop(self) -> StopReason:
        """The first reason there is."""
        told: StopReason = self.store.should_stop() if self.store else ""
        return told or next((reason for notice, reason in self.notices if notice()), "")


def supervise(attempt: Attempt, world: World) -> Supervision:
    """What this worker of the world is to look at."""
    notices: list[tuple[Callable[[], bool], StopReason]] = [(_terminated.is_set, "preempted")]
    if attempt.executor == "ray":
        notices.append((Streak(cluster.this_node_is_draining, every_s=DRAIN_EVERY_S, length=1), "preempted"))
        _, most = attempt.resources.worker_range
        if world.is_first and world.size < most:
            need = attempt.resources.per_worker
            grown = Streak(lambda: cluster.worker_capacity(need, of="free") > 0, every_s=GROW_EVERY_S, length=2)
            notices.append((grown, "resized"))
    return Supervision(StoreSupervisor(attempt) if world.is_first else None, notices)
