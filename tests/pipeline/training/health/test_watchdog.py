"""A rank that hangs: the stacks of all ranks are in the store, with their phases; a worker that is restarted ends itself."""

import subprocess
import sys
import time
from dataclasses import replace

from training_kit import StopAfter, attempt_at, mae_spec, spoiled

from pipeline.data.feed.loader import Batch
from pipeline.tracking import NullTracker
from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.health.watchdog import EXIT_CODE, stack_dump_hint
from pipeline.training.loop.loop import train
from pipeline.training.world import enter_world

LIMIT_S = 1


def asleep_at_step_4(step: int, rank: int, batch: Batch) -> Batch:
    if (step, rank) == (4, 1):
        time.sleep(3.5 * LIMIT_S)
    return batch


def train_slowly(spec, attempt):
    spec = replace(spec, resources=spec.resources.model_copy(update={"watchdog_s": LIMIT_S}))
    return train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=StopAfter(6)).global_step


def test_every_rank_leaves_its_stacks_and_the_sleeper_is_the_one_in_the_data_phase(teams, shards, tmp_path):
    """Nothing would restart these workers, so they wait, and go on when the sleeper wakes up."""
    attempt = attempt_at(tmp_path / "step")
    assert stack_dump_hint(attempt.store) == ""
    assert teams(2).run(train_slowly, spoiled(mae_spec(shards, attempt), asleep_at_step_4), attempt) == [6, 6]
    waiting, sleeping = (attempt.store.read(f"stacks/rank-{rank:04d}.txt").decode() for rank in (0, 1))
    assert sleeping.startswith("rank 1 of 2 on ")
    assert "in phase data of step 4 for 1." in sleeping
    assert "asleep_at_step_4" in sleeping
    assert "in phase agree of step 4 for 1." in waiting
    assert "all_reduce" in waiting
    assert stack_dump_hint(attempt.store).endswith("/step/g0001/stacks/. ")


def train_with_a_kernel_that_hangs(spec, attempt):
    """Train; at its fourth step, rank 1 waits for what its GPU has computed."""
    plain, calls = Engine.measured, []

    def measured(engine):
        calls.append(engine)
        if (engine.world.rank, len(calls)) == (1, 4):
            time.sleep(3.5 * LIMIT_S)
        return plain(engine)

    Engine.measured = measured
    try:
        return train_slowly(spec, attempt)
    finally:
        Engine.measured = plain


def test_a_kernel_that_hangs_is_told_from_ranks_that_wait_for_it(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    assert teams(2).run(train_with_a_kernel_that_hangs, mae_spec(shards, attempt), attempt) == [6, 6]
    waiting, hanging = (attempt.store.read(f"stacks/rank-{rank:04d}.txt").decode() for rank in (0, 1))
    assert "in phase check of step 3 for 1." in hanging
    assert "waiting for its GPU to finish the passes" in hanging.splitlines()[0]
    assert "in phase agree of step 3 for 1." in waiting
    assert "waiting for the other ranks" in waiting.splitlines()[0]


ALONE = """
import sys, time, torch
from pipeline.storage import open_store
from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.health.watchdog import Watchdog
from pipeline.training.world import World
with Watchdog(open_store(sys.argv[1]), World(0, 1, torch.device("cpu"), None), limit_s=0.3, on_timeout="exit") as watchdog:
    for _ in range(4):
        with watchdog.phase("forward"):
            time.sleep(0.2)
    with watchdog.phase("compile"):  # past twice the limit, within the allowance
        time.sleep(1)
    with watchdog.phase("agree"):  # another rank compiles still
        time.sleep(1)
    print("forward is over", flush=True)
    watchdog.step = 1
    with watchdog.phase("backward"):
        time.sleep(60)
"""


def test_a_worker_that_is_restarted_ends_itself_and_phases_are_timed_one_by_one(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path.as_uri()], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout) == (EXIT_CODE, "forward is over\n"), done.stderr
    assert time.monotonic() - began < 50
    assert "still in phase backward after 1 s: this worker ends itself" in done.stderr
    stacks = (tmp_path / "stacks/rank-0000.txt").read_text()
    assert "in phase backward of step 1 for 0." in stacks
    assert "<module>" in stacks
