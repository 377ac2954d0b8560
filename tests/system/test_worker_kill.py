"""Training workers killed with SIGKILL, twice, under ZeRO-3 and with other workers than before: the same result, nothing left."""

import pytest
import torch
from training_kit import (
    Teams,
    attempt_at,
    checkpoint_state,
    in_a_process,
    mae_spec,
    pretrain_config,
    pretrain_on_ray,
)

from pipeline.errors import PipelineError
from pipeline.training.launch import run_worker

EPOCHS = 60  # 277 steps

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def calm(shards, tmp_path_factory):
    """The undisturbed run, in two plain processes: its final checkpoint's values by ZeRO stage."""
    folder = tmp_path_factory.mktemp("calm")
    teams = Teams(folder, {})
    values = {}
    for zero_stage in (1, 3):
        attempt = attempt_at(folder / str(zero_stage), zero_stage=zero_stage, checkpoint_every_steps=1000)
        teams(2).run(run_worker, mae_spec(shards, attempt, epochs=EPOCHS), attempt)
        values[zero_stage] = checkpoint_state(attempt.root_uri, "g0001/checkpoints/step-00000277")
    teams.close()
    return values


def attempt_on_ray(folder, **changes):
    return attempt_at(folder, executor="ray", workers=2, checkpoint_every_steps=5, keep_checkpoints=2, **changes)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_killed_workers_change_nothing(shards, calm, tmp_path, zero_stage):
    attempt = attempt_on_ray(tmp_path, zero_stage=zero_stage)
    disturbed = in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(epochs=EPOCHS), (20, 100), timeout_s=500)
    assert len(set(disturbed.killed)) == 2
    assert disturbed.killed_at[1] < 270
    assert disturbed.left == []
    state = checkpoint_state(attempt.root_uri, disturbed.result.notes["checkpoint"])
    assert all(torch.equal(state[key], value) for key, value in calm[zero_stage].items())


def test_more_deaths_than_allowed_end_the_step_and_the_next_run_goes_on(shards, calm, tmp_path):
    attempt = attempt_on_ray(tmp_path, max_failures=0)
    with pytest.raises(PipelineError, match="more often than max_failures=0 allows"):
        in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(epochs=EPOCHS), (20,), timeout_s=300)
    following = attempt_on_ray(tmp_path, max_failures=0)
    assert following.continues >= "g0001/checkpoints/step-00000020"
    disturbed = in_a_process(pretrain_on_ray, shards, following, pretrain_config(epochs=EPOCHS), (), timeout_s=300)
    state = checkpoint_state(following.root_uri, disturbed.result.notes["checkpoint"])
    assert all(torch.equal(state[key], value) for key, value in calm[1].items())
