"""Why a worker should stop, and whether a training whose workers failed is restarted: decisions, without a cluster."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict

import pytest
import torch
from training_kit import TOTAL_STEPS, Team, attempt_at, mae_spec, napping, resources, spoiled

from pipeline.cluster.resources import Resources
from pipeline.graph.receipts import claim
from pipeline.graph.runner import stop_request_key
from pipeline.tracking import NullTracker
from pipeline.training import launch
from pipeline.training.checkpoints import format as checkpoints
from pipeline.training.health import stop_reasons
from pipeline.training.health.failures import FailureStreak, classify, reason_to_give_up
from pipeline.training.health.stop_reasons import (
    REASONS,
    CombinedStopSignal,
    DebouncedCheck,
    PolledStopSignal,
    StoreStopSignal,
)
from pipeline.training.launch import RESULT
from pipeline.training.loop.loop import train
from pipeline.training.world import Unanswered, enter_world

# --- reasons -----------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_debounced_check_is_made_at_intervals_and_must_hold_several_times_in_a_row():
    clock, answers, checked_at = Clock(), iter([True, False, True, True]), []
    check = DebouncedCheck(lambda: checked_at.append(clock.now) or next(answers), every_s=10, length=2, clock=clock)
    held = []
    for clock.now in range(1, 45):
        held.append(check())
    assert checked_at == [10, 20, 30, 40]
    assert held.index(True) == 39


def test_a_higher_generation_and_a_request_come_before_a_notice(tmp_path):
    attempt = attempt_at(tmp_path)
    clock = Clock()
    stop_signal = CombinedStopSignal(StoreStopSignal(attempt, clock), [(lambda: clock.now > 0, "preempted")])
    assert stop_signal.stop_reason() == ""
    clock.now += 0.5
    assert stop_signal.stop_reason() == "preempted"
    attempt.root.create(stop_request_key(1), b"{}")
    clock.now += 1
    assert stop_signal.stop_reason() == "asked"
    claim(attempt.root, continues="")
    clock.now += 1
    assert stop_signal.stop_reason() == "fenced"


class Answers:
    """Answers one after the other, then the last one for ever; an exception is raised, and an event is waited for."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def stop_reason(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, threading.Event):
            answer.wait(60)
            return ""
        if isinstance(answer, Exception):
            raise answer
        return answer


def eventually(question, expected):
    for _ in range(200):
        if question() == expected:
            return
        time.sleep(0.05)
    assert question() == expected


def test_the_thread_s_last_answer_is_read_without_asking(monkeypatch, caplog):
    monkeypatch.setattr(stop_reasons, "_TICK_S", 0.01)
    hangs = threading.Event()
    with PolledStopSignal(Answers("resized", KeyError("no such actor"), "asked", hangs)) as stop_signal:
        eventually(stop_signal.stop_reason, "asked")
        began = time.monotonic()
        assert [stop_signal.stop_reason() for _ in range(3)] == ["asked"] * 3  # the source hangs by now
        assert time.monotonic() - began < 1
    assert "cannot see whether this worker should stop: 'no such actor'" in caplog.text
    hangs.set()


@pytest.mark.parametrize(("answer", "reason"), [("", "preempted"), ("resized", "preempted"), ("asked", "asked")])
def test_sigterm_is_heard_at_once_and_takes_its_place_among_the_reasons(monkeypatch, answer, reason):
    terminated = threading.Event()
    monkeypatch.setattr(stop_reasons, "_terminated", terminated)
    with PolledStopSignal(Answers(answer)) as stop_signal:
        assert stop_signal.stop_reason() == answer
        terminated.set()
        assert stop_signal.stop_reason() == reason
    assert REASONS.index("asked") < REASONS.index("preempted") < REASONS.index("resized")


def train_while_the_store_hangs(spec, attempt):
    """Run a worker whose second question about its generation is never answered; return how many were asked."""
    asked, over, check_fence = [], threading.Event(), stop_reasons.check_fence

    def hang(root, generation):
        asked.append(generation)
        if len(asked) > 1:
            over.wait(120)
        check_fence(root, generation)

    stop_reasons.check_fence, stop_reasons.STORE_POLL_S = hang, 0.0
    try:
        launch.run_worker(spec, attempt)
    finally:
        stop_reasons.check_fence, stop_reasons.STORE_POLL_S = check_fence, 1.0
        over.set()
    return len(asked)


