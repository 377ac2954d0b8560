"""Periodic actions: when they are due, in which order they run, and that stops, resumes and rollbacks shift none of them."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from guard_kit import TOTAL_STEPS as GUARDED_STEPS
from guard_kit import spoilt_spec
from training_kit import TOTAL_STEPS, StopAfter, attempt_at, mae_spec

from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.guard import GuardConfig
from pipeline.training.loop import loop
from pipeline.training.loop.actions import PeriodicAction, run_due
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import enter_world


def due_steps(action: PeriodicAction, moment: str, total_steps: int) -> list[int]:
    return [step for step in range(total_steps + 1) if action.is_due(moment, step, total_steps)]


def test_an_action_is_due_at_multiples_of_its_interval_and_at_the_end_if_it_says_so():
    action = PeriodicAction(phase="log", every_steps=4, act=print)
    assert due_steps(action, "after_step", 10) == [0, 4, 8]
    assert due_steps(replace(action, also_at_end=True), "after_step", 10) == [0, 4, 8, 10]
    assert due_steps(replace(action, also_at_end=True), "after_step", 8) == [0, 4, 8]  # once, not twice
    assert due_steps(action, "before_step", 10) == []


def test_due_actions_run_in_the_order_of_the_list_each_in_its_own_phase():
    events: list[Any] = []

    @contextmanager
    def phase(name):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    def action(name, every_steps, moment="after_step"):
        return PeriodicAction(
            phase=name, every_steps=every_steps, moment=moment, act=lambda at: events.append((name, at.global_step))
        )

    actions = [action("profile", 1, "before_step"), action("log", 2), action("save", 5), action("evaluate", 3)]
    run_due(actions, "after_step", SimpleNamespace(global_step=6), total_steps=20, phase=phase)
    assert events == ["enter log", ("log", 6), "leave log", "enter evaluate", ("evaluate", 6), "leave evaluate"]


def train_recorded(spec: TrainSpec, attempt: Attempt, stop_signal: StopAfter) -> list[tuple[str, int]]:
    """Runs the loop with one more action in its list; returns the phase and step of everything that was done."""
    world, calls = enter_world(), []

    def recorded(action: PeriodicAction) -> PeriodicAction:
        def act(position):
            calls.append((action.phase, position.global_step))
            action.act(position)

        return replace(action, act=act)

    def evaluate(position):
        assert world.all_gather(position.global_step) == [position.global_step] * world.size  # a collective may be used

    one_more = PeriodicAction(phase="evaluate", every_steps=4, also_at_end=True, act=evaluate)
    plain = loop.periodic_actions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "periodic_actions", lambda *given: [recorded(one) for one in (*plain(*given), one_more)])
        loop.train(spec, attempt, world=world, tracker=NullTracker(), stop_signal=stop_signal)
    return calls


def steps_of(calls: list[tuple[str, int]], phase: str) -> list[int]:
    return [step for name, step in calls if name == phase]


def test_the_loop_runs_what_is_in_the_list_on_all_ranks_and_logs_before_it_saves(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", log_every_steps=2, checkpoint_every_steps=4)
    calls, others = teams(2).run(train_recorded, mae_spec(shards, attempt), attempt, StopAfter(99))
    assert calls == others
    assert steps_of(calls, "profile") == list(range(TOTAL_STEPS))  # before each step, so never after the last one
    assert steps_of(calls, "log") == [2, 4, 6, 8, 10]
    assert steps_of(calls, "save") == [4, 8]  # the one at the end is the loop's own, wherever it ends
    assert steps_of(calls, "evaluate") == [4, 8, 10]
    assert [name for name, step in calls if step == 4] == ["log", "save", "evaluate", "profile"]
    for step in (4, 8, 10):
        with open_checkpoint(attempt.root, f"g0001/checkpoints/step-{step:08d}") as checkpoint:
            assert checkpoint.history()[-1]["step"] == step


def test_stops_and_resumes_shift_no_action(teams, shards, tmp_path):
    """Stopped at 3, which no interval divides, and at 8, where everything is due: neither moves or repeats an action."""
    options = {"log_every_steps": 2, "checkpoint_every_steps": 4}
    straight = attempt_at(tmp_path / "straight", **options)
    expected = teams(1).run(train_recorded, mae_spec(shards, straight), straight, StopAfter(99))[0]
    calls = []
    for stop_after in (3, 5, 99):
        attempt = attempt_at(tmp_path / "broken", **options)
        calls += teams(1).run(train_recorded, mae_spec(shards, attempt), attempt, StopAfter(stop_after))[0]
    # "before" a step is also the moment at which a stop is agreed on, so it comes once more after a resume
    assert steps_of(calls, "profile") == [*range(4), *range(3, 9), *range(8, TOTAL_STEPS)]
    assert [one for one in calls if one[0] != "profile"] == [one for one in expected if one[0] != "profile"]


def test_a_roll_back_has_no_after_and_what_follows_goes_by_the_new_position(teams, shards, tmp_path):
    """Steps 8, 9 and 10 are bad: back to the checkpoint at 3, on to 5, and from there past the skipped range to 11."""
    attempt = attempt_at(tmp_path / "step")
    guard = GuardConfig(roll_back_steps=3, lost_share=0.5)
    spec = spoilt_spec(shards, attempt, dict.fromkeys((8, 9, 10), math.nan), guard)
    calls, others = teams(2).run(train_recorded, spec, attempt, StopAfter(99))
    assert calls == others
    assert steps_of(calls, "profile") == [*range(11), 3, 4, *range(11, GUARDED_STEPS)]
    assert steps_of(calls, "log") == [*range(1, 11), 4, *range(11, GUARDED_STEPS + 1)]
    assert steps_of(calls, "save") == [3, 6, 9, 12, 15, 18]
    assert steps_of(calls, "evaluate") == [4, 8, 4, 12, 16, GUARDED_STEPS]
