"""When training hangs: which rank, in which phase of which step, with the stack of every thread, written where people can read it.

One thread per rank watches how long the rank's own phase lasts. No rank asks another: when one hangs, all others come to wait
for it in a collective, so every rank's deadline passes, and a rank that could not answer need not. The rank that hangs is the
one whose phase does not wait for others. After twice the limit, a worker that would be restarted (by Ray Train, `max_failures`
times) ends itself, as the waiting ones would at the collective's own timeout. Where nothing restarts workers, the decision is
left to a person. A phase that may compile gets `COMPILE_ALLOWANCE_S` more, and so do the rest of that step's phases, in which this
rank may wait for others that compile.
Nothing is watched between phases. A Python thread needs the interpreter lock, so a C call that holds it is not seen; torch
releases it while it waits for a GPU or for other ranks. A kernel that hangs is seen in phase `check`, where the host reads
what the passes have computed, or in an earlier one if the GPU's queue is full.
Units: seconds."""

import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple, Self

from pipeline.errors import StorageError
from pipeline.storage import Store
from pipeline.training.meters.step_clocks import Phase
from pipeline.training.world import World

FOLDER = "stacks/"
EXIT_CODE = 75
"""Of a worker that ended itself because it hung."""

COMPILE_ALLOWANCE_S = 600.0
"""What compiling may take: some 15 s for the blocks of a model on an idle machine, many times that on a crowded one."""

MEANINGS: Mapping[Phase, str] = {
    "data": "waiting for its feed",
    "agree": "waiting for the other ranks",
    "check": "waiting for its GPU to finish the passes; a kernel that hangs, or a reduction that another rank has not joined",
}
"""Of the phases in which a rank waits for something outside its own thread."""

log = logging.getLogger(__name__)


def stack_dump_hint(store: Store) -> str:
    """Return a sentence that says where this generation's workers left their stacks, or an empty string if none did."""
    found = any(True for _ in store.list(FOLDER))
    return f"Stacks of the workers that hung: {store.uri}/{FOLDER}. " if found else ""


class _CurrentPhase(NamedTuple):
    name: Phase
    entered_at: float


class Watchdog:
    """Watches the phases of one rank; a context manager that ends its thread."""

    def __init__(self, store: Store, world: World, *, limit_s: float, on_timeout: Literal["wait", "exit"]) -> None:
        """`store` is the attempt's. `on_timeout` is what happens at twice the limit."""
        self.store, self.world, self.limit_s, self.on_timeout = store, world, limit_s, on_timeout
        self.step = 0  # written by the loop, for the report
        # Written by the loop, read by the thread. One reference is swapped at a time, which needs no lock in Python.
        self._current: _CurrentPhase | None = None
        # A rank's share of the global batch is always the same, so all ranks compile in the same step, their first; all meet at
        # its end. But one may be done, or have one size fewer, while another still compiles.
        self._compiled_in: int | None = None
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
        """Watch the body: it must not last longer than the limit. Phases do not nest."""
        if name == "compile":
            self._compiled_in = self.step
        self._current = _CurrentPhase(name, time.monotonic())
        try:
            yield
        finally:
            self._current = None

    def _watch(self) -> None:
        reported: _CurrentPhase | None = None
        while not self._ended.wait(min(1.0, self.limit_s / 4)):
            current = self._current
            if current is None:
                continue
            waited = time.monotonic() - current.entered_at
            allowance = COMPILE_ALLOWANCE_S if self.step == self._compiled_in else 0.0
            if waited < self.limit_s + allowance:
                continue
            # By identity: each entry into a phase makes a new tuple and is reported once.
            if reported is not current:
                reported = current
                self._report(current.name, waited)
            if waited >= 2 * self.limit_s + allowance and self.on_timeout == "exit":
                log.critical(
                    "rank %d: still in phase %s after %.0f s: this worker ends itself",
                    self.world.rank,
                    current.name,
                    waited,
                )
                logging.shutdown()  # os._exit flushes nothing
                sys.stderr.flush()
                os._exit(EXIT_CODE)  # sys.exit would end this thread only; the main thread is the one that hangs

    def _report(self, phase: Phase, waited: float) -> None:
        """Write every stack of this rank to the attempt's directory, or to the log if the store refuses."""
        meaning = f" ({MEANINGS[phase]})" if phase in MEANINGS else ""
        head = (
            f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()}, process {os.getpid()}: in phase {phase} of "
            f"step {self.step} for {waited:.1f} s, resources.watchdog_s={self.limit_s:g}{meaning}"
        )
        with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to a file descriptor, not to a stream
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
