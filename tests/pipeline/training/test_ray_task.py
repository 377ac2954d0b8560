"""A training with one worker as a plain Ray task: what is tried again, and a worker that is killed in the middle."""

import signal

import pytest
import torch
from training_kit import (
    Team,
    attempt_at,
    checkpoint_state,
    in_a_process,
    mae_spec,
    pretrain_config,
    pretrain_on_ray,
)

from pipeline.errors import PipelineError
from pipeline.training import ray_task
from pipeline.training.health.stop_reasons import PolledStopSignal, sigterm_stops
from pipeline.training.launch import run_worker

EPOCHS = 30  # 139 steps of about 30 ms


@pytest.fixture
def outcomes(monkeypatch):
    """What successive tasks raise, instead of running; nothing is left when the training has ended."""
    left: list[Exception] = []

    def call(function, *arguments, need, own_process):
        assert need == {"CPU": 1.0}
        if left:
            raise left.pop(0)

    monkeypatch.setattr(ray_task.cluster, "call_reserved", call)
    return left


def test_a_worker_that_is_lost_starts_again_as_often_as_allowed(outcomes, shards, tmp_path):
    attempt = attempt_at(tmp_path, executor="ray", max_failures=2)
    outcomes += [ConnectionError("gone"), RuntimeError("CUDA error")]
    ray_task.fit(run_worker, mae_spec(shards, attempt), attempt)
    assert outcomes == []
    outcomes += [ConnectionError("gone")] * 4
    with pytest.raises(
        PipelineError, match=r"step: the workers failed 3 times .* max_failures=2 allows; last error: gone"
    ):
        ray_task.fit(run_worker, mae_spec(shards, attempt), attempt)
    assert len(outcomes) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [(KeyError("a bug"), "would fail again"), (torch.OutOfMemoryError("too large"), "lower resources.micro_batch")],
)
def test_what_would_only_repeat_itself_is_given_up_at_once(outcomes, shards, tmp_path, error, words):
    attempt = attempt_at(tmp_path, executor="ray", max_failures=9)
    outcomes += [error]
    with pytest.raises(PipelineError, match=words):
        ray_task.fit(run_worker, mae_spec(shards, attempt), attempt)


def test_a_process_serves_the_next_training_as_it_was(tmp_path, monkeypatch):
    seen = {}

    def worker(spec, attempt):
        seen["threads"], seen["handler"] = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    ray_task.train_alone(worker, None, attempt_at(tmp_path, executor="ray", cpus_per_worker=3))
    assert seen["threads"] == (before if torch.cuda.is_available() else 3)
    assert seen["handler"] != handler
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (before, handler)


def test_a_sigterm_to_one_training_is_not_taken_for_one_to_the_next():
    class Quiet:
        def stop_reason(self):
            return ""

    stop_signal = PolledStopSignal(Quiet())
    with sigterm_stops():
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal.stop_reason() == "preempted"
    with sigterm_stops():
        assert stop_signal.stop_reason() == ""


@pytest.mark.system
def test_a_killed_worker_changes_nothing(shards, tmp_path):
    changes = {"checkpoint_every_steps": 10, "keep_checkpoints": 2, "log_every_steps": 10}
    attempt = attempt_at(tmp_path / "ray", executor="ray", **changes)
    disturbed = in_a_process(pretrain_on_ray, shards, attempt, pretrain_config(epochs=EPOCHS), (20,))
    assert len(disturbed.killed) == 1
    assert 20 <= disturbed.killed_at[0] < 130  # it did land in the middle
    assert disturbed.left == []

    calm = attempt_at(tmp_path / "calm", **changes)
    # Not the session's team: a process that ever ran ZeRO-3 keeps DeepSpeed's F.linear, which rounds differently.
    team = Team(1, tmp_path)
    team.run(run_worker, mae_spec(shards, calm, epochs=EPOCHS), calm)
    team.close()
    expected = checkpoint_state(calm.root_uri, f"g0001/checkpoints/step-{disturbed.result.facts['global_step']:08d}")
    state = checkpoint_state(attempt.root_uri, disturbed.result.notes["checkpoint"])
    assert all(torch.equal(state[key], expected[key]) for key in expected)
