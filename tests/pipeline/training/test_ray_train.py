"""The pretraining stage on Ray Train: killing a worker in the middle does not change the result."""

import pytest
import torch
from training_kit import (
    Team,
    attempt_at,
    checkpoint_state,
    in_a_process,
    mae_spec,
    pretrain_config,
    pretrain_here,
    pretrain_on_ray,
)

from pipeline.training.launch import run_worker

EPOCHS = 30  # 139 steps of about 30 ms


@pytest.mark.system
def test_a_killed_worker_changes_nothing(shards, tmp_path):
    changes = {"workers": 2, "checkpoint_every_steps": 10, "keep_checkpoints": 2, "log_every_steps": 10}
    attempt = attempt_at(tmp_path / "ray", executor="ray", **changes)
    disturbed = in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(epochs=EPOCHS), (20,))
    assert len(disturbed.killed) == 1
    assert 20 <= disturbed.killed_at[0] < 130  # it did land in the middle
    assert disturbed.left == []

    calm = attempt_at(tmp_path / "calm", **changes)
    # Not the session's team: a process that ever ran ZeRO-3 keeps DeepSpeed's F.linear, which rounds differently.
    team = Team(2, tmp_path)
    team.run(run_worker, mae_spec(shards, calm, epochs=EPOCHS), calm)
    team.close()
    step = f"checkpoints/step-{disturbed.result.facts['global_step']:08d}"
    assert calm.store.exists(f"{step}/manifest.json")
    expected = checkpoint_state(calm.root_uri, f"g0001/{step}")
    state = checkpoint_state(attempt.root_uri, disturbed.result.notes["checkpoint"])
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.system
@pytest.mark.parametrize("workers", [1, (1, 1)], ids=["task", "group"])
def test_decode_workers_inside_a_ray_worker_change_nothing(shards, tmp_path, workers):
    """The worker reserves a CPU for its decode worker, and trains on the same samples to the same loss as in this process."""
    attempt = attempt_at(tmp_path / "ray", executor="ray", decode_workers=1, workers=workers)
    fed = in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(), ())
    alone = pretrain_here(shards, tmp_path / "alone")
    assert fed.left == []
    assert fed.result.facts["ids_digest"] == alone.facts["ids_digest"]
    assert fed.result.facts["loss"] == pytest.approx(alone.facts["loss"], rel=1e-6)
