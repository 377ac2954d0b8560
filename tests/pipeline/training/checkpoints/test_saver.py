"""Saving while training goes on, in real processes: the state of the save is written, and no worker waits for a thread."""

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from training_kit import Raised, attempt_at, checkpoint_state

from pipeline.errors import PipelineError, StorageError
from pipeline.graph.step import Attempt
from pipeline.storage import FileStore
from pipeline.storage.s3 import S3Store
from pipeline.training.checkpoints.format import CheckpointManifest, newest_checkpoint, read_manifest
from pipeline.training.checkpoints.host_copy import HostCopy, joined, on_disk
from pipeline.training.checkpoints.retention import Retention
from pipeline.training.checkpoints.saver import Saver, mean_loss, saving
from pipeline.training.engine.deepspeed_engine import KINDS, Fragment
from pipeline.training.world import ELSEWHERE, Unanswered, enter_world

COUNT = 7001
HISTORY = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
KEEP = Retention(last=2, every_steps=None, best=0)
PATIENCE_S = 60


@dataclass(frozen=True)
class GatedAttempt(Attempt):
    """Its checkpoints are not written before the gate file exists: a store slower than training."""

    gate: Path = Path()

    @property
    def store(self):
        return GatedStore(super().store.root, self.gate)


@dataclass(frozen=True)
class GatedStore(FileStore):
    gate: Path = Path()

    def write(self, key, data):
        deadline = time.monotonic() + PATIENCE_S
        while key.endswith(".safetensors") and not self.gate.exists():
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.01)
        super().write(key, data)


def gated(attempt: Attempt, gate: Path) -> GatedAttempt:
    return GatedAttempt(**vars(attempt), gate=gate)


