"""A rank that stands still: everyone's stacks are in the store, with their phases; a worker that is restarted ends itself."""

import contextlib
import time
from dataclasses import replace

from training_kit import StopAfter, Team, attempt_at, mae_spec, spoiled

from pipeline.data.loader import Batch
from pipeline.tracking import NullTracker
from pipeline.training.launch import stacks_left
from pipeline.training.loop import train
from pipeline.training.watchdog import EXIT_CODE
from pipeline.training.world import enter_world

LIMIT_S = 1


def asleep_at_step_4(step: int, rank: int, batch: Batch) -> Batch:
    if (step, rank) == (4, 1):
        time.sleep(3.5 * LIMIT_S)
    return batch


def train_slowly(spec, attempt):
    spec = replace(spec, placement=replace(spec.placement, watchdog_s=LIMIT_S))
    return train(spec, attempt, world=enter_world(), tracker=NullTracker(), supervisor=StopAfter(6)).global_step


def test_every_rank_leaves_its_stacks_and_the_sleeper_is_the_one_in_the_data_phase(teams, shards, tmp_path):
    """And since nobody would restart these, they wait, and go on when it wakes up."""
    attempt = attempt_at(tmp_path / "step")
    assert stacks_left(attempt) == ""
    assert teams(2).run(train_slowly, spoiled(mae_spec(shards, attempt), asleep_at_step_4), attempt) == [6, 6]
    waiting, sleeping = (attempt.store.read(f"stacks/rank-{rank:04d}.txt").decode() for rank in (0, 1))
    assert sleeping.startswith("rank 1 of 2 on ")
    assert "in phase data of step 4 for 1." in sleeping
    assert "asleep_at_step_4" in sleeping
    assert "in phase agree of step 4 for 1." in waiting
    assert "all_reduce" in waiting
    assert stacks_left(attempt).endswith("/step/g0001/stacks/. ")


def test_workers_that_somebody_restarts_end_themselves(shards, tmp_path):
    attempt = replace(attempt_at(tmp_path / "step"), executor="ray")
    team = Team(2, tmp_path)
    try:
        spec = spoiled(mae_spec(shards, attempt), asleep_at_step_4)
        with contextlib.suppress(EOFError, ConnectionError):
            team.outcomes(train_slowly, spec, attempt)
        for process in team.processes:
            process.join(60)
        assert [process.exitcode for process in team.processes] == [EXIT_CODE, EXIT_CODE]
    finally:
        team.close()
