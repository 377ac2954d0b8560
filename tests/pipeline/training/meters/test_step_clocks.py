"""Times of steps by a GPU's marks, without a GPU: a stream that is told when it does what."""

import time
from contextlib import nullcontext, suppress

import pytest
import torch

from pipeline.training.meters import step_clocks
from pipeline.training.meters.step_clocks import GpuClock, PhaseClock

MARKS = ("begin", "copied", "passed", "judged", "end")


class Stream:
    """Passes its events at given seconds; one that is not reached yet has no time."""

    def __init__(self, *passed_at):
        self.passed_at, self.recorded = list(passed_at), 0

    def event(self):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream, self.number = stream, None

    def record(self):
        self.number = self.stream.recorded
        self.stream.recorded += 1

    @property
    def at(self):
        return self.stream.passed_at[self.number]

    def query(self):
        return self.at is not None

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.fixture
def host(monkeypatch):
    """The host's clock, which the test sets."""
    clock = [0.0]
    monkeypatch.setattr(step_clocks.time, "perf_counter", lambda: clock[0])
    return clock


def take_step(clock, host, *times):
    for name, host[0] in zip(MARKS, times, strict=True):
        clock.mark(name)


def test_a_gpu_that_is_behind_its_host_is_busy_and_one_that_waits_for_it_is_starved(host):
    stream = Stream(0, 1, 9, 10, 11, 14, 14, 18, 19, 20)
    clock = GpuClock(torch.device("cpu"), stream.event)
    take_step(clock, host, 0, 0.5, 2, 10, 10.5)  # queued by 2; the GPU is done at 9, and is judged at 10
    take_step(clock, host, 14, 14, 18, 19, 19.5)  # the GPU passes each mark as soon as it is queued
    times = clock.take()
    assert times == pytest.approx((8 + 4, 1 + 0, 1 + 1, 1 + 3 + 1, 4))
    assert times.all_s == 20
    assert (times.busy, times.host_bound) == (14 / 20, 9 / 20)
    assert clock.take() is None


def test_a_step_that_is_still_in_the_queue_counts_later(host):
    stream = Stream(0, 1, 3, 4, 5, 6, 7, 9, 10, None)
    clock = GpuClock(torch.device("cpu"), stream.event)
    take_step(clock, host, 0, 0, 0, 4, 4)
    take_step(clock, host, 6, 6, 6, 10, 10)
    assert clock.take().all_s == 5
    assert clock.take() is None
    stream.passed_at[-1] = 11
    assert clock.take().all_s == 6  # with the second from 5 to 6


def test_without_a_gpu_nothing_is_marked():
    clock = GpuClock(torch.device("cpu"))
    for name in MARKS:
        clock.mark(name)
    assert clock.take() is None


def test_a_step_that_failed_half_way_is_forgotten(host):
    clock = GpuClock(torch.device("cpu"), Stream(*range(20)).event)
    clock.mark("begin")
    clock.mark("copied")
    take_step(clock, host, 0, 0, 0, 1, 1)
    assert clock.take().all_s == 4


def test_phases_are_watched_and_added_up(host):
    entered = []
    phase = PhaseClock(lambda name: entered.append(name) or nullcontext())
    for seconds in (2.0, 3.0):
        with phase("data"):
            host[0] += seconds
        with phase("step"):
            host[0] += 1.0
    with suppress(KeyError), phase("agree"):
        host[0] += 0.5
        raise KeyError
    assert entered == ["data", "step"] * 2 + ["agree"]
    assert phase.take() == {"data": 5.0, "step": 2.0, "agree": 0.5}
    assert phase.take() == {}


def test_marks_and_phases_cost_a_step_less_than_a_millisecond():
    clock, phase = GpuClock(torch.device("cpu"), Stream(*range(10_000)).event), PhaseClock(lambda _: nullcontext())
    began = time.perf_counter()
    for _ in range(100):
        for name in MARKS:
            clock.mark(name)
            with phase("step"):
                pass
    assert time.perf_counter() - began < 0.1
