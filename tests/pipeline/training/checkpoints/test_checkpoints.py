"""Checkpoints on disk and in a bucket: what is committed is whole, what is damaged is refused and named."""

import json
import logging
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from feed_kit import DistantStore
from safetensors import safe_open
from training_kit import attempt_at

from pipeline.errors import CheckpointError
from pipeline.storage import FileStore, Store, open_store
from pipeline.storage.s3 import S3Store
from pipeline.training.checkpoints import format as checkpoints
from pipeline.training.checkpoints import position
from pipeline.training.checkpoints.format import (
    CheckpointManifest,
    check_cursor,
    newest_checkpoint,
    open_checkpoint,
    resume_point,
)
from pipeline.training.checkpoints.host_copy import HostCopy
from pipeline.training.checkpoints.position import opened_on_all_ranks
from pipeline.training.checkpoints.retention import Pruner, Retention
from pipeline.training.checkpoints.saver import write_part
from pipeline.training.engine.deepspeed_engine import KINDS, Fragment
from pipeline.training.guard import FRESH
from pipeline.training.world import World, enter_world

SHAPES = {"encoder.weight": [5, 7], "encoder.bias": [11]}
CURSOR = {"dataset": "d" * 8, "global_batch": 13, "seed": 5}


def value(kind: str, name: str, step: int) -> torch.Tensor:
    """Return the values of a parameter at a step: every number encodes kind, parameter, step and index."""
    count = int(np.prod(SHAPES[name]))
    return (
        torch.arange(count, dtype=torch.float32) + 1000 * step + 100 * KINDS.index(kind) + 50 * (name == "encoder.bias")
    )


def save(store: Store, step: int, *, ranks: int = 3) -> str:
    """Write a checkpoint as `ranks` ranks leave it: each parameter in uneven pieces, one per rank."""
    folder = checkpoints.checkpoint_folder(step)
    files = []
    for rank in range(ranks):
        fragments = []
        for name in SHAPES:
            for kind in KINDS:
                whole = value(kind, name, step)
                start, stop = rank * len(whole) // ranks, (rank + 1) * len(whole) // ranks
                fragments.append(Fragment(name, kind, start, whole[start:stop]))
        copy = HostCopy(fragments)
        copy.take(fragments)
        files.append(write_part(store, folder, copy, World(rank, ranks, torch.device("cpu"), None)))
    files.append(checkpoints.write_history(store, folder, [{"step": 1, "loss": 0.5}, {"step": step, "loss": 0.25}]))
    manifest = CheckpointManifest(
        global_step=step,
        optimizer_steps=step - 1,
        cursor=CURSOR,
        ids_digest=2**64 - 1,
        parameters=SHAPES,
        world_size=ranks,
        zero_stage=1,
        files=tuple(files),
    )
    checkpoints.commit(store, folder, manifest)
    return folder


def file_of(root: Path, key: str, name: str) -> Path:
    path = root / key / name
    path.chmod(0o644)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 16
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Layout and contents


def test_the_layout_is_the_documented_one(tmp_path):
    folder = save(FileStore(tmp_path), 100, ranks=2)
    assert folder == "checkpoints/step-00000100"
    names = sorted(path.name for path in (tmp_path / folder).iterdir())
    assert names == [
        "history.jsonl",
        "manifest.json",
        "rank-0000-of-0002.safetensors",
        "rank-0001-of-0002.safetensors",
    ]
    with safe_open(tmp_path / folder / "rank-0001-of-0002.safetensors", framework="pt") as tensors:
        held = tensors.get_tensor("exp_avg|encoder.bias|5")  # any safetensors library reads it
    assert torch.equal(held, value("exp_avg", "encoder.bias", 100)[5:])
    manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
    assert [file["name"] for file in manifest["files"]] == [names[2], names[3], names[0]]
    assert all(file["bytes"] == (tmp_path / folder / file["name"]).stat().st_size for file in manifest["files"])


