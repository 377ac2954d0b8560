"""Signals to a run: the first lets it save and stop, and is answered at once with what that waits for; a second interrupts it.

SIGINT, SIGTERM and SIGHUP ask a run to stop, and so does SIGALRM, which is its time limit. Python runs signal handlers on the main
thread between two instructions, which can be seconds away: in a call of Ray, SQLite or torch. So handlers only act, and a thread
speaks: it reads the signals' numbers from a pipe, into which the interpreter writes them the moment they arrive.
This module imports nothing heavy, so that signals are handled before a command spends seconds on importing torch.
Units: seconds."""

import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TextIO, cast

log = logging.getLogger(__name__)

ECHO_S = 1.0
"""Later signals this soon after the first are its echoes: `timeout` signals its child and then the group that the child is in, and
a shell passes on the SIGHUP that the kernel has sent already."""
REMIND_S = 10.0
"""Between two lines about what a stop still waits for."""
SETUP_PATIENCE_S = 15.0
"""How long a stop waits for MLflow or Ray to be set up. No step has begun then, so nothing is lost by cutting it off."""
CLEAN_UP_S = 10.0
"""How long what was cut off has for closing its connections, before the process ends without that."""
STOPPED = 3
"""Exit code of a run that was stopped and can be continued."""
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


class StopSignals:
    """Handles the signals to this process while it is entered. Enter it on the main thread.

    Before the first `during`, nothing has begun, and a signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._reason_of_alarm = "the time limit is near"
        self._first: int | None = None
        self._first_at = 0.0
        self._waiting_for: str | Callable[[], str] | None = None
        self._setting_up = ""
        self._act: Callable[[], None] = _do_nothing
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._outputs = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (cast("TextIO", LastingOutput(stream)) for stream in self._outputs)
        self._reading, self._writing = os.pipe()
        # set_wakeup_fd accepts no blocking descriptor
        os.set_blocking(self._writing, False)
        # a full pipe holds more signals than the speaker has use for, so no warning
        self._previous_fd = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._speaker = threading.Thread(target=self._speak, name="stop-signals", daemon=True)
        self._speaker.start()
        for number in _ASKING:
            self._previous[number] = signal.getsignal(number)
            if number == signal.SIGHUP and self._previous[number] is signal.SIG_IGN:  # nohup: outlive the terminal
                continue
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # before the handlers go: SIGALRM would then end the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # before the byte below: from here on no signal can come after it
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._writing, b"\0")  # no signal has this number: the speaker ends, once it has said what came before
        self._speaker.join()
        os.close(self._reading)
        os.close(self._writing)
        sys.stdout, sys.stderr = self._outputs

    @contextmanager
    def during(
        self, waiting_for: str | Callable[[], str], act: Callable[[], None] | None = None, *, setting_up: str = ""
    ) -> Iterator[None]:
        """Name what a stop waits for while the block runs. The first signal calls `act`; so does entering after it.

        `setting_up` names what the block connects to before any step has begun: a stop cuts it off after SETUP_PATIENCE_S."""
        before, act_before = self._waiting_for, self._act
        self._waiting_for, self._setting_up = waiting_for, setting_up
        self._act = act or _do_nothing
        try:
            if self.requested:
                self._act()
            yield
        finally:
            # never back to None: from the first block on, something has begun
            self._waiting_for, self._act, self._setting_up = before or self._waiting_for, act_before, ""

    def limit(self, *, seconds: float, reason: str) -> None:
        """Ask for a stop after so many seconds, for a reason that is then said."""
        self._reason_of_alarm = reason
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _handle(self, number: int, *_: object) -> None:
        if number == signal.SIGHUP:
            _let_go_of_unread_outputs()
        now = time.monotonic()
        if self._first is None:
            self._first, self._first_at, self.requested = number, now, True
            signal.setitimer(signal.ITIMER_REAL, 0)  # the time limit has nothing to add
            if self._waiting_for is None:
                with suppress(OSError):
                    # not sys.stderr: the code that was interrupted may hold its lock
                    os.write(2, f"mae: {self._why(number)} before anything has begun\n".encode())
                os._exit(STOPPED)  # in the middle of an import, an exception could be taken for a missing package
            self._act()
        elif self._insists(number, now):
            # the next signal kills, in case even the interruption hangs
            for ordinary in (signal.SIGINT, signal.SIGTERM):
                signal.signal(ordinary, signal.SIG_DFL)
            raise KeyboardInterrupt

    def _insists(self, number: int, now: float) -> bool:
        """Whether this later signal means: do not even save. Ctrl-C does, and the first signal again, but not a batch system's
        SIGTERM after its SIGINT, nor a terminal that is closed while the run saves."""
        if now - self._first_at < ECHO_S or number == signal.SIGHUP:
            return False
        return number in {signal.SIGINT, self._first}

    def _why(self, number: int) -> str:
        if number == signal.SIGALRM:
            return self._reason_of_alarm
        return f"asked to stop by {signal.Signals(number).name}"

    def _speak(self) -> None:
        """Life of the speaker: one line when the first signal comes, and one every REMIND_S for as long as the run goes on."""
        asked_at = said_at = cut_off_at = math.inf
        while True:
            pause = None if asked_at == math.inf else min(REMIND_S, SETUP_PATIENCE_S, CLEAN_UP_S, 1.0)
            readable, _, _ = select.select([self._reading], [], [], pause)
            now = time.monotonic()
            for number in os.read(self._reading, 64) if readable else b"":
                if number == 0:
                    return
                if number in _ASKING and asked_at == math.inf and (what := self._waiting()):
                    asked_at = said_at = now
                    log.warning("%s: %s. Ctrl-C again interrupts it without saving", self._why(number), what)
            if now - said_at >= REMIND_S and (what := self._waiting()):
                said_at = now
                log.warning("still stopping after %.0f s: %s", now - asked_at, what)
            if self._setting_up and cut_off_at == math.inf and now - asked_at >= SETUP_PATIENCE_S:
                cut_off_at = now
                log.warning("%s has not answered within %.0f s: cut off", self._setting_up, now - asked_at)
                os.kill(
                    os.getpid(), signal.SIGINT
                )  # as a second Ctrl-C does: what waits in Python still closes its connections
            if now - cut_off_at >= CLEAN_UP_S:
                log.warning("it does not end either: the process ends without it")
                os._exit(STOPPED)

    def _waiting(self) -> str:
        """What the run waits for; an empty string where nothing has begun."""
        now = self._waiting_for
        return now() if callable(now) else now or ""


def _do_nothing() -> None:
    """Let what runs come to its end."""


class LastingOutput:
    """A stream whose reader may go away: what nobody can read any more is dropped, and the run goes on to save.

    Each write to a closed terminal raises OSError, and so does one to a pipe after a Ctrl-C that has also ended `tee`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or drop it."""
        try:
            return self.stream.write(text)
        except OSError:
            _let_go_of_unread_outputs()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        try:
            self.stream.flush()
        except OSError:
            _let_go_of_unread_outputs()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _let_go_of_unread_outputs() -> None:
    """Lead standard output and error into nothing where the terminal is gone or nobody reads the pipe."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # hang-ups and missing readers are reported in any case
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            os.dup2(nothing, number)
    os.close(nothing)
