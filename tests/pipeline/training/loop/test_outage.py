"""MLflow's server hangs, dies and comes back while a real training runs, whose process is killed too: the curve is whole."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from mlflow_kit import Server, points_of, wait_for
from training_kit import Team, TeamError, attempt_at, mae_spec, napping

from pipeline import tracking
from pipeline.tracking import Journal, names
from pipeline.tracking.curves.journal import JournalCursor
from pipeline.training.checkpoints.format import newest_checkpoint
from pipeline.training.launch import run_worker

EPOCHS, STEPS = 87, 402
PACE_S = 0.02
"""Of a step, at least: there must be time to kill something."""


@pytest.fixture
def killable(tmp_path):
    """A process to train in, which nobody else needs."""
    team = Team(1, tmp_path)
    yield team
    team.close()


@pytest.mark.system
def test_a_training_neither_waits_nor_loses_nor_repeats_a_point(teams, killable, shards, tmp_path):
    with Server(tmp_path) as server:
        server.start()
        tags = {names.RUN_TAG: "run", names.DIGEST_TAG: "d", names.STORE_TAG: "s"}
        parent = tracking.open_parent(
            server.address, experiment="e", name="run", attempt="a", tags=tags, params={}
        ).run_id
        run = tracking.open_child(
            server.address, experiment="e", parent_run_id=parent, name="step", fingerprint="f" * 64, tags={}, params={}
        )
        told = {"tracking_uri": server.address, "mlflow_run_id": run}
        first = replace(attempt_at(tmp_path / "step", checkpoint_every_steps=40, micro_batch=13), **told)
        spec = napping(mae_spec(shards, first, epochs=EPOCHS), PACE_S)
        ended: list[BaseException] = []
        training = threading.Thread(target=lambda: ended.append(_outcome(killable, spec, first)))
        training.start()
        wait_for(lambda: points_of(server.database, run, "train/loss"), within_s=60)
        server.hang()  # takes connections, says nothing: a caller waits out its 20 s
        seen = steps_of(Journal(first.store))
        wait_for(lambda: steps_of(Journal(first.store)) >= seen + 60 and newest_step(first) > 40, within_s=15)
        server.kill()
        killable.processes[0].kill()
        training.join()
        assert isinstance(ended[0], (TeamError, EOFError, ConnectionResetError))
        sent = len(points_of(server.database, run, "train/loss"))
        assert sent < steps_of(Journal(first.store))

        second = replace(attempt_at(tmp_path / "step", checkpoint_every_steps=40, micro_batch=13), **told)
        assert second.continues
        training = threading.Thread(target=lambda: ended.append(_outcome(teams(1), spec, second)))
        training.start()
        wait_for(lambda: steps_of(Journal(second.store)) > newest_step(first) + 20, within_s=60)
        assert len(points_of(server.database, run, "train/loss")) == sent
        server.start()
        training.join()
    with newest_checkpoint(second) as checkpoint:
        history = checkpoint.history()
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    for name, key in {"train/loss": "loss", "train/lr": "lr", "throughput/mfu": "mfu"}.items():
        points = points_of(server.database, run, name)
        assert Counter(step for step, _ in points) == Counter(row["step"] for row in history)
        if name != "throughput/mfu":  # deterministic: a replay measures the same
            assert points == [(row["step"], row[key]) for row in history]
    waits = [after["time"] - before["time"] for before, after in pairwise(history)]
    resumed = int(second.continues[-8:])
    assert max(wait for step, wait in enumerate(waits, 1) if step != resumed) < 5  # of the 20 s that a call waits


def _outcome(team, spec, attempt):
    try:
        return team.outcomes(run_worker, spec, attempt)[0]
    except (TeamError, EOFError, OSError) as error:
        return error


def newest_step(attempt) -> int:
    keys = [info.key for info in attempt.store.list("checkpoints/") if info.key.endswith("manifest.json")]
    return max((int(key.split("/")[1][5:]) for key in keys), default=0)


def steps_of(journal: Journal) -> int:
    """The last step written down."""
    cursor, last = JournalCursor(), 0
    while (found := journal.after(cursor))[0]:
        last, cursor = found[0][-1].step, found[1]
    return last
