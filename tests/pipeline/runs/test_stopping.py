"""Signals to a run, in this process and in small ones of their own."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.runs import stopping
from pipeline.runs.stopping import STOPPED, StopSignals

ASKING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def hangup_not_ignored():
    """Under nohup, pytest itself ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_asks_and_is_answered_with_what_it_waits_for(number, caplog):
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop, stop.during(lambda: "the oven cools down", lambda: asked.append(1)):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # an echo, as of `timeout`
        os.kill(os.getpid(), number)
        assert stop.requested
    assert asked == [1]
    said = [record.message for record in caplog.records]
    assert said == [f"asked to stop by {number.name}: the oven cools down. Ctrl-C again interrupts it without saving"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_answer_comes_at_once_while_the_main_thread_is_in_a_long_call(caplog):
    """Handlers do not run during one long call of C, as when a library connects; the answer is timed by when it was given."""
    with StopSignals() as stop, stop.during("waiting for the kettle"):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.time()
        ctypes.CDLL(None).usleep(400_000)
        time.sleep(0.4)  # in case the signal ended the call
    assert caplog.records[0].created - began < 0.35


def test_a_long_stop_is_spoken_of_again(caplog, monkeypatch):
    monkeypatch.setattr(stopping, "REMIND_S", 0.1)
    doing = ["the first part"]
    with StopSignals() as stop, stop.during(lambda: doing[0]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        doing[0] = "the second part"
        time.sleep(0.2)
    assert [record.message.partition(": ")[2].partition(".")[0] for record in caplog.records][:2] == [
        "the first part",
        "the second part",
    ]


@pytest.mark.parametrize(
    ("first", "second", "interrupts"),
    [
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGTERM, signal.SIGTERM, True),
        (signal.SIGHUP, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, False),  # a batch system that sends one after the other
        (signal.SIGHUP, signal.SIGHUP, False),
        (signal.SIGINT, signal.SIGHUP, False),  # the terminal is closed while the run saves
    ],
)
def test_only_one_who_insists_interrupts_the_save(first, second, interrupts, monkeypatch):
    monkeypatch.setattr(stopping, "ECHO_S", 0.0)
    interrupted = False
    try:
        with StopSignals() as stop, stop.during("x"):
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), second)
            time.sleep(0.01)
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted == interrupts


def test_a_request_is_passed_to_what_begins_after_it():
    asked = []
    with StopSignals() as stop:
        with stop.during("the first phase"):
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.during("the second phase", lambda: asked.append("second")):
            pass
    assert asked == ["second"]


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop, stop.during("x"):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_before_anything_has_begun_ends_the_process_at_once(number):
    call = f"""
import os, time
from pipeline.runs.stopping import StopSignals
with StopSignals():
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(5)
    except BaseException:  # as an import of an optional package might
        print("caught")
"""
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (STOPPED, "")
    assert done.stderr == f"mae: asked to stop by {number.name} before anything has begun\n"


SETTING_UP = """
import ctypes, os, signal, sys, threading, time
from pipeline.runs import stopping
stopping.ECHO_S = 0.1
stopping.SETUP_PATIENCE_S = stopping.CLEAN_UP_S = 0.4
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
with stopping.StopSignals() as stop:
    try:
        with stop.during("waiting for the kettle", setting_up="the kettle"):
            {waits}
    except KeyboardInterrupt:
        with stop.during("waiting for the lid"):
            print("lid closed", flush=True)
            sys.exit(stopping.STOPPED)
"""


@pytest.mark.parametrize(
    ("waits", "closed"),
    [
        ("time.sleep(20)", True),
        # a mutex of C that is locked twice waits forever, whatever signals come
        ("[ctypes.CDLL(None).pthread_mutex_lock(mutex) for mutex in [ctypes.create_string_buffer(64)] * 2]", False),
    ],
)
def test_a_stop_cuts_off_a_set_up_that_does_not_answer(waits, closed):
    """What waits in Python still closes its connections; what waits elsewhere is left behind."""
    call = [sys.executable, "-c", SETTING_UP.format(waits=waits)]
    began = time.monotonic()
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=15)
    assert (done.returncode, done.stdout) == (STOPPED, "lid closed\n" if closed else ""), done.stderr
    assert "asked to stop by SIGTERM: waiting for the kettle" in done.stderr
    assert "the kettle has not answered within" in done.stderr
    assert time.monotonic() - began < 10


def test_a_set_up_that_answers_is_not_cut_off(monkeypatch):
    monkeypatch.setattr(stopping, "SETUP_PATIENCE_S", 0.2)
    with StopSignals() as stop, stop.during("the whole"):
        with stop.during("the set-up", setting_up="the kettle"):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # what came after it is not limited


def test_a_closed_terminal_is_let_go_of():
    ours, theirs = os.openpty()
    call = """
import os, signal, sys, time
from pipeline.runs.stopping import StopSignals
with StopSignals() as stop, stop.during("x"):
    os.write(int(sys.argv[1]), b"ready")
    while not stop.requested:
        time.sleep(0.01)
    print("to nobody", file=sys.stderr, flush=True)
    os.write(int(sys.argv[1]), b"done")
"""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", call, str(writing)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        pass_fds=[writing],
        start_new_session=True,
    )
    os.close(theirs)
    assert os.read(reading, 9) == b"ready"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 0
    assert os.read(reading, 9) == b"done"
    os.close(reading)
    os.close(writing)


def test_the_wall_clock_asks_once_and_in_good_time(caplog):
    asked, began = [], time.monotonic()
    caplog.set_level(logging.WARNING)
    with StopSignals() as stop, stop.during("it saves", lambda: asked.append(time.monotonic() - began)):
        stop.limit(seconds=0.2, reason="wall_clock_s=0.5 is nearly over")
        time.sleep(0.6)
    assert len(asked) == 1
    assert 0.2 <= asked[0] < 0.5
    assert "wall_clock_s=0.5 is nearly over: it saves" in caplog.text
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


UNREAD = """
import sys
from pipeline.runs.stopping import StopSignals
with StopSignals():
    sys.stdin.readline()
    for stream in (sys.stdout, sys.stderr):
        print("nobody reads this", file=stream, flush=True)
sys.exit(3)
"""


def test_a_reader_that_went_away_leaves_the_exit_code():
    """Ctrl-C at `mae run | tee log` ends tee as well."""
    reading, writing = os.pipe()
    call = [sys.executable, "-c", UNREAD]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)
    process.communicate(b"\n", timeout=20)
    assert process.returncode == 3


ENDING = """
import atexit, os, signal, sys
from jobs import cli
atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
cli.app = lambda: sys.exit(3)
cli.main()
"""


def test_a_signal_while_the_interpreter_ends_leaves_the_exit_code():
    """A second Ctrl-C often comes when all is saved."""
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (3, "")
