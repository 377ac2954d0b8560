"""MLflow away for 2 minutes while `mae run` trains, and once more when `mae run` itself is killed: the curve stays whole."""

import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from mlflow_kit import Server, points_of, wait_for
from run_kit import ROOT, document, end_with_parent, environment, write_config, write_images

from pipeline.storage import open_store
from pipeline.tracking import Journal, client_of
from pipeline.tracking.curves.journal import JournalCursor
from pipeline.training.checkpoints.format import committed, open_checkpoint

pytestmark = pytest.mark.system
AWAY_S = 120


@contextlib.contextmanager
def mae_run(config):
    """`mae run` in a process of its own."""
    call = [sys.executable, "-m", "jobs.cli", "run", str(config), "--in-process"]
    with (config.parent / "run.log").open("a") as output:
        process = subprocess.Popen(
            call, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stdout=output, stderr=output, start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(tmp_path):
    with Server(tmp_path) as made:
        made.start()
        yield made


@pytest.fixture
def config(tmp_path, server):
    """A pretraining that has not ended when the test has."""
    content = document(tmp_path / "store", write_images(tmp_path / "images", 60))
    content["pretrain"] |= {"epochs": 100_000}
    content["resources"] = {"micro_batch": 8, "log_every_steps": 5, "checkpoint_every_steps": 200}
    content["tracking"] = {"uri": server.address}
    return write_config(tmp_path / "run.yaml", content)


def test_two_minutes_without_a_server(config, server, tmp_path):
    with mae_run(config) as process:
        run = wait_for_run(server)
        wait_for(lambda: sent(server, run) > 100, within_s=120)
        server.kill()
        away_from = time.time()
        time.sleep(AWAY_S)
        back_at = time.time()
        assert process.poll() is None
        assert last_step(tmp_path) > sent(server, run) + 500
        server.start()
        behind = last_step(tmp_path)
        wait_for(lambda: sent(server, run) > behind, within_s=90)
        stop(process)
    check_curve(tmp_path, server, run)
    times = [row["time"] for row in history(tmp_path)]
    during = [b - a for a, b in pairwise(times) if away_from < a and b < back_at]
    without = [b - a for a, b in pairwise(times) if b < away_from or a > back_at]
    for name, waits in (("away", during), ("there", without)):
        sys.stdout.write(
            f"server {name}: 5 steps take {1000 * statistics.median(waits):.1f} ms (median of {len(waits)}), 99 of 100 at most "
            f"{1000 * sorted(waits)[int(0.99 * len(waits))]:.0f} ms, the longest {1000 * max(waits):.0f} ms\n"
        )
    assert max(during) < 5  # a call that waits for a server takes 20 s


def test_a_run_killed_while_there_is_no_server(config, server, tmp_path):
    with mae_run(config) as process:
        run = wait_for_run(server)
        wait_for(lambda: sent(server, run) > 100, within_s=120)
        server.kill()
        begun = last_step(tmp_path)
        wait_for(lambda: last_step(tmp_path) > begun + 200, within_s=90)
        process.kill()
    assert sent(server, run) < last_step(tmp_path)
    server.start()
    with mae_run(config) as process:
        begun = last_step(tmp_path)
        wait_for(lambda: sent(server, run) > begun + 200, within_s=120)
        stop(process)
    check_curve(tmp_path, server, run)


def sent(server, run) -> int:
    """The last step that MLflow has."""
    return max((step for step, _ in points_of(server.database, run, "train/loss")), default=0)


def stop(process) -> None:
    """As Ctrl-C does: it saves, and says that it can go on."""
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 3


def check_curve(folder, server, run):
    """Every logged step once, with the value that the history in the newest checkpoint has."""
    rows = history(folder)
    sys.stdout.write(f"{len(rows)} points in the history and in MLflow, the last at step {rows[-1]['step']}\n")
    assert [row["step"] for row in rows] == list(range(5, 5 * len(rows) + 5, 5))
    for name, key in (("train/loss", "loss"), ("train/lr", "lr")):
        points = points_of(server.database, run, name)
        assert Counter(step for step, _ in points) == Counter(row["step"] for row in rows)
        assert points == [(row["step"], row[key]) for row in rows]


def step_directory(folder):
    (found,) = (folder / "store").glob("pretrain-*")
    return open_store(str(found))


def history(folder):
    root = step_directory(folder)
    with open_checkpoint(root, next(committed(root))) as checkpoint:
        return checkpoint.history()


def last_step(folder) -> int:
    """The last step in the newest generation's journal."""
    root = step_directory(folder)
    generations = sorted({info.key[:5] for info in root.list("g") if "/journal/part-" in info.key})
    journal, cursor, last = Journal(root.at(generations[-1])), JournalCursor(), 0
    while (found := journal.after(cursor))[0]:
        last, cursor = found[0][-1].step, found[1]
    return last


def wait_for_run(server) -> str:
    """The pretraining's run."""

    def found():
        client = client_of(server.address)
        experiment = client.get_experiment_by_name("mae-toy")
        runs = client.search_runs([experiment.experiment_id], "tags.`mae.step` = 'pretrain'") if experiment else []
        return runs[0].info.run_id if runs else ""

    wait_for(found, within_s=120)
    return found()
