"""The pretraining stage on Ray Train: killing a worker in the middle does not change the result."""

import json
from dataclasses import replace

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

from pipeline import cluster
from pipeline.stages.pretrain import MILESTONE_IMAGES
from pipeline.training import ray_train
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
def test_decode_workers_inside_a_ray_worker_change_nothing(shards, tmp_path):
    """The worker reserves a CPU for its decode worker, and trains on the same samples to the same loss as in this process."""
    attempt = attempt_at(tmp_path / "ray", executor="ray", decode_workers=1)
    fed = in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(), ())
    alone = pretrain_here(shards, tmp_path / "alone")
    assert fed.left == []
    assert fed.result.facts["ids_digest"] == alone.facts["ids_digest"]
    assert fed.result.facts["loss"] == pytest.approx(alone.facts["loss"], rel=1e-6)


@pytest.mark.system
def test_checkpoints_are_scored_beside_the_training(shards, tmp_path):
    """One CPU trains, the other scores; what is scored changes nothing about what is trained."""
    changes = {"checkpoint_every_steps": 40, "log_every_steps": 20, "keep_best_by": "knn"}
    attempt = replace(attempt_at(tmp_path / "ray", executor="ray", **changes), options={MILESTONE_IMAGES: 60})
    config = pretrain_config(epochs=20 * EPOCHS)
    scored = in_a_process(pretrain_on_ray, shards, attempt, config, ())
    assert scored.left == []
    rows = [json.loads(line) for line in attempt.store.read("history.jsonl").splitlines()]
    known = [row for row in rows if "milestone_images" in row]
    assert known
    for row in known:
        assert row["milestone_images"] % (40 * 13) == 0
        assert row["milestone_images"] <= row["images"]
        assert {"milestone_knn", "milestone_ridge", "milestone_rankme", "milestone_held_out_loss"} <= row.keys()
    assert not list(attempt.root.list("pins/"))
    assert len(list(attempt.root.list("milestones/"))) >= len(known)


@pytest.mark.parametrize(("gpus", "cpus", "use_gpu", "decode_workers"), [(4, 16.0, True, 15), (0, 0.0, False, 0)])
def test_what_auto_means_is_decided_once(tmp_path, monkeypatch, gpus, cpus, use_gpu, decode_workers):
    monkeypatch.setattr(ray_train.ray, "cluster_resources", lambda: {"GPU": gpus})
    monkeypatch.setattr(ray_train.cluster, "cpus_per_gpu", lambda *, workers: cpus)
    decided = ray_train.with_hardware_decided(attempt_at(tmp_path, executor="ray", use_gpu=None)).resources
    assert (decided.use_gpu, decided.decode_workers) == (use_gpu, decode_workers)


def test_the_cpus_of_a_gpu_are_those_of_the_node_where_each_worker_finds_fewest(monkeypatch):
    nodes = {"a": {"CPU": 64.0, "GPU": 8.0}, "b": {"CPU": 96.0, "GPU": 8.0}, "head": {"CPU": 4.0}}
    monkeypatch.setattr("ray._private.state.total_resources_per_node", lambda: nodes)
    assert [cluster.cpus_per_gpu(workers=workers) for workers in (1, 4, 8, 16)] == [64, 16, 8, 8]
    nodes.clear()
    assert cluster.cpus_per_gpu(workers=1) == 0