def test_any_range_of_any_parameter_is_put_together(tmp_path):
    store = FileStore(tmp_path)
    with open_checkpoint(store, save(store, 3)) as checkpoint:
        for name in SHAPES:
            for kind in KINDS:
                whole = value(kind, name, 3)
                for start in range(len(whole)):
                    for stop in range(start + 1, len(whole) + 1):
                        assert torch.equal(checkpoint.read(name, kind, start, stop - start), whole[start:stop])
        weights = checkpoint.weights()
        assert weights.keys() == SHAPES.keys()
        assert torch.equal(weights["encoder.weight"], value("weight", "encoder.weight", 3).reshape(5, 7))
        assert checkpoint.history() == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25}]
        assert (checkpoint.manifest.ids_digest, checkpoint.manifest.optimizer_steps) == (2**64 - 1, 2)


def test_a_module_gets_its_weights_or_the_error_names_the_first_parameter_that_differs(tmp_path):
    store = FileStore(tmp_path)
    with open_checkpoint(store, save(store, 3)) as checkpoint:
        module = torch.nn.ModuleDict({"encoder": torch.nn.Bilinear(1, 7, 5)})
        with pytest.raises(CheckpointError, match=r"encoder.bias is \[11\] there, \[5\] here"):
            checkpoint.load_into(module)
        module.encoder.weight = torch.nn.Parameter(torch.zeros(5, 7))
        module.encoder.bias = torch.nn.Parameter(torch.zeros(11))
        checkpoint.load_into(module)
        assert torch.equal(module.encoder.weight, value("weight", "encoder.weight", 3).reshape(5, 7))
        assert torch.equal(module.encoder.bias, value("weight", "encoder.bias", 3))
        module.encoder.more = torch.nn.Parameter(torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"encoder.more is absent there, \[1\] here"):
            checkpoint.load_into(module)


def test_values_that_are_not_there_are_counted_and_named(tmp_path):
    store = FileStore(tmp_path)
    with open_checkpoint(store, save(store, 3)) as checkpoint:
        with pytest.raises(
            CheckpointError, match=r"step-00000003: 4 of 10 values of exp_avg of encoder.bias are missing"
        ):
            checkpoint.read("encoder.bias", "exp_avg", 5, 10)
        with pytest.raises(CheckpointError, match=r"1 of 1 values of weight of decoder.bias"):
            checkpoint.read("decoder.bias", "weight", 0, 1)


def test_a_position_in_another_order_is_refused_by_field(tmp_path):
    store = FileStore(tmp_path)
    with open_checkpoint(store, save(store, 3)) as checkpoint:
        check_cursor(checkpoint, dict(CURSOR))
        with pytest.raises(CheckpointError, match=r"global_batch was 13, is now 26"):
            check_cursor(checkpoint, CURSOR | {"global_batch": 26})
        with pytest.raises(CheckpointError, match=r"lanes was None, is now 64"):
            check_cursor(checkpoint, CURSOR | {"lanes": 64})
        with pytest.raises(CheckpointError, match=r"seed was 5, is now None"):
            check_cursor(checkpoint, {key: CURSOR[key] for key in ("dataset", "global_batch")})


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", ["rank-0001-of-0003.safetensors", "history.jsonl"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(tmp_path, caplog, name, harm):
    attempt = attempt_at(tmp_path)
    save(attempt.store, 3)
    last = save(attempt.store, 6)
    harm(file_of(tmp_path / "g0001", last, name))
    with caplog.at_level(logging.WARNING), newest_checkpoint(attempt) as checkpoint:
        assert checkpoint.key == "g0001/checkpoints/step-00000003"
        assert torch.equal(checkpoint.read("encoder.bias", "weight", 0, 11), value("weight", "encoder.bias", 3))
    assert f"g0001/checkpoints/step-00000006/{name} is" in caplog.text
    assert "The checkpoint before it is used" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"files": []}'])