def test_steps_go_on_while_the_store_does_not_answer(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path)
    spec = napping(mae_spec(shards, attempt), 0.05)  # time for the question that hangs
    assert teams(1).run(train_while_the_store_hangs, spec, attempt, timeout_s=100) == [2]
    answer = json.loads(attempt.store.read(RESULT))
    assert (answer["global_step"], answer["stopped"]) == (TOTAL_STEPS, "")


class ReasonAt:
    """Gives its reason to one rank, at one step."""

    def __init__(self, rank, step, reason):
        self.rank, self.step, self.reason, self.asked = rank, step, reason, 0

    def stop_reason(self):
        self.asked += 1
        mine = torch.distributed.get_rank() == self.rank
        return self.reason if mine and self.asked > self.step else ""


def train_with_reasons(spec, attempt, *reasons):
    stop_signal = ReasonAt(*next(one for one in reasons if one[0] == torch.distributed.get_rank()))
    return asdict(train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop_signal))


def test_any_rank_stops_all_at_one_step_and_precedence_decides_the_reason(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path, checkpoint_every_steps=100)
    reasons = [(0, 4, "resized"), (1, 4, "preempted")]
    results = teams(2).run(train_with_reasons, mae_spec(shards, attempt), attempt, *reasons)
    assert [(one["global_step"], one["stopped"]) for one in results] == [(4, "preempted")] * 2
    assert checkpoints.resume_point(attempt.root) == "g0001/checkpoints/step-00000004"


def work_terminated(spec, attempt):
    """Send SIGTERM to this process in its third step."""

    def spoil(step, rank, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    launch.run_worker(spoiled(spec, spoil), attempt)


def test_sigterm_to_a_process_without_a_handler_saves_and_stops(shards, tmp_path):
    """torchrun's workers: the loop runs in the main thread."""
    attempt = attempt_at(tmp_path, checkpoint_every_steps=100)
    team = Team(1, tmp_path)  # a team of its own, because the signal stays set
    team.run(work_terminated, mae_spec(shards, attempt), attempt)
    team.close()
    answer = json.loads(attempt.store.read(RESULT))
    assert answer["stopped"] == "preempted"
    assert 1 <= answer["global_step"] <= 3  # its inputs are prepared a step ahead
    assert attempt.root.exists(f"{answer['checkpoint_key']}/manifest.json")


# --- failures ----------------------------------------------------------------------------------------------------------------


class WorkerDied(Exception):
    """The error in which Ray Train wraps the death of a worker."""

    def __init__(self, *, preempted):
        self.health_check_failure = RuntimeError()
        self.health_check_failure.preempted = preempted


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ([RuntimeError("Connection closed by peer")], "infrastructure"),
        ([ConnectionResetError()], "infrastructure"),
        ([Unanswered("rank 0 of 2 waited"), RuntimeError()], "infrastructure"),
        ([WorkerDied(preempted=False), RuntimeError()], "infrastructure"),
        ([RuntimeError(), WorkerDied(preempted=True)], "preempted"),
        ([RuntimeError(), torch.OutOfMemoryError()], "memory"),
        ([RuntimeError(), KeyError("x")], "user"),
    ],
)
def test_the_class_of_a_failure_comes_from_the_worker_that_met_it(errors, kind):
    assert classify(errors) == kind


def test_a_training_that_makes_progress_is_never_given_up():
    failures, given = FailureStreak(), resources(max_failures=2)
    reasons = [
        reason_to_give_up("infrastructure", failures.count_with(f"step-{number // 2}"), given) for number in range(20)
    ]
    assert set(reasons) == {""}
    assert [reason_to_give_up("infrastructure", failures.count_with("step-9"), given) != "" for _ in range(2)] == [
        True,
        True,
    ]
    assert reason_to_give_up("infrastructure", 3, given) == (
        "the workers failed 3 times without a new checkpoint, more often than max_failures=2 allows"
    )


def test_a_failure_that_would_repeat_is_not_retried():
    assert "lower resources.micro_batch" in reason_to_give_up("memory", 1, resources(max_failures=9))
    assert "would fail again" in reason_to_give_up("user", 1, resources(max_failures=9))
    assert reason_to_give_up("preempted", 1, resources(max_preemptions=0)).endswith(
        "more often than max_preemptions=0 allows"
    )


def test_a_range_of_workers_or_a_number():
    assert Resources(workers=3).worker_range == (3, 3)
    assert Resources(workers=[1, 4]).worker_range == (1, 4)
