"""The loop in real processes: stops, world size and ZeRO stage do not change what is trained, and no worker is left waiting."""

import gc
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from training_kit import (
    SIDE,
    TOTAL_STEPS,
    Raised,
    StopAfter,
    attempt_at,
    checkpoint_state,
    classification_spec,
    computed_by_step,
    damage,
    digest_of,
    mae_config,
    mae_spec,
    same_attempt,
    spoiled,
)

from mae_core.masking import random_mask
from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.loader import Batch
from pipeline.data.feed.selection import Selection
from pipeline.errors import DataError, Fenced
from pipeline.graph.receipts import claim
from pipeline.graph.runner import stop_request_key
from pipeline.graph.step import Attempt, StageInput
from pipeline.storage import FileStore
from pipeline.storage.s3 import S3Store
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint, read_manifest
from pipeline.training.engine.micro_batches import Copying
from pipeline.training.guard import Judgement
from pipeline.training.health.stop_reasons import StoreStopSignal
from pipeline.training.launch import RESULT, run_training, run_worker
from pipeline.training.loop.loop import _Training, _warn_of_small_cache, train
from pipeline.training.spec.tasks import MAETask
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import ELSEWHERE, World, enter_world


def train_here(spec: TrainSpec, attempt: Attempt, stop_signal: StopAfter) -> dict[str, Any]:
    """Run the loop as one worker of a team; return its result and the (epoch, sample) of the batches that it trained on."""
    seen: list[tuple[list[int], list[int]]] = []
    step = _Training._step

    def watched(self: _Training, batch: Batch, copying: Copying) -> Judgement:
        seen.append((batch.epochs.tolist(), batch.sample_ids.tolist()))
        return step(self, batch, copying)

    with patch.object(_Training, "_step", watched):
        trained = train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop_signal)
    return asdict(trained) | {"seen": seen}


def run(team, shards: StageInput, attempt: Attempt, *, stop_after: int = 99, **recipe: Any) -> list[dict[str, Any]]:
    """Call the loop once on all workers of a team."""
    return team.run(train_here, mae_spec(shards, attempt, **recipe), attempt, StopAfter(stop_after))


def history_of(attempt: Attempt, key: str) -> list[dict[str, float]]:
    with open_checkpoint(attempt.root, key) as checkpoint:
        return checkpoint.history()