def test_a_manifest_that_cannot_be_read_refuses_its_checkpoint(tmp_path, caplog, text):
    attempt = attempt_at(tmp_path)
    save(attempt.store, 3)
    file_of(tmp_path / "g0001", save(attempt.store, 6), "manifest.json").write_text(text)
    with newest_checkpoint(attempt) as checkpoint:
        assert checkpoint.manifest.global_step == 3
    assert "step-00000006/manifest.json is damaged" in caplog.text


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    store = FileStore(tmp_path)
    folder = save(store, 6)
    manifest = checkpoints.read_manifest(store, folder)
    checkpoints.commit(store, folder, replace(manifest, schema=2))
    with pytest.raises(CheckpointError, match="schema 2, this version reads 1"):
        open_checkpoint(store, folder)


def test_a_torn_checkpoint_does_not_exist(tmp_path):
    """Killed before the manifest was written: it is ignored, and opening it says that it was never committed."""
    attempt = attempt_at(tmp_path)
    save(attempt.store, 3)
    torn = save(attempt.store, 6)
    (tmp_path / "g0001" / torn / "manifest.json").unlink()
    with newest_checkpoint(attempt) as checkpoint:
        assert checkpoint.manifest.global_step == 3
    assert resume_point(attempt.root) == "g0001/checkpoints/step-00000003"
    with pytest.raises(CheckpointError, match="was never committed"):
        open_checkpoint(attempt.store, torn)


def test_if_all_are_damaged_training_does_not_start_from_nothing(tmp_path):
    attempt = attempt_at(tmp_path)
    for step in (3, 6):
        flip(file_of(tmp_path / "g0001", save(attempt.store, step), "rank-0000-of-0003.safetensors"))
    for again in (attempt, attempt_at(tmp_path)):  # its own generation, and the next one
        with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(.*step-00000006.*step-00000003.*\)"):
            newest_checkpoint(again)


def test_a_checkpoint_that_vanished_is_not_taken_for_a_fresh_start(tmp_path):
    first = attempt_at(tmp_path)
    save(first.store, 3)
    second = attempt_at(tmp_path)
    for path in (tmp_path / "g0001").rglob("*.json"):
        path.unlink()
    for attempt in (second, attempt_at(tmp_path)):  # the next driver does not forget it either
        with pytest.raises(CheckpointError, match="g0001/checkpoints/step-00000003 is gone"):
            newest_checkpoint(attempt)


def test_without_any_checkpoint_training_starts_from_nothing(tmp_path):
    assert resume_point(FileStore(tmp_path)) == ""
    assert newest_checkpoint(attempt_at(tmp_path)) is None
    assert newest_checkpoint(attempt_at(tmp_path)) is None  # the generation before it left none either


# ---------------------------------------------------------------------------------------------------------------------
# Generations


def test_the_own_generation_wins_then_what_it_continues_from(tmp_path):
    first = attempt_at(tmp_path)
    for step in (3, 6):
        save(first.store, step)
    second = attempt_at(tmp_path)
    assert second.continues == "g0001/checkpoints/step-00000006"
    save(first.store, 9)  # by a superseded driver: never read
    with newest_checkpoint(second) as checkpoint:
        assert checkpoint.key == "g0001/checkpoints/step-00000006"
    save(second.store, 8)
    with newest_checkpoint(second) as checkpoint:
        assert checkpoint.key == "g0002/checkpoints/step-00000008"
    assert attempt_at(tmp_path).continues == "g0002/checkpoints/step-00000008"


