"""The pretraining stage on Ray Train: killing a worker in the middle does not change the result."""

import json
from contextlib import contextmanager
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
from pipeline.cluster import sharing
from pipeline.errors import ConfigError, Stopped
from pipeline.stages.pretrain import MILESTONE_IMAGES, MILESTONE_PROBE_EPOCHS
from pipeline.training import room as before_workers
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


class Heard:
    """Progress that remembers what was said."""

    def __init__(self) -> None:
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def decide(folder, monkeypatch, *, gpus, cpus=16.0, grows=False, **resources):
    """Decide on a pretended cluster; return the resources and what was said."""
    for module in (cluster, sharing):
        monkeypatch.setattr(module, "gpu_inventory", lambda: (float(gpus()), frozenset()))
        monkeypatch.setattr(module, "cpus_per_gpu", lambda *, workers: cpus)
    monkeypatch.setattr(cluster, "may_grow", lambda: grows)
    heard = Heard()
    attempt = replace(attempt_at(folder, executor="ray", **resources), progress=heard)
    return before_workers.with_hardware_decided(attempt).resources, heard.lines


@pytest.mark.system
def test_checkpoints_are_scored_beside_the_training(shards, tmp_path):
    """One CPU trains, the other scores; what is scored changes nothing about what is trained."""
    changes = {"checkpoint_every_steps": 40, "log_every_steps": 20, "keep_best_by": "knn"}
    attempt = replace(
        attempt_at(tmp_path / "ray", executor="ray", **changes),
        options={MILESTONE_IMAGES: 60, MILESTONE_PROBE_EPOCHS: 2},
    )
    config = pretrain_config(epochs=20 * EPOCHS)
    scored = in_a_process(pretrain_on_ray, shards, attempt, config, ())
    assert scored.left == []
    rows = [json.loads(line) for line in attempt.store.read("history.jsonl").splitlines()]
    known = [row for row in rows if "milestone_images" in row]
    assert known
    for row in known:
        assert row["milestone_images"] % (40 * 13) == 0
        assert row["milestone_images"] <= row["images"]
        assert {f"milestone_{name}" for name in ("knn", "ridge", "probe", "rankme", "held_out_loss")} <= row.keys()
    assert not list(attempt.root.list("pins/"))
    assert len(list(attempt.root.list("milestones/"))) >= len(known)


@pytest.mark.parametrize(("gpus", "cpus", "use_gpu", "decode_workers"), [(4, 16.0, True, 15), (0, 0.0, False, 0)])
def test_what_auto_means_is_decided_once(tmp_path, monkeypatch, gpus, cpus, use_gpu, decode_workers):
    decided, said = decide(tmp_path, monkeypatch, gpus=lambda: gpus, cpus=cpus, use_gpu=None)
    assert (decided.use_gpu, decided.decode_workers) == (use_gpu, decode_workers)
    assert said == ["training on 1 GPU" if use_gpu else "training on the CPU: this cluster has no GPU"]


class Room:
    """An autoscaler that answers one thing after the other; the last answer stays. GPUs are there after `grants_after` looks."""

    def __init__(self, monkeypatch, *answers, grants_after=99) -> None:
        self.answers, self.looks, self.grants_after, self.asked = answers, 0, grants_after, []
        monkeypatch.setattr(cluster, "room_asked_for", self.asked_for)
        monkeypatch.setattr(before_workers.time, "monotonic", lambda: 1000.0 + self.looks)

    @contextmanager
    def asked_for(self, need, *, workers):
        self.asked.append((need, workers))
        yield self

    def granted(self, *, timeout_s):
        self.looks += 1  # each takes a second
        return self.gpus() > 0

    def gpus(self):
        return 2 if self.looks > self.grants_after else 0

    def gpus_are_coming(self):
        return self.answers[min(self.looks, len(self.answers)) - 1]


@pytest.mark.parametrize("use_gpu", ["auto", True])
def test_gpus_that_an_autoscaler_starts_are_waited_for(tmp_path, monkeypatch, use_gpu):
    room = Room(monkeypatch, None, True, None, grants_after=500)
    wanted = {"use_gpu": use_gpu, "workers": 2, "node_wait_s": 1800.0}
    decided, said = decide(tmp_path, monkeypatch, gpus=room.gpus, grows=True, **wanted)
    assert room.asked == [({"CPU": 1.0, "GPU": 1.0}, 2)]
    assert decided.use_gpu is True
    assert said == [
        "asking the autoscaler for GPUs for 2 workers, and waiting for up to 1800 s (resources.node_wait_s)",
        "training on 2 GPUs",
    ]


@pytest.mark.parametrize(
    ("answers", "looks", "why"),
    [
        ([None, False], 2, "and its autoscaler starts no nodes that have what a worker needs"),  # version 2 says so
        ([None], 46, "and its autoscaler starts no nodes that have what a worker needs"),  # version 1 does nothing
        ([None, True, None], 61, "the autoscaler's nodes with GPUs did not come within 60 s"),
    ],
)
def test_without_the_autoscalers_gpus_auto_is_the_cpu_and_true_an_error(tmp_path, monkeypatch, answers, looks, why):
    room = Room(monkeypatch, *answers)
    decided, said = decide(tmp_path / "auto", monkeypatch, gpus=room.gpus, grows=True, use_gpu="auto", node_wait_s=60)
    assert (decided.use_gpu, room.looks) == (False, looks)
    assert said[1:] == [f"training on the CPU: this cluster has no GPU, {why}"]
    room.looks = 0
    late = "did not come" in why  # they may come yet, so the command is worth another try
    error, words = (Stopped, f"step: {why}. The same command") if late else (ConfigError, f"has no GPU, {why}. Write")
    with pytest.raises(error, match=words):
        decide(tmp_path / "true", monkeypatch, gpus=room.gpus, grows=True, use_gpu=True, node_wait_s=60)


def test_a_wait_for_gpus_ends_when_it_is_asked_to_stop(tmp_path, monkeypatch):
    room = Room(monkeypatch, True)
    monkeypatch.setattr(before_workers.StoreStopSignal, "stop_reason", lambda _: "asked" if room.looks > 3 else "")
    with pytest.raises(Stopped, match="step: asked to stop, while it waited for GPUs"):
        decide(tmp_path, monkeypatch, gpus=room.gpus, grows=True, use_gpu=True, node_wait_s=60)


def test_an_autoscaler_is_not_asked_without_need(tmp_path, monkeypatch):
    room = Room(monkeypatch, True)
    assert decide(tmp_path / "a", monkeypatch, gpus=lambda: 2, grows=True, workers=2, use_gpu=True)[0].use_gpu is True
    assert decide(tmp_path / "b", monkeypatch, gpus=lambda: 0, grows=True, use_gpu=False)[0].use_gpu is False
    assert room.asked == []