class State:
    """A rank's part of one parameter, whose values encode the step."""

    def __init__(self) -> None:
        self.world = enter_world()
        low, high = (rank * COUNT // self.world.size for rank in (self.world.rank, self.world.rank + 1))
        self.values = [Fragment("weight", kind, low, torch.zeros(high - low)) for kind in KINDS]

    def move(self, step: int) -> CheckpointManifest:
        for number, fragment in enumerate(self.values):
            fragment.values.fill_(step + number / 4)
        return CheckpointManifest(
            global_step=step,
            optimizer_steps=step,
            cursor={},
            ids_digest=2**63 + step,
            ids_count=10 + self.world.rank,
            parameters={"weight": [COUNT]},
            world_size=self.world.size,
            zero_stage=1,
        )

    def saver(self, attempt: Attempt) -> Saver:
        return Saver(lambda: self.values, self.world, attempt, KEEP)


def values_at(step: int) -> dict[str, torch.Tensor]:
    return {f"{kind}|weight": torch.full((COUNT,), step + number / 4) for number, kind in enumerate(KINDS)}


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def goes_on_meanwhile(attempt: GatedAttempt) -> tuple[list[bool], float]:
    """Save step 1, train on to 5, then open the gate; return whether step 1 was committed, step by step, and the wait."""
    state = State()
    saver = state.saver(attempt)
    moved, began = state.move(1), time.monotonic()
    saver.save(moved, HISTORY)
    waited, committed = time.monotonic() - began, []
    for step in range(2, 6):
        saver.advance()
        state.move(step)
        committed.append(attempt.store.exists("checkpoints/step-00000001/manifest.json"))
    attempt.gate.touch()
    saver.save(state.move(5), HISTORY)  # waits for the first
    committed.append(attempt.store.exists("checkpoints/step-00000001/manifest.json"))
    while saver.busy:  # as at the boundaries of later steps
        saver.advance()
    saver.close()
    return committed, waited


def test_training_goes_on_while_the_state_of_the_save_is_written(teams, tmp_path):
    attempt = gated(attempt_at(tmp_path / "step"), tmp_path / "gate")
    for committed, waited in teams(2).run(goes_on_meanwhile, attempt):
        assert committed == [False, False, False, False, True]
        assert waited < PATIENCE_S / 10
    for step in (1, 5):
        key = f"g0001/checkpoints/step-{step:08d}"
        assert same(checkpoint_state(attempt.root_uri, key), values_at(step))
        manifest = read_manifest(attempt.root, key)
        assert (manifest.ids_digest, manifest.ids_count) == (2 * step % 2**64, 21)  # sums over both
        assert manifest.loss == 0.375
        assert [file.name for file in manifest.files] == [
            "rank-0000-of-0002.safetensors",
            "rank-0001-of-0002.safetensors",
            "history.jsonl",
        ]


def dies_while_writing(attempt: GatedAttempt) -> None:
    """Step 1 is committed; at step 2 the second worker's thread does not finish before both workers are gone."""
    state = State()
    attempt.gate.touch()
    saver = state.saver(attempt)
    saver.save(state.move(1), HISTORY)
    saver.finish()
    state.world.total([0])
    attempt.gate.unlink(missing_ok=True)
    state.world.total([0])
    if state.world.is_first:
        saver.store = attempt.root.at("g0001")  # only rank 0's part is written at once
    saver.save(state.move(2), HISTORY)
    while state.world.is_first and not saver._pending.future.done():
        time.sleep(0.01)
    for _ in range(3):
        saver.advance()
    saver.close()


def test_a_worker_that_dies_before_its_part_is_written_leaves_no_checkpoint(teams, tmp_path):
    attempt = gated(attempt_at(tmp_path / "step"), tmp_path / "gate")
    teams(2).run(dies_while_writing, attempt)
    assert (tmp_path / "step/g0001/checkpoints/step-00000002/rank-0000-of-0002.safetensors").exists()
    with newest_checkpoint(attempt_at(tmp_path / "step")) as checkpoint:
        assert checkpoint.key == "g0001/checkpoints/step-00000001"
    (tmp_path / "gate").touch()  # lets the thread end


def full_disk(attempt: Attempt) -> Any:
    """The second worker may write no file above 10 kB, so its part fails; both workers run on to later boundaries."""
    state = State()
    saver = state.saver(attempt)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not state.world.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        saver.save(state.move(1), HISTORY)
        for _ in range(1000):
            state.move(2)
            time.sleep(0.01)
            saver.advance()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert not saver.busy
        saver.close()


def test_a_part_that_cannot_be_written_ends_all_workers_at_the_next_boundary(teams, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    first, second = teams(2).outcomes(full_disk, attempt)
    assert isinstance(first, Raised)
    assert (first.kind, first.message) == ("PipelineError", ELSEWHERE)
    assert second.kind == "StorageError"
    assert "step-00000001/rank-0001-of-0002.safetensors" in second.message
    assert "File too large" in second.message
    assert not attempt.store.exists("checkpoints/step-00000001/manifest.json")


def saves_thrice(attempt: Attempt, environment: dict[str, str]) -> None:
    os.environ |= environment
    state = State()
    saver = state.saver(attempt)
    for step in (1, 2, 3):
        saver.save(state.move(step), HISTORY)
    saver.finish()
    saver.close()


def test_a_bucket_holds_checkpoints_of_two_workers(teams, s3_bucket, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    root = S3Store(s3_bucket, "step")
    attempt = Attempt(**vars(attempt) | {"root_uri": root.uri})
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    teams(2).run(saves_thrice, attempt, environment)
    for step in (2, 3):
        assert same(checkpoint_state(root.uri, f"g0001/checkpoints/step-{step:08d}"), values_at(step))
    assert not list(root.list("g0001/checkpoints/step-00000001"))  # only two are kept


def test_the_copy_is_a_file_that_any_safetensors_library_reads():
    fragments = [Fragment("a.b", "weight", 5, torch.arange(3.0)), Fragment("c", "exp_avg", 0, torch.arange(4.0))]
    copy = HostCopy(fragments)
    copy.take(fragments)
    fragments[0].values.fill_(-1)
    held = load(bytes(copy.file))
    assert {name: value.tolist() for name, value in held.items()} == {
        "weight|a.b|5": [0.0, 1.0, 2.0],
        "exp_avg|c|0": [0.0, 1.0, 2.0, 3.0],
    }
    assert load(bytes(HostCopy([]).file)) == {}  # a worker that holds nothing


def test_a_copy_on_disk_is_the_same_file_and_leaves_nothing_behind(tmp_path):
    fragments = [Fragment("a.b", "weight", 0, torch.arange(3.0)), Fragment("c", "weight", 0, torch.arange(4.0))]
    there, in_memory = HostCopy(fragments, on_disk(tmp_path / "copies")), HostCopy(fragments)
    for copy in (there, in_memory):
        copy.take(fragments)
    assert bytes(there.file) == bytes(in_memory.file)
    assert list((tmp_path / "copies").iterdir()) == []  # not even if the process is killed now


def test_a_disk_without_room_for_the_copy_is_reported_before_training(tmp_path):
    with pytest.raises(StorageError, match=r"(?s)copies: \d+ bytes for .*resources\.checkpoint_copy=memory"):
        on_disk(tmp_path / "copies")(2**60)


def test_pieces_of_one_flat_buffer_are_copied_together_and_never_more_than_they_are():
    """In any order; a gap (padding) between two is not copied, and other buffers and moved memory are not joined."""
    flat, other = torch.arange(20.0), torch.arange(100.0, 105.0)
    cuts = {"a": flat[0:4], "b": flat[4:11], "c": flat[13:20], "d": other}
    fragments = [Fragment(name, "weight", 0, values) for name, values in cuts.items()]
    copy = HostCopy([fragments[index] for index in (2, 0, 3, 1)])
    for given in (fragments, fragments[::-1], [one._replace(values=one.values.clone()) for one in fragments]):
        for one in given:
            one.values.add_(1)
        copy.take(given)
        held = load(bytes(copy.file))
        assert {name: value.tolist() for name, value in held.items()} == {
            f"weight|{one.parameter}|0": one.values.tolist() for one in given
        }
    together = list(joined((slice(begin, end), flat[begin:end]) for begin, end in ((0, 4), (4, 11), (11, 12))))
    assert [(place, run.tolist()) for place, run in together] == [(slice(0, 12), flat[:12].tolist())]


@pytest.mark.parametrize(
    ("losses", "mean"), [([], None), ([4.0] * 5 + [1.0, 2.0] * 5, 1.5), ([1.0, float("nan")], None)]
)
def test_a_checkpoint_is_ranked_by_its_last_losses(losses, mean):
    assert mean_loss([{"loss": loss} for loss in losses]) == mean


class Finishing:
    """A saver that writes down what it is asked for."""

    def __init__(self):
        self.asked = []

    def finish(self):
        self.asked.append("finish")

    def close(self):
        self.asked.append("close")


@pytest.mark.parametrize(
    ("error", "asked"), [(PipelineError, ["finish", "close"]), (Unanswered, ["close"]), (KeyError, ["close"])]
)
def test_a_pending_save_is_completed_only_if_all_workers_can_agree(error, asked):
    saver = Finishing()
    with pytest.raises(error), saving(saver):
        raise error("one worker")
    assert saver.asked == asked
