"""Which checkpoints are scored while training goes on: one at a time, the newest first, and never at the cost of the training."""

import json
import threading
import time

import pytest
from training_kit import attempt_at

from pipeline.errors import PipelineError
from pipeline.training.meters.milestones import PIN, Milestones
from pipeline.training.meters.telemetry import METRICS, milestone_columns, progress_fields

PATIENCE_S = 30


def key(step: int) -> str:
    return f"g0001/checkpoints/step-{step:08d}"


class Task:
    """A task that ends when it is let go."""

    def __init__(self, scored: str, outcome):
        self.key, self.outcome = scored, outcome
        self.may_end, self.cancelled = threading.Event(), False

    def ready(self, *, timeout_s):
        return self.may_end.wait(timeout_s)

    def result(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.cancelled = True


class Cluster:
    """Starts tasks while there is room."""

    def __init__(self, *, room=True, outcome=None):
        self.room, self.outcome, self.tasks = room, outcome or {"knn": 0.5, "held_out_loss": 0.25}, []

    def start(self, scorer, root_uri, scored):
        if not self.room:
            return None
        self.tasks.append(Task(scored, self.outcome))
        return self.tasks[-1]


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def attempt(tmp_path):
    return attempt_at(tmp_path / "pretrain")


def begun(attempt, cluster):
    return Milestones(lambda *_: {}, attempt, cluster.start)


def test_a_checkpoint_is_scored_once_and_kept_meanwhile(attempt):
    cluster = Cluster()
    milestones = begun(attempt, cluster)
    milestones.committed(key(4))
    until(lambda: cluster.tasks)
    assert json.loads(attempt.root.read(PIN))["checkpoint"] == key(4)
    assert milestones.take() == {}
    cluster.tasks[0].may_end.set()
    until(lambda: attempt.root.exists("milestones/step-00000004.json"))
    assert not attempt.root.exists(PIN)
    assert milestones.take() == {"step": 4, "knn": 0.5, "held_out_loss": 0.25, "dropped": 0}
    assert (milestones.take(), dict(milestones.latest)) == ({}, {"knn": 0.5, "held_out_loss": 0.25})
    written = json.loads(attempt.root.read("milestones/step-00000004.json"))
    assert (written["step"], written["scores"]) == (4, {"knn": 0.5, "held_out_loss": 0.25})
    milestones.close()


def test_those_overtaken_while_another_is_scored_are_dropped_and_counted(attempt):
    cluster = Cluster()
    milestones = begun(attempt, cluster)
    milestones.committed(key(1))
    until(lambda: cluster.tasks)
    for step in (2, 3, 4):
        milestones.committed(key(step))
    cluster.tasks[0].may_end.set()
    until(lambda: len(cluster.tasks) == 2)
    cluster.tasks[1].may_end.set()
    until(lambda: milestones.take().get("step") == 4)
    assert [task.key for task in cluster.tasks] == [key(1), key(4)]
    assert milestones.dropped == 2
    milestones.close()


def test_without_room_the_newest_waits_and_the_others_are_dropped(attempt):
    cluster = Cluster(room=False)
    milestones = begun(attempt, cluster)
    milestones.committed(key(1))
    until(lambda: attempt.root.exists(PIN))
    milestones.committed(key(2))
    until(lambda: milestones.dropped == 1)
    cluster.room = True
    milestones.committed(key(3))
    until(lambda: cluster.tasks)
    assert cluster.tasks[0].key == key(3)
    milestones.close()
    assert cluster.tasks[0].cancelled  # training has ended, and nobody waits for it
    assert not attempt.root.exists(PIN)


@pytest.mark.parametrize("error", [PipelineError("its process died"), RuntimeError("singular")])
def test_one_that_fails_is_said_and_the_next_is_scored(attempt, caplog, error):
    cluster = Cluster(outcome=error)
    milestones = begun(attempt, cluster)
    milestones.committed(key(1))
    until(lambda: cluster.tasks)
    cluster.tasks[0].may_end.set()
    until(lambda: milestones.dropped == 1)
    assert f"checkpoint {key(1)} is not scored: {error}" in caplog.text
    cluster.outcome = {"rankme": 3.0}
    milestones.committed(key(2))
    until(lambda: len(cluster.tasks) == 2)
    cluster.tasks[1].may_end.set()
    until(lambda: milestones.take() == {"step": 2, "rankme": 3.0, "dropped": 1})
    milestones.close()


def test_without_a_scorer_nothing_happens(attempt):
    milestones = Milestones(None, attempt)
    milestones.committed(key(1))
    assert milestones.take() == {}
    milestones.close()


def test_columns_stand_at_the_images_that_the_checkpoint_had_seen():
    columns = milestone_columns(
        {"step": 10, "knn": 0.5, "probe": 0.6, "held_out_loss": 0.4, "dropped": 1}, global_batch=13
    )
    assert columns == {
        "milestone_images": 130,
        "milestone_knn": 0.5,
        "milestone_probe": 0.6,
        "milestone_held_out_loss": 0.4,
        "milestones_dropped": 1,
    }
    assert columns.keys() <= METRICS.keys()
    row = dict.fromkeys(
        (
            *[
                "substitutions",
                "decode_restarts",
                "skipped_steps",
                "stepped_over",
                "data_wait",
                "mfu",
                "checkpoint_wait",
            ],
            "loss",
        ),
        0.0,
    )
    line = progress_fields({**row, "process_gib": 1.0, "images_per_s": 9.0, **columns})
    assert (line["knn"], line["probe"], line["held out loss"]) == (0.5, 0.6, 0.4)