def test_older_ones_are_found_along_the_recorded_parents(tmp_path, caplog):
    """Generation 3 continues from 1, since 2 left nothing; when that one is damaged, the one before it in 1."""
    first = attempt_at(tmp_path)
    for step in (3, 6):
        save(first.store, step)
    assert attempt_at(tmp_path).continues == "g0001/checkpoints/step-00000006"
    third = attempt_at(tmp_path)
    assert third.continues == "g0001/checkpoints/step-00000006"
    own = save(third.store, 9)
    for root, key in ((tmp_path / "g0003", own), (tmp_path / "g0001", checkpoints.checkpoint_folder(6))):
        flip(file_of(root, key, "rank-0002-of-0003.safetensors"))
    with newest_checkpoint(third) as checkpoint:
        assert checkpoint.key == "g0001/checkpoints/step-00000003"
    assert [("step-00000009" in line, "step-00000006" in line) for line in caplog.messages] == [
        (True, False),
        (False, True),
    ]


def test_a_generation_above_9999_finds_its_parent(tmp_path):
    attempt = attempt_at(tmp_path)
    high = replace(attempt, generation=10_000)
    attempt.root.write("gen/10000.json", json.dumps({"continues": ""}).encode())
    save(high.store, 3)
    above = attempt_at(tmp_path)
    assert (above.generation, above.continues) == (10_001, "g10000/checkpoints/step-00000003")
    with newest_checkpoint(above) as checkpoint:
        assert checkpoint.manifest.global_step == 3


def test_a_rollback_finds_the_newest_from_before_and_never_one_of_a_line_that_was_given_up(tmp_path):
    first = attempt_at(tmp_path)
    for step in (10, 20, 30):
        save(first.store, step)
    second = attempt_at(tmp_path)
    for step in (40, 50):
        save(second.store, step)

    def found(undo, stepped_over=()) -> str:
        checkpoint = checkpoints.rollback_checkpoint(second, undo, stepped_over)
        with checkpoint:
            return checkpoint.key

    assert found((35, 52)) == "g0001/checkpoints/step-00000030"
    assert found((40, 52)) == "g0002/checkpoints/step-00000040"
    assert found((48, 52), [(25, 41)]) == "g0001/checkpoints/step-00000020"
    assert (
        found((48, 52), [(20, 41)]) == "g0001/checkpoints/step-00000020"
    )  # at the start of the skipped range all was well
    assert found((5, 52)) == "g0001/checkpoints/step-00000010"  # the oldest there is
    flip(file_of(tmp_path / "g0001", checkpoints.checkpoint_folder(30), "rank-0002-of-0003.safetensors"))
    assert found((35, 52)) == "g0001/checkpoints/step-00000020"
    assert checkpoints.rollback_checkpoint(second, (0, 52), ()) is None  # the range starts at step 0
    with pytest.raises(CheckpointError, match="no checkpoint from before step 9 is left"):
        checkpoints.rollback_checkpoint(second, (5, 9), ())
    assert checkpoints.rollback_checkpoint(attempt_at(tmp_path / "new"), (5, 9), ()) is None


def test_manifests_from_before_there_was_a_guard_are_read(tmp_path):
    store = FileStore(tmp_path)
    folder = save(store, 3)
    body = json.loads(store.read(f"{folder}/manifest.json"))
    del body["guard"]
    store.write(f"{folder}/manifest.json", json.dumps(body).encode())
    assert checkpoints.read_manifest(store, folder).guard == FRESH


# ---------------------------------------------------------------------------------------------------------------------
# Upkeep


class Recording(FileStore):
    """A folder that records what is deleted, in order."""

    deleted: list[str] = []  # noqa: RUF012 - one store in one test

    def delete(self, key):
        self.deleted.append(key)
        super().delete(key)


def test_only_the_newest_are_kept_and_manifests_go_first(tmp_path):
    store = Recording(tmp_path)
    for step in (3, 6, 9, 12):
        save(store.at("g0001"), step)
    Pruner(store, 1, Retention(last=2, every_steps=None, best=0)).prune()
    left = {info.key.split("/")[2] for info in store.list("g0001/checkpoints/")}
    assert left == {"step-00000009", "step-00000012"}
    for step in ("step-00000003", "step-00000006"):
        of_step = [key for key in store.deleted if step in key]
        assert of_step[0] == f"g0001/checkpoints/{step}/manifest.json"
        assert len(of_step) == 5


