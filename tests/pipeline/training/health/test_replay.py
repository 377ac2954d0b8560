"""Bundles of bad steps, and their replay in one process, from the library and through the command."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from guard_kit import run, spoilt_spec, train_here
from run_kit import mae
from training_kit import StopAfter, attempt_at, classification_spec, computed_by_step, mae_spec
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import DataError
from pipeline.graph.step import Attempt
from pipeline.storage import open_store
from pipeline.training.guard import GuardConfig
from pipeline.training.health.incidents import read_bundle
from pipeline.training.health.replay import Replayed, replay
from pipeline.training.spec.spec_json import as_json, from_json
from pipeline.training.spec.train_spec import TrainSpec

NAN = math.nan
GUARD = GuardConfig(skips_in_a_row=4, lost_share=0.2)
BAD = {10: NAN, 11: NAN}


def replay_here(attempt: Attempt, step: int, spec: TrainSpec, most_steps: int = 100) -> Replayed:
    bundle = read_bundle(attempt.store.at(f"bundles/step-{step:08d}"))
    return replay(bundle, attempt.root, spec, most_steps=most_steps, tell=lambda _: None)


@pytest.fixture(scope="module")
def skipped(teams, shards, tmp_path_factory) -> Attempt:
    """Two workers at ZeRO-2 that skipped steps 10 and 11; checkpoints at multiples of 3."""
    return run(teams(2), shards, tmp_path_factory.mktemp("skipped") / "step", BAD, GUARD, zero_stage=2)[1]


def test_a_bad_step_is_reproduced_by_one_process_and_names_the_sample(teams, shards, skipped):
    """Step 11 is replayed from the checkpoint at 9: step 9 is taken again, 10 is skipped again."""
    spec = spoilt_spec(shards, skipped, BAD, GUARD)
    done = teams(1).run(replay_here, skipped, 11, spec)[0]
    assert (done.began_at, done.differences) == (9, ())
    planted = computed_by_step(shards, steps=12)[11][5]
    assert [(one.epoch, one.sample_id) for one in done.samples if not one.finite] == [planted]
    assert len(done.samples) == 13
    finite = done.samples[1:]
    assert max(abs(one.now / one.then - 1) for one in finite) < 1e-5  # sums in another order
    assert len({one.now for one in finite}) == 12


def test_what_differs_from_the_recorded_step_is_named(teams, shards, skipped):
    healed = teams(1).run(replay_here, skipped, 11, spoilt_spec(shards, skipped, {10: NAN}, GUARD))[0]
    assert (
        "are finite in only one of the two" in healed.differences[1]
    )  # differences[0] is about the factor, which is an input beside the image
    assert healed.differences[-1] == "loss and gradient norm are finite now"
    other_rate = spoilt_spec(shards, skipped, BAD, GUARD, base_lr=1.0)
    assert "losses of" in teams(1).run(replay_here, skipped, 11, other_rate)[0].differences[0]
    spec = spoilt_spec(shards, skipped, BAD, GUARD)
    masked = replace(spec, task=replace(spec.task, seed=6))
    assert "masks of 13 samples differ" in teams(1).run(replay_here, skipped, 11, masked)[0].differences
    far = teams(1).outcomes(replay_here, skipped, 11, spec, 1)[0]
    assert (far.kind, "2 steps behind the nearest checkpoint kept" in far.message) == ("DataError", True)


def test_a_bundle_without_a_worker_s_part_is_refused(skipped):
    folder = skipped.store.at("bundles/step-00000010")
    for info in list(folder.list("rank-0000")):
        skipped.store.write(f"bundles/step-00000099/{info.key}", folder.read(info.key))
    with pytest.raises(DataError, match=r"rank-0001\.json is missing"):
        read_bundle(skipped.store.at("bundles/step-00000099"))


def test_a_specification_survives_json(shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    for spec in (mae_spec(shards, attempt, guard=GUARD), classification_spec(shards, attempt)):
        body = json.loads(json.dumps(as_json(spec)))
        assert from_json(body, attempt.root) == spec
    with pytest.raises(DataError, match="OtherTask"):
        from_json(body | {"kinds": ["OtherTask", "Recipe"]}, attempt.root)
    with pytest.raises(DataError, match="a bundle's FinetuneRecipe is not of this version"):
        from_json(body | {"recipe": body["recipe"] | {"epochs": "many"}}, attempt.root)


def replay_as_json(address: str, step: int) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["replay", address, "--step", str(step), "--most-steps", "9", "--json"])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def test_the_command_finds_the_last_bundle_and_reproduces_it(teams, shards, tmp_path):
    """An absurd learning rate: the first step ruins the weights, and the replay meets what the second step met."""
    attempt = attempt_at(tmp_path / "store/pretrain-abc")
    spec = mae_spec(shards, attempt, base_lr=1e30, warmup_epochs=0.0)
    raised = teams(2).outcomes(train_here, spec, attempt, StopAfter(99))[0]
    address = raised.message.partition("`mae replay ")[2].partition("`")[0]
    assert read_bundle(open_store(address)).step == 3
    done = mae("replay", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"step 3, learning rate \d.*e\+28, give_up: loss and gradient norm not finite; ", lines[0])
    assert "13 of 13 samples are not finite" in lines
    assert lines[-1] == "reproduced"
    code, told = teams(1).run(replay_as_json, attempt.root_uri, 1)[0]
    assert (code, told["step"], told["reproduced"], len(told["samples"])) == (0, 1, True, 13)
    assert told["bundle"] == address.replace("00000003", "00000001")


def test_the_command_says_so_if_there_is_nothing_to_replay(tmp_path):
    with pytest.raises(DataError, match="no bundle of a bad step"):
        CliRunner().invoke(app, ["replay", str(tmp_path)], catch_exceptions=False)