def seen_by_step(results: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    """For each step the sorted (epoch, sample) of all ranks."""
    steps = zip(*(result["seen"] for result in results), strict=True)
    return [
        sorted((epoch, sample) for epochs, samples in step for epoch, sample in zip(epochs, samples, strict=True))
        for step in steps
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("precisions", [{}, {"precision": "bf16", "gradient_precision": "fp32"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_stop_and_a_resume_change_no_bit(teams, shards, tmp_path, zero_stage, precisions):
    """In one layout, a run that is stopped twice ends with the weights, moments, losses and digest of one that is not."""
    straight = attempt_at(tmp_path / "straight", zero_stage=zero_stage)
    whole = run(teams(2), shards, straight, **precisions)[0]
    for stop_after in (4, 3):  # at 4 and at 7, both between two checkpoints
        stopped = attempt_at(tmp_path / "broken", zero_stage=zero_stage)
        assert run(teams(2), shards, stopped, stop_after=stop_after, **precisions)[0]["stopped"]
    last = attempt_at(tmp_path / "broken", zero_stage=zero_stage)
    assert last.generation == 3
    assert last.continues.endswith("step-00000007")
    resumed = run(teams(2), shards, last, **precisions)[0]

    assert (whole["global_step"], whole["stopped"]) == (TOTAL_STEPS, "")
    for field in ("global_step", "total_steps", "stopped", "ids_digest", "loss"):
        assert resumed[field] == whole[field], field
    expected = checkpoint_state(straight.root_uri, whole["checkpoint_key"])
    state = checkpoint_state(last.root_uri, resumed["checkpoint_key"])
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)

    rows, expected_rows = (history_of(a, r["checkpoint_key"]) for a, r in ((last, resumed), (straight, whole)))
    assert [row["step"] for row in rows] == list(range(1, TOTAL_STEPS + 1))
    for field in ("loss", "lr", "grad_norm", "epoch", "images"):
        assert [row[field] for row in rows] == [row[field] for row in expected_rows]


@dataclass(frozen=True)
class SlowAttempt(Attempt):
    """Its store accepts parts of checkpoints only once the gate file exists."""

    gate: Path = Path()

    @property
    def store(self) -> FileStore:
        return SlowStore(super().store.local_path("x").parent, self.gate)


@dataclass(frozen=True)
class SlowStore(FileStore):
    gate: Path = Path()

    def write(self, key, data):
        deadline = time.monotonic() + 60
        while key.endswith(".safetensors") and not self.gate.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        super().write(key, data)


@dataclass
class OpenAfter:
    """Opens the gate after `steps` steps; records what the store held until then."""

    steps: int
    attempt: SlowAttempt

    def stop_reason(self) -> Any:
        self.steps -= 1
        if self.steps < 0 and not self.attempt.gate.exists():
            keys = [info.key for info in self.attempt.store.list("checkpoints/")]
            (self.attempt.gate.parent / "there.json").write_text(json.dumps(keys))
            self.attempt.gate.touch()
        return ""


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_checkpoint_holds_its_step_even_if_training_goes_on_before_it_is_written(teams, shards, tmp_path, zero_stage):
    """Saved at step 3 and written after step 5, it equals bit for bit what a store without delay holds for step 3."""
    key = "g0001/checkpoints/step-00000003"
    prompt = attempt_at(tmp_path / "prompt", zero_stage=zero_stage)
    run(teams(2), shards, prompt)
    attempt = attempt_at(tmp_path / "slow", zero_stage=zero_stage)
    slow = SlowAttempt(**vars(attempt), gate=tmp_path / "gate")
    results = teams(2).run(train_here, mae_spec(shards, attempt), slow, OpenAfter(5, slow))
    assert json.loads((tmp_path / "there.json").read_text()) == []
    assert results[0]["global_step"] == TOTAL_STEPS
    expected = checkpoint_state(prompt.root_uri, key)
    state = checkpoint_state(attempt.root_uri, key)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert history_of(attempt, key)[-1]["step"] == 3
    manifests = [read_manifest(one.root, key) for one in (prompt, attempt)]
    assert manifests[0].ids_digest == manifests[1].ids_digest


def test_any_world_size_and_zero_stage_continues_with_the_same_samples(teams, shards, tmp_path):
    """2 workers at ZeRO-1, 1 at ZeRO-2, 3 at ZeRO-3, 2 at ZeRO-1: the ids of one worker at ZeRO-1, and its losses."""
    straight = attempt_at(tmp_path / "straight")
    whole = run(teams(1), shards, straight)
    seen, losses = [], []
    for workers, zero_stage, stop_after in ((2, 1, 2), (1, 2, 3), (3, 3, 2), (2, 1, 99)):
        attempt = attempt_at(tmp_path / "moved", zero_stage=zero_stage)
        results = run(teams(workers), shards, attempt, stop_after=stop_after)
        seen += seen_by_step(results)
        assert len({result["ids_digest"] for result in results}) == 1
        losses = [row["loss"] for row in history_of(attempt, results[0]["checkpoint_key"])]
    computed = computed_by_step(shards)
    assert seen == seen_by_step(whole) == computed
    assert results[0]["ids_digest"] == whole[0]["ids_digest"] == digest_of(computed)

    expected = [row["loss"] for row in history_of(straight, whole[0]["checkpoint_key"])]
    assert losses == pytest.approx(expected, rel=1e-6)  # sums in another order: 6.3e-8 seen
    state = checkpoint_state(attempt.root_uri, results[0]["checkpoint_key"])
    for key, value in checkpoint_state(straight.root_uri, whole[0]["checkpoint_key"]).items():
        if not key.endswith(
            "qkv.bias"
        ):  # softmax cancels the keys' bias: its gradient is rounding noise, which Adam turns into steps
            torch.testing.assert_close(state[key], value, rtol=0, atol=2e-6)  # 1.2e-7 seen


def test_the_same_generation_continues_after_its_workers_died(teams, shards, tmp_path):
    """As Ray Train restarts an elastic group when a worker dies: from the generation's newest checkpoint, with fewer workers."""
    attempt = attempt_at(tmp_path / "step")
    run(teams(3), shards, attempt, stop_after=5)
    resumed = run(teams(2), shards, same_attempt(attempt, zero_stage=2))
    assert len(resumed[0]["seen"]) == TOTAL_STEPS - 5
    assert resumed[0]["ids_digest"] == digest_of(computed_by_step(shards))


def test_a_finished_training_is_not_trained_again(teams, shards, tmp_path):
    done = run(teams(2), shards, attempt_at(tmp_path / "step"))[0]
    again = run(teams(2), shards, attempt_at(tmp_path / "step"))[0]
    assert again.pop("seen") == []
    assert again == {key: done[key] for key in again}


def test_two_images_and_three_workers(teams, shards, tmp_path):
    """With fewer samples than workers, the one without a sample runs padding that does not count."""
    losses = []
    for workers, folder in ((1, "alone"), (3, "crowd")):
        attempt = attempt_at(tmp_path / folder, checkpoint_every_steps=100)
        result = run(teams(workers), shards, attempt, stop_after=6, global_batch=2)
        losses.append([row["loss"] for row in history_of(attempt, result[0]["checkpoint_key"])])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Going wrong together


def run_training_here(spec: TrainSpec, attempt: Attempt) -> Any:
    return asdict(run_training(spec, attempt))


def no_shard_at_step_4(step: int, rank: int, batch: Batch) -> Batch:
    if (step, rank) == (4, 1):
        raise DataError("shards/ab.tar cannot be read")
    return batch


def alone_without_shard(step: int, rank: int, batch: Batch) -> Batch:
    return no_shard_at_step_4(step, 1, batch)


def test_a_shard_that_one_worker_cannot_read_ends_all_workers_with_its_message(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    spec = spoiled(mae_spec(shards, attempt), no_shard_at_step_4)
    first, second = teams(2).outcomes(train_here, spec, attempt, StopAfter(99))
    assert (first.kind, first.message) == ("PipelineError", ELSEWHERE)
    assert (second.kind, second.message) == ("DataError", "shards/ab.tar cannot be read")

    teams(2).run(
        run_worker, spec, attempt
    )  # what a Ray worker runs: it returns normally and leaves its answer in the store
    answer = json.loads(attempt.store.read(RESULT))
    assert answer == {"error": "DataError", "message": second.message}
    spec = spoiled(mae_spec(shards, attempt), alone_without_shard)
    alone = teams(1).outcomes(run_training_here, spec, attempt)[0]
    assert (alone.kind, alone.message) == ("DataError", second.message)
    # what was trained before is kept
    assert attempt_at(tmp_path / "step").continues == "g0001/checkpoints/step-00000003"


def test_an_unreadable_image_in_evaluation_ends_all_workers(teams, shards, tmp_path):
    bad = damage(shards, tmp_path / "shards", [("test", -1, -1)])
    key = Selection.all(dataset_address(bad).open(), "test").shards[-1].key
    attempt = attempt_at(tmp_path / "step", zero_stage=3)
    first, second = teams(2).outcomes(train_here, classification_spec(bad, attempt), attempt, StopAfter(99))
    assert (first.kind, first.message) == ("PipelineError", ELSEWHERE)
    assert second.kind == "DataError"
    assert key in second.message


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read while training


def test_an_unreadable_image_in_training_is_substituted_the_same_everywhere(teams, shards, tmp_path):
    """Two workers, stopped and resumed as three, against one worker undisturbed: the same ids, losses and records."""
    bad = damage(shards, tmp_path / "shards", [("train", 2, 1)])
    selection = Selection.all(dataset_address(bad).open(), "train")
    lost = int(selection.rows(2).sample_ids[1])
    moved = attempt_at(tmp_path / "moved")
    seen = seen_by_step(run(teams(2), bad, moved, stop_after=5))
    moved = attempt_at(tmp_path / "moved")
    results = run(teams(3), bad, moved)
    seen += seen_by_step(results)

    straight = attempt_at(tmp_path / "straight")
    whole = run(teams(1), bad, straight)
    manifest = read_manifest(straight.root, whole[0]["checkpoint_key"])
    asked = computed_by_step(shards)
    records = manifest.substitutions
    where = [(epoch, step) for step, batch in enumerate(asked) for epoch, id_ in batch if id_ == lost]
    assert [(one.sample_id, one.epoch, one.step, one.reason) for one in records] == [
        (lost, epoch, step, "crc32") for epoch, step in where
    ]
    assert len(records) >= 2
    assert all(one.substitute_id in selection.rows(2).sample_ids for one in records)
    stand_ins = {(one.epoch, one.sample_id): (one.epoch, one.substitute_id) for one in records}
    reached = [sorted(stand_ins.get(pair, pair) for pair in batch) for batch in asked]
    assert reached == seen == seen_by_step(whole)
    assert manifest.ids_count == 13 * TOTAL_STEPS

    for attempt, key in ((straight, whole[0]["checkpoint_key"]), (moved, results[0]["checkpoint_key"])):
        written = read_manifest(attempt.root, key)
        assert (written.ids_digest, written.ids_count, written.substitutions) == (
            digest_of(reached),
            13 * TOTAL_STEPS,
            records,
        )
        rows = history_of(attempt, key)
        assert [row["substitutions"] for row in rows] == [
            sum(step <= at for _, step in where) for at in range(TOTAL_STEPS)
        ]
        assert rows[-1]["epoch_coverage"] == pytest.approx((130 - 120 - sum(epoch == 2 for epoch, _ in where)) / 60)
    losses = [
        [row["loss"] for row in history_of(attempt, result[0]["checkpoint_key"])]
        for attempt, result in ((straight, whole), (moved, results))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_too_many_unreadable_images_end_all_workers_and_are_named(teams, shards, tmp_path):
    """Four in one epoch where three are allowed: every worker names them, and what was trained before is kept."""
    bad = damage(shards, tmp_path / "shards", [("train", shard, 0) for shard in range(4)])
    selection = Selection.all(dataset_address(bad).open(), "train")
    attempt = attempt_at(tmp_path / "step", checkpoint_every_steps=1)
    outcomes = teams(2).outcomes(train_here, mae_spec(bad, attempt), attempt, StopAfter(99))
    assert {outcome.kind for outcome in outcomes} == {"DataError"}
    assert outcomes[0].message == outcomes[1].message
    assert "4 samples of epoch 0 could not be read, more than the 3 that may be substituted" in outcomes[0].message
    for shard in range(4):
        assert f"{selection.source(shard, 0)} (id {selection.rows(shard).sample_ids[0]}, crc32)" in outcomes[0].message
    following = attempt_at(tmp_path / "step")
    kept = read_manifest(following.root, following.continues)
    assert 1 <= len(kept.substitutions) <= 3
    again = teams(1).outcomes(train_here, mae_spec(bad, following), following, StopAfter(99))
    assert again[0].message == outcomes[0].message  # substitutions from before the resume count too


# ---------------------------------------------------------------------------------------------------------------------
# What it shows


class Remembering:
    """A tracker and a progress line that record what they get."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.shown: list[dict[str, float]] = []

    def resume(self, points, *, rollbacks=0):
        pass

    def log(self, step, metrics):
        self.metrics.append({"step": step, **metrics})

    def update(self, done, total, *, unit, **fields):
        self.shown.append(fields)


def train_watched(spec: TrainSpec, attempt: Attempt, environment: dict[str, str]) -> Any:
    """Return what the loop sent to the tracker and to the progress line."""
    os.environ |= environment
    watch = Remembering()
    attempt = replace(attempt, progress=watch)
    train(spec, attempt, world=enter_world(), tracker=watch, stop_signal=StopAfter(99))
    return watch.metrics, watch.shown


def test_data_metrics_are_logged_and_shown(teams, shards, s3_bucket, tmp_path):
    """Two workers, shards in a bucket."""
    store = S3Store(s3_bucket, "root")
    opened = dataset_address(shards).open()
    rows = Selection.all(opened, "train").shards
    for row in rows:
        store.upload(row.key, opened.root.local_path(row.key))
    attempt = attempt_at(tmp_path / "step", cache_directory=str(tmp_path / "cache"), cache_max_bytes=2**30)
    spec = mae_spec(shards, attempt)
    spec = replace(spec, dataset=replace(spec.dataset, root_uri=store.uri))
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (metrics, shown), (others, _) = teams(2).run(train_watched, spec, attempt, environment)
    assert [row["step"] for row in metrics] == list(range(1, TOTAL_STEPS + 1))
    assert others == []  # only rank 0 logs
    names = {"wait_seconds", "cache_hit_share", "shard_fetches_per_epoch", "requests", "bytes_received", "retries"}
    names |= {"substitutions", "epoch_coverage"}
    assert {f"data/{name}" for name in names} | {"throughput/data_wait_share"} <= metrics[-1].keys()
    assert sum(row["data/bytes_received"] for row in metrics) == sum(
        row.bytes for row in rows
    )  # each shard is fetched once for both ranks
    assert sum(row["data/requests"] for row in metrics) >= len(rows)
    assert all(0 <= row["data/cache_hit_share"] <= 1 for row in metrics)
    assert metrics[-1]["data/cache_hit_share"] > 0.5
    assert metrics[-1]["data/shard_fetches_per_epoch"] == pytest.approx(
        60 / 130
    )  # once in 130 images, where an epoch has 60
    assert metrics[-1]["data/substitutions"] == 0
    assert {"throughput/mfu", "throughput/slowest_rank", "memory/process_gib"} <= metrics[-1].keys()
    assert {"loss", "images_per_s", "wait", "mfu", "GiB"} <= shown[-1].keys()


def test_substitutions_are_shown_when_there_are_any(teams, shards, tmp_path):
    bad = damage(shards, tmp_path / "shards", [("train", 2, 1)])
    attempt = attempt_at(tmp_path / "step")
    metrics, shown = teams(1).run(train_watched, mae_spec(bad, attempt), attempt, {})[0]
    assert shown.pop(0) == {}  # where training begins: no step is done
    assert [row.get("substituted", 0) for row in shown] == [row["data/substitutions"] for row in metrics]
    assert shown[-1]["substituted"] >= 2
    assert "data/cache_hit_share" not in metrics[-1]  # the shards are on the local disk


def test_a_cache_too_small_for_what_is_read_at_once_is_warned_about(caplog):
    asked = []

    def loader(needed):
        cache = SimpleNamespace(max_bytes=50 * 2**30, store=SimpleNamespace(uri="s3://bucket/shards"))
        return SimpleNamespace(cache=cache, bytes_at_once=lambda ranks: asked.append(ranks) or needed)

    first, second = (World(rank, 16, torch.device("cpu"), None, local_size=8) for rank in (0, 1))
    _warn_of_small_cache(loader(50 * 2**30), first)
    _warn_of_small_cache(loader(64 * 2**30), second)
    assert caplog.text == ""
    _warn_of_small_cache(loader(64 * 2**30), first)
    assert "about 64.0 GiB of shards" in caplog.text
    assert "resources.cache_max_bytes allows 50.0 GiB" in caplog.text
    assert asked == [8, 8, 8]


# ---------------------------------------------------------------------------------------------------------------------
# Failures of the disk, the store, the order


def test_a_worker_that_cannot_write_its_part_ends_all_workers_and_nothing_is_committed(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    in_the_way = tmp_path / "step/g0001/checkpoints/step-00000003/rank-0001-of-0002.safetensors"
    (in_the_way / "folder").mkdir(parents=True)
    first, second = teams(2).outcomes(train_here, mae_spec(shards, attempt), attempt, StopAfter(99))
    assert (first.kind, first.message) == ("PipelineError", ELSEWHERE)
    assert second.message != ELSEWHERE
    assert in_the_way.name in second.message
    assert not attempt.store.exists("checkpoints/step-00000003/manifest.json")


def test_a_dataset_that_cannot_be_opened_ends_all_workers(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    gone = mae_spec(replace(shards, root_uri=(tmp_path / "nothing").as_uri()), attempt)
    results = teams(2).outcomes(train_here, gone, attempt, StopAfter(99))
    assert [result.kind for result in results] == ["DataError", "DataError"]


def test_another_order_is_refused_on_all_workers(teams, shards, tmp_path):
    run(teams(2), shards, attempt_at(tmp_path / "step"), stop_after=3)
    attempt = attempt_at(tmp_path / "step")
    results = teams(2).outcomes(train_here, mae_spec(shards, attempt, global_batch=12), attempt, StopAfter(99))
    for result in results:
        assert result.kind == "CheckpointError"
        assert "global_batch was 13, is now 12" in result.message


def test_a_loss_that_is_not_finite_ends_all_workers_and_says_what_to_lower(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step", checkpoint_every_steps=1)
    spec = mae_spec(shards, attempt, base_lr=1e30, warmup_epochs=0.0)
    results = teams(2).outcomes(train_here, spec, attempt, StopAfter(99))
    for result in results:
        assert isinstance(result, Raised)
        assert result.kind == "PipelineError"
        assert "lower base_lr" in result.message


def test_a_fenced_run_saves_nothing_more(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    results = teams(2).outcomes(train_here, mae_spec(shards, attempt), attempt, StopAfter(5, "fenced"))
    assert [result.kind for result in results] == ["Fenced", "Fenced"]
    assert [info.key for info in attempt.store.list("checkpoints/") if info.key.endswith("manifest.json")] == [
        "checkpoints/step-00000003/manifest.json"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Who asks for the stop


def test_the_store_is_polled_once_a_second(tmp_path):
    now = [100.0]
    attempt = attempt_at(tmp_path / "step")
    stop_signal = StoreStopSignal(attempt, clock=lambda: now[0])
    assert stop_signal.stop_reason() == ""
    attempt.root.create(stop_request_key(attempt.generation), b"{}")
    assert stop_signal.stop_reason() == ""  # polled a moment ago
    now[0] += 1.0
    assert stop_signal.stop_reason() == "asked"
    claim(attempt.root, continues="")
    now[0] += 1.0
    assert stop_signal.stop_reason() == "fenced"


def test_a_store_that_does_not_answer_does_not_stop_training(s3_endpoint, tmp_path, caplog):
    attempt = replace(attempt_at(tmp_path / "step"), root_uri=S3Store("no-such-bucket", "step").uri)
    assert StoreStopSignal(attempt).stop_reason() == ""
    assert "no-such-bucket" in caplog.text


def test_a_stop_request_in_the_store_raises_stopped(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    attempt.root.create(stop_request_key(attempt.generation), b"{}")
    answer = teams(1).outcomes(run_training_here, mae_spec(shards, attempt), attempt)[0]
    assert answer.kind == "Stopped"
    assert "stopped at step 0 of 10" in answer.message
    # the next generation starts from what was saved, and the same process may train again
    attempt = attempt_at(tmp_path / "step")
    assert teams(1).run(run_training_here, mae_spec(shards, attempt), attempt)[0]["global_step"] == TOTAL_STEPS


def engines_left(spec: TrainSpec, attempt: Attempt, stop_signal: StopAfter) -> int:
    """Count the DeepSpeed engines that a training leaves alive in this process, whether it succeeds or not."""

    def alive() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "DeepSpeedEngine" for thing in gc.get_objects())

    before = alive()
    with suppress(Fenced):
        train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=stop_signal)
    return alive() - before


@pytest.mark.parametrize("reason", ["asked", "fenced"])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_training_leaves_no_engine_in_the_process(teams, shards, tmp_path, zero_stage, reason):
    """In one process a dozen fine-tunings may follow pretraining: weights and moments must not pile up."""
    attempt = attempt_at(tmp_path / "step", zero_stage=zero_stage)
    assert teams(1).run(engines_left, mae_spec(shards, attempt), attempt, StopAfter(2, reason)) == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def masks(epochs: list[int], ids: list[int], seed: int = 0) -> torch.Tensor:
    task = MAETask(model=mae_config(), weight_decay=0.0, seed=seed)
    images = torch.zeros(len(ids), SIDE, SIDE, 3, dtype=torch.uint8)
    drawn = torch.from_numpy(task.noise(np.array(epochs), np.array(ids)))
    batch = Batch(images, torch.zeros(len(ids)), torch.tensor(ids), torch.tensor(epochs), noise=drawn)
    pixels, noise = task.inputs(batch)
    assert pixels is images
    return random_mask(noise, mask_ratio=0.75).mask


def test_masks_depend_on_seed_epoch_and_sample_alone():
    batch = masks([0, 0, 0, 1], [7, 8, 9, 7])
    assert torch.equal(batch[2], masks([0], [9])[0])  # independent of the batch and the place in it
    assert len({tuple(mask.tolist()) for mask in batch}) == 4  # each sample and each epoch has its own mask
    assert not torch.equal(batch, masks([0, 0, 0, 1], [7, 8, 9, 7], seed=1))
    assert batch.sum(dim=1).eq(12).all()


def test_a_missing_dataset_is_a_data_error(shards, tmp_path):
    with pytest.raises(DataError):
        dataset_address(replace(shards, root_uri=tmp_path.as_uri())).open()