def test_a_bucket_serves_checkpoints_and_leaves_nothing_on_the_local_disk(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = S3Store(s3_bucket, "step")
    folder = save(store, 3)
    with open_checkpoint(store, folder) as checkpoint:
        assert torch.equal(
            checkpoint.read("encoder.weight", "weight", 2, 30), value("weight", "encoder.weight", 3)[2:32]
        )
    assert list(tmp_path.iterdir()) == []
    data = bytearray(store.read(f"{folder}/history.jsonl"))
    data[3] ^= 1
    store.write(f"{folder}/history.jsonl", bytes(data))
    with pytest.raises(CheckpointError, match=r"history.jsonl is damaged"):
        open_checkpoint(store, folder)
    store.delete(f"{folder}/rank-0002-of-0003.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-0002-of-0003.safetensors is missing"):
        open_checkpoint(store, folder)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Ranks of one node


def opened_by_rank(folder: Path, key: str, *, local_rank_of_rank_1: int) -> tuple[int, int, float, int]:
    """Open a bucket's checkpoint on all ranks; return downloads, hashes, the sum of its weights, and its rows."""
    world = enter_world()
    local_rank = local_rank_of_rank_1 if world.rank else 0
    store, hashed, plain = CountingStore(folder), [], checkpoints._size_and_hash
    position.open_store = lambda uri: store
    checkpoints._size_and_hash = lambda path: hashed.append(path) or plain(path)
    try:
        with opened_on_all_ranks(
            replace(world, local_rank=local_rank), lambda: open_checkpoint(store, key)
        ) as checkpoint:
            if world.rank:
                world.all_gather("rank 0 has closed its checkpoint")
            weights = sum(float(tensor.sum()) for tensor in checkpoint.weights().values())
            rows = len(checkpoint.history())
        if not world.rank:
            world.all_gather("rank 0 has closed its checkpoint")
    finally:
        position.open_store, checkpoints._size_and_hash = open_store, plain
    return len(store.downloads), len(hashed), weights, rows


@dataclass(frozen=True)
class CountingStore(DistantStore):
    """A bucket that counts downloads."""

    downloads: list[str] = field(default_factory=list)

    def download(self, key, path):
        self.downloads.append(key)
        super().download(key, path)


@pytest.mark.parametrize(("local_rank_of_rank_1", "fetched"), [(1, 0), (0, 4)])
def test_ranks_of_a_node_share_one_download_and_one_hash(teams, tmp_path, local_rank_of_rank_1, fetched):
    """Rank 1 still reads the files after rank 0, on the same node, has removed them."""
    key = save(FileStore(tmp_path), 3)
    first, second = teams(2).run(partial(opened_by_rank, local_rank_of_rank_1=local_rank_of_rank_1), tmp_path, key)
    weights = sum(float(value("weight", name, 3).sum()) for name in SHAPES)
    assert first == (4, 4, weights, 2)
    assert second == (fetched, fetched, weights, 2)


def test_a_verified_file_that_is_not_here_or_has_another_size_is_fetched(tmp_path):
    store = CountingStore(tmp_path)
    key = save(store, 3)
    with open_checkpoint(store, key) as checkpoint:
        elsewhere = dict(checkpoint.paths)
        elsewhere["history.jsonl"] = tmp_path / "of another node"
        store.downloads.clear()
        truncate(elsewhere["rank-0002-of-0003.safetensors"])
        with open_checkpoint(store, key, verified=elsewhere) as again:
            assert again.history() == checkpoint.history()
    names = {name.rpartition("/")[2] for name in store.downloads}
    assert {"history.jsonl", "rank-0002-of-0003.safetensors"} <= names
    assert "rank-0001-of-0003.safetensors" not in names
