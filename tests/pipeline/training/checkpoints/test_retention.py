"""Which checkpoints are kept: decided from numbers, then carried out in a folder."""

import json
import math
from dataclasses import replace

import pytest
from training_kit import attempt_at

from pipeline.graph.receipts import claim
from pipeline.training.checkpoints.format import (
    CheckpointManifest,
    checkpoint_folder,
    commit,
    newest_checkpoint,
    resume_point,
    write_history,
)
from pipeline.training.checkpoints.retention import (
    MILESTONES,
    Pruner,
    Retention,
    StoredCheckpoint,
    keys_to_keep,
    referenced_checkpoints,
)

LOSSES = {10: 0.5, 20: 0.2, 30: 0.4, 40: 0.2, 50: math.nan, 60: 0.3}
HELD = [StoredCheckpoint(f"s{step}", step, loss) for step, loss in LOSSES.items()]
BARE = Retention(last=1, every_steps=None, best=0)


@pytest.mark.parametrize(
    ("changes", "named", "steps"),
    [
        ({}, (), {60}),
        ({"last": 3}, (), {40, 50, 60}),
        ({"last": 99}, (), set(LOSSES)),
        ({"every_steps": 20}, (), {20, 40, 60}),
        ({"best": 1}, (), {40, 60}),  # the later of two equal ones
        ({"best": 3}, (), {20, 40, 60}),
        ({"best": 99}, (), {10, 20, 30, 40, 60}),  # one without a loss is never among the best
        ({}, ("s10", "elsewhere"), {10, 60}),
        ({"last": 2, "every_steps": 30, "best": 1}, ("s10",), {10, 30, 40, 50, 60}),
    ],
)
def test_which_are_kept(changes, named, steps):
    expected = {f"s{step}" for step in steps}
    assert keys_to_keep(HELD, replace(BARE, **changes), referenced=named) == expected
    assert keys_to_keep(HELD[::-1], replace(BARE, **changes), referenced=named) == expected


def put(attempt, step, loss=None):
    """Write a checkpoint without values."""
    rows = write_history(attempt.store, checkpoint_folder(step), [{"step": step, "loss": 1.0}])
    manifest = CheckpointManifest(
        global_step=step,
        optimizer_steps=step,
        cursor={},
        ids_digest=0,
        parameters={},
        world_size=1,
        zero_stage=1,
        files=(rows,),
        loss=loss,
    )
    commit(attempt.store, checkpoint_folder(step), manifest)


def steps_left(attempt):
    keys = attempt.root.list(f"g{attempt.generation:04d}/checkpoints/")
    return sorted({int(info.key.split("/")[2][5:]) for info in keys})


def test_the_best_are_kept_and_a_damaged_one_is_not_among_them(tmp_path):
    attempt = attempt_at(tmp_path)
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2), (4, None), (5, 0.9)):
        put(attempt, step, loss)
    attempt.store.write(f"{checkpoint_folder(1)}/manifest.json", b"{")
    Pruner(attempt.root, 1, replace(BARE, best=1)).prune()
    assert steps_left(attempt) == [3, 5]


def test_a_fenced_run_does_not_remove_what_the_next_one_continues_from(tmp_path):
    zombie = attempt_at(tmp_path)
    put(zombie, 1)
    put(zombie, 2)
    following = attempt_at(tmp_path)
    assert following.continues == "g0001/checkpoints/step-00000002"
    for step in (3, 4):
        put(zombie, step)
        Pruner(zombie.root, 1, BARE).prune()
    assert steps_left(zombie) == [2, 4]
    with newest_checkpoint(following) as checkpoint:
        assert checkpoint.key == following.continues


def test_receipt_claims_and_pins_keep_checkpoints(tmp_path):
    attempt = attempt_at(tmp_path)
    for step in range(1, 6):
        put(attempt, step)
    body = {"step": "s", "fingerprint": "f", "identity": {}, "facts": {}, "files": [], "generation": 1}
    body["made"] = {"notes": {"checkpoint": "g0001/checkpoints/step-00000001"}}
    attempt.root.write("receipt.json", json.dumps(body).encode())
    claim(attempt.root, continues="g0001/checkpoints/step-00000002")
    attempt.root.write("pins/fork.json", json.dumps({"checkpoint": "g0001/checkpoints/step-00000003"}).encode())
    referenced = set(referenced_checkpoints(attempt.root, above=1))
    assert referenced == {f"g0001/checkpoints/step-{step:08d}" for step in (1, 2, 3)}
    Pruner(attempt.root, 1, BARE).prune()
    assert steps_left(attempt) == [1, 2, 3, 5]
    assert resume_point(attempt.root) == "g0001/checkpoints/step-00000002"


def test_the_best_by_a_score_of_milestones_are_kept_once_it_is_known(tmp_path):
    attempt = attempt_at(tmp_path)
    pruner = Pruner(attempt.root, 1, replace(BARE, best=1, by="knn"))
    for step, loss in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.9)):
        put(attempt, step, loss)
    for step, scores in ((1, {"knn": 0.2}), (2, {"knn": 0.7, "held_out_loss": 0.1}), (3, {"rankme": 9.0})):
        attempt.root.write(f"{MILESTONES}step-{step:08d}.json", json.dumps({"step": step, "scores": scores}).encode())
    pruner.prune()
    assert steps_left(attempt) == [2, 4]
    attempt.root.write(f"{MILESTONES}step-00000004.json", json.dumps({"step": 4, "scores": {"knn": 0.8}}).encode())
    put(attempt, 5)
    pruner.prune()
    assert steps_left(attempt) == [4, 5]
