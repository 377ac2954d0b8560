"""When training stands still: which rank, in which phase of which step, and every thread's stack, written where one can read it.

A thread a rank watches how long its own phase lasts. No rank asks another: when one stands still all others come to wait for it in
a collective, so that every rank's deadline passes, and a rank that could not answer need not. The one that hangs is the one whose
phase is not a waiting one. After twice the limit a worker that somebody restarts (Ray Train, `max_failures` times) ends itself, as
the waiting ones would at the collective's own timeout; where nobody does, it is left to a person.
Nothing is watched between phases. A thread of Python's needs the interpreter: a C call that keeps it is not seen.
Units: seconds."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Self

from pipeline.errors import StorageError
from pipeline.storage import Store
from pipeline.training.world import World

FOLDER = "stacks/"
EXIT_CODE = 75
"""Of a worker that ended itself because it stood still."""

Phase = Literal["data", "agree", "forward", "backward", "check", "step", "log", "save"]

log = logging.getLogger(__name__)


def stacks_left(store: Store) -> str:
    """Where the workers of this generation left what they were at, in a sentence; empty: they had no reason to."""
    found = any(True for _ in store.list(FOLDER))
    return f"What they were at when they stood still: {store.uri}/{FOLDER}. " if found else ""


class _Entered(NamedTuple):
    phase: Phase
    at: float


class Watchdog:
    """Watches the phases of one rank; a context manager that ends its thread."""

    def __init__(self, store: Store, world: World, *, limit_s: float, then: Literal["wait", "exit"]) -> None:
        """`store`: of the attempt. `then`: what follows at twice the limit."""
        self.store, self.world, self.limit_s, self.then = store, world, limit_s, then
        self.step = 0
        self._now: _Entered | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What is inside must not last longer than the limit."""
        self._now = _Entered(name, time.monotonic())
        try:
            yield
        finally:
            self._now = None

    def _watch(self) -> None:
        told: _Entered | None = None
        while not self._ended.wait(min(1.0, self.limit_s / 4)):
            now = self._now
            waited = time.monotonic() - now.at if now else 0.0
            if now is None or waited < self.limit_s:
                continue
            if told is not now:
                told = now
                self._tell(now.phase, waited)
            if waited >= 2 * self.limit_s and self.then == "exit":
                log.critical(
                    "rank %d: still in phase %s after %.0f s: this worker ends itself",
                    self.world.rank,
                    now.phase,
                    waited,
                )
                logging.shutdown()
                sys.stderr.flush()
                os._exit(EXIT_CODE)

    def _tell(self, phase: Phase, waited: float) -> None:
        """Every stack of this rank, into the attempt and into the log."""
        head = (
            f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()}, process {os.getpid()}: in phase {phase} of "
            f"step {self.step} for {waited:.1f} s, resources.watchdog_s={self.limit_s:g}"
        )
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        key = f"{FOLDER}rank-{self.world.rank:04d}.txt"
        try:
            self.store.write(key, f"{head}\n\n{stacks}".encode())
        except StorageError as error:
            log.critical("%s. Its stacks cannot be stored (%s):\n%s", head, error, stacks)
        else:
            log.critical("%s. Its stacks: %s/%s", head, self.store.uri, key)
