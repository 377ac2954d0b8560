"""Real trainings, killed and spoiled: the audit passes if each id was seen once an epoch, and says what is wrong if not."""

import json
import pickle
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_kit import (
    PATIENCE_S,
    TRAIN,
    Team,
    attempt_at,
    damage,
    mae_spec,
    spoiled,
)

from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.loader import Batch
from pipeline.errors import CheckpointError, DataError
from pipeline.graph.receipts import Receipt, claim
from pipeline.storage import FileStore, open_store
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints import format as checkpoints
from pipeline.training.checkpoints.audit import audit, find_dataset, training_steps
from pipeline.training.checkpoints.format import read_manifest
from pipeline.training.loop.loop import train
from pipeline.training.spec.tasks import MAETask
from pipeline.training.world import enter_world

ROOT = Path(__file__).parents[4]
EPOCHS = 9
TOTAL_STEPS = 42  # 9 epochs of 60 samples in batches of 13


@dataclass(frozen=True, kw_only=True)
class LoggedMAETask(MAETask):
    """Logs one line per step: the (epoch, sample) that reach this rank's module. The lines of a killed process stay."""

    log: str

    def inputs(self, batch: Batch):
        with Path(f"{self.log}-{enter_world().rank}").open("a") as log:
            log.write(json.dumps(list(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True))) + "\n")
        time.sleep(0.01)  # leaves time to kill it
        return super().inputs(batch)


class Never:
    def stop_reason(self):
        return ""


def train_here(spec, attempt):
    return asdict(train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=Never()))


def logged(shards, attempt, log: Path):
    spec = mae_spec(shards, attempt, epochs=EPOCHS)
    return replace(spec, task=LoggedMAETask(**asdict(spec.task) | {"model": spec.task.model, "log": str(log)}))


def lines(log: Path, ranks: int) -> list[list[list[int]]]:
    """Return, for each step that all ranks have logged, all their [epoch, sample]."""
    of_ranks = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (Path(f"{log}-{rank}") for rank in range(ranks))
        if path.exists()
    ]
    steps = zip(*of_ranks, strict=False)
    return [[pair for of_rank in step for pair in of_rank] for step in steps] if len(of_ranks) == ranks else []


def train_and_kill(folder: Path, size: int, shards, attempt, log: Path, after: int) -> None:
    """Send SIGKILL to all workers as soon as they have seen `after` steps."""
    team = Team(size, folder)
    try:
        for pipe in team.pipes:
            pipe.send_bytes(pickle.dumps((train_here, (logged(shards, attempt, log), attempt))))
        deadline = time.monotonic() + PATIENCE_S
        while len(lines(log, size)) < after:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        team.close()


@pytest.mark.system
def test_killed_at_random_steps_each_id_reaches_a_device_once_an_epoch(teams, shards, tmp_path):
    """One worker, then two, then three; steps that a kill undid do not count."""
    draw = random.Random()
    starts, logs = [], []
    for size in (1, 2):
        attempt = attempt_at(tmp_path / "pretrain", checkpoint_every_steps=4)
        starts.append(int(attempt.continues[-8:] or 0))
        logs.append((tmp_path / f"log{size}", size))
        train_and_kill(tmp_path, size, shards, attempt, logs[-1][0], after=draw.randint(1, 15))
        if attempt.root.exists(f"g{attempt.generation:04d}/checkpoints/step-{starts[-1] + 4:08d}/manifest.json"):
            assert audit(attempt.root, dataset=dataset_address(shards)).agrees
    attempt = attempt_at(tmp_path / "pretrain", checkpoint_every_steps=4)
    starts.append(int(attempt.continues[-8:] or 0))
    logs.append((tmp_path / "log3", 3))
    trained = teams(3).run(train_here, logged(shards, attempt, logs[-1][0]), attempt)[0]

    stops = [*starts[1:], TOTAL_STEPS]
    committed = []
    for (log, ranks), start, stop in zip(logs, starts, stops, strict=True):
        committed += lines(log, ranks)[: stop - start]
    assert len(committed) == TOTAL_STEPS, (starts, stops)
    seen = sorted(tuple(pair) for step in committed for pair in step)
    ids = sorted({sample for _, sample in seen})
    assert len(ids) == TRAIN
    assert [pair for pair in seen if pair[0] < EPOCHS] == [(epoch, id_) for epoch in range(EPOCHS) for id_ in ids]
    assert len(seen) == len(set(seen)) == 13 * TOTAL_STEPS

    result = audit(attempt.root, dataset=dataset_address(shards))
    assert result.agrees, result.line
    assert (result.global_step, result.recorded_count) == (TOTAL_STEPS, 13 * TOTAL_STEPS)
    assert result.recorded_digest == result.expected.digest == trained["ids_digest"]
    assert "546 ids in 42 steps (9.10 epochs), each once an epoch" in result.line


# ---------------------------------------------------------------------------------------------------------------------
# Something wrong


def doubled(batch: Batch) -> Batch:
    """Put the first sample in the place of the second, too."""
    for tensor in batch[:3]:
        tensor[1] = tensor[0]
    return batch


def changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with a change to each of its tensors."""
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**{name: change(tensor) for name, tensor in tensors.items()})


def repeat_one(step: int, rank: int, batch: Batch) -> Batch:
    return doubled(batch) if (step, rank) == (4, 1) else batch


def add_one(step: int, rank: int, batch: Batch) -> Batch:
    if (step, rank) != (4, 1):
        return batch
    return changed(batch, lambda tensor: torch.cat([tensor, tensor[:1]]))


def drop_one(step: int, rank: int, batch: Batch) -> Batch:
    return changed(batch, lambda tensor: tensor[1:]) if (step, rank) == (4, 1) else batch


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (repeat_one, r"as many as expected, .* in epoch 0 sample \d+ came once too often, and sample \d+ was left out"),
        (drop_one, r"1 too few: sample \d+ of epoch 0 came once too rarely"),
        (add_one, r"1 too many: sample \d+ of epoch 0 came once too often"),
    ],
)  # fmt: skip
def test_a_loader_that_repeats_loses_or_exchanges_a_sample_fails_the_audit(teams, shards, tmp_path, spoil, words):
    """The checkpoint before it, which is right, narrows the range down."""
    attempt = attempt_at(tmp_path / "step", micro_batch=8)
    teams(2).run(train_here, spoiled(mae_spec(shards, attempt), spoil), attempt)
    result = audit(attempt.root, dataset=dataset_address(shards))
    assert not result.agrees
    assert re.search(rf"between steps 3 and 10 .*{words}", result.line), result.line
    assert "FAILED" in result.line


def test_substitutions_are_excused_and_forged_ones_are_not(teams, shards, tmp_path):
    bad = damage(shards, tmp_path / "shards", [("train", 1, 0)])
    attempt = attempt_at(tmp_path / "step")
    trained = teams(2).run(train_here, mae_spec(bad, attempt), attempt)[0]
    result = audit(attempt.root, dataset=dataset_address(bad))
    assert result.agrees
    assert result.substitutions >= 2
    assert f"{result.substitutions} recorded substitutions among them" in result.line

    key = trained["checkpoint_key"]
    manifest = read_manifest(attempt.root, key)
    first, *others = manifest.substitutions
    store, folder = attempt.store, key.partition("/")[2]
    checkpoints.commit(store, folder, replace(manifest, substitutions=tuple(others)))  # one is left out
    assert f"sample {first.substitute_id} came once too often, and sample {first.sample_id} was" in (
        audit(attempt.root, dataset=dataset_address(bad)).line
    )
    forged = first._replace(sample_id=first.substitute_id, substitute_id=first.sample_id)
    checkpoints.commit(store, folder, replace(manifest, substitutions=(*manifest.substitutions, forged)))
    assert (
        "1 recorded substitutions do not belong to this order" in audit(attempt.root, dataset=dataset_address(bad)).line
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where the dataset is


def finish(root, facts, generation, kind="shard") -> None:
    """Write a receipt with the fields that the audit reads."""
    receipt = Receipt("x", "f" * 64, {}, facts, (), generation, {}, kind)
    assert root.create("receipt.json", json.dumps(asdict(receipt)).encode())


def command(*arguments) -> subprocess.CompletedProcess[str]:
    """Run `mae shards audit ...` as from a shell."""
    call = [sys.executable, "-m", "jobs.cli", "shards", "audit", *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_finds_steps_and_dataset_in_a_run_s_store(teams, shards, tmp_path):
    run = tmp_path / "run"
    attempt = attempt_at(run / "pretrain-0123456789ab", micro_batch=8)
    with pytest.raises(CheckpointError, match="nothing to audit yet"):
        audit(attempt.root)
    trained = teams(2).run(train_here, spoiled(mae_spec(shards, attempt), repeat_one), attempt)[0]
    with pytest.raises(DataError, match=r"no finished shard or join step made the dataset .* --dataset"):
        audit(attempt.root)
    copied = damage(shards, run / "shard-ba9876543210", [])
    finish(copied.root, dict(copied.facts), copied.generation)
    assert find_dataset(FileStore(run), str(shards.facts["digest"])).root_uri == copied.root_uri
    joined = FileStore(tmp_path / "other" / "join-0123456789ab")
    finish(joined, {**shards.facts, "digest": "d" * 64, "keys_from": "store"}, 1, "join")
    assert find_dataset(FileStore(tmp_path / "other"), "d" * 64).root_uri == (tmp_path / "other").as_uri()
    assert training_steps(FileStore(run)) == ["pretrain-0123456789ab"]
    assert not audit(attempt.root).agrees
    finish(attempt.root, {"global_step": 10, "ids_digest": str(trained["ids_digest"] + 1)}, 1, "pretrain")
    assert "the receipt says digest" in audit(attempt.root).line

    good = attempt_at(run / "finetune-0123456789ab")
    teams(2).run(train_here, mae_spec(shards, good), good)
    done = command(run)
    assert done.returncode == 1, done.stderr
    first, second = done.stdout.splitlines()
    assert "finetune-0123456789ab: 130 ids in 10 steps (2.17 epochs), each once an epoch" in first
    assert "pretrain-0123456789ab" in second
    assert "FAILED" in second
    done = command(good.root_uri, "--dataset", copied.root_uri, "--json")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["agrees"], line["global_step"], line["expected"]["count"]) == (True, 10, 130)


def test_another_dataset_or_order_version_is_refused(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    trained = teams(1).run(train_here, mae_spec(shards, attempt), attempt)[0]
    key = trained["checkpoint_key"]
    manifest = read_manifest(attempt.root, key)
    for change, words in (({"dataset": "0" * 64}, "holds the dataset"), ({"version": 0}, "order has version 0")):
        spoilt = replace(manifest, cursor=dict(manifest.cursor) | change)
        checkpoints.commit(attempt.store, key.partition("/")[2], spoilt)
        with pytest.raises(DataError, match=words):
            audit(attempt.root, dataset=dataset_address(shards))
    claim(open_store(attempt.root_uri), continues="")  # a generation that has no checkpoint yet and continues from none
    with pytest.raises(CheckpointError, match="nothing to audit yet"):
        audit(attempt.root, dataset=dataset_address(shards))
