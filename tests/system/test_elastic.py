"""Training on a real cluster of several nodes that come, go and die, and drivers that are killed, stopped and paused.

Whatever happens, the step ends in the undisturbed result: each sample as often, the same loss but for the order of sums."""

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_kit import Cluster, Node, cluster, until
from run_kit import ROOT, document, end_with_parent, environment, mae, migrated_database, write_config, write_images

from pipeline.graph.receipts import Receipt, read_receipt
from pipeline.storage import open_store
from pipeline.training.checkpoints.audit import audit
from pipeline.training.checkpoints.format import committed

__all__ = ["migrated_database"]
pytestmark = pytest.mark.system
EPOCHS = 300
TOTAL_STEPS = 1125  # 30 images in batches of 8
EVERY = 37
"""Steps from one checkpoint to the next."""
RARELY = {"checkpoint_every_steps": 1000}
"""Then a checkpoint before step 1000 was asked for."""
EARLY = 70
"""By this step, checkpoints are there and most of the training is not."""
RESERVED_S = 200
"""So long Ray Train keeps what a killed driver reserved for an elastic range: 180 s, looked at every 20 s."""
TOLERANCE = 1e-5
"""Of losses, relative: sums in another order, over 1125 steps in fp32."""


class Case:
    """A store in which all but pretraining is done, and drivers over it."""

    def __init__(self, folder: Path, undisturbed: Path, database: Path, env: dict[str, str]) -> None:
        self.folder, self.env, self.reference = folder, env, undisturbed
        shutil.copytree(
            undisturbed, folder / "store", ignore=shutil.ignore_patterns("pretrain-*", "report-*", "mlflow.db")
        )
        shutil.copy(database, folder / "store" / "mlflow.db")

    def config(self, **resources: Any) -> Path:
        return config_at(self.folder, self.folder / "store", self.reference.parent / "images", **resources)

    def drive(self, **resources: Any) -> subprocess.Popen[str]:
        """`mae run` on the cluster, beside us."""
        return start(self.config(**resources), self.env)

    @property
    def step(self) -> Path:
        return next((self.folder / "store").glob("pretrain-*"), self.folder / "none")

    def newest(self) -> dict[str, Any]:
        """The newest manifest on the committed line."""
        manifests = [json.loads(path.read_text()) for path in self.step.glob("g*/checkpoints/*/manifest.json")]
        return max(manifests, key=lambda manifest: manifest["global_step"], default={"global_step": 0})

    def logged(self) -> int:
        """Losses that are in MLflow's database."""
        with contextlib.closing(sqlite3.connect(f"file:{self.folder}/store/mlflow.db?mode=ro", uri=True)) as database:
            return int(database.execute("select count(*) from metrics where key = 'train/loss'").fetchone()[0])

    def await_training(self, driver: subprocess.Popen[str]) -> None:
        """Waits until some steps are done: under RARELY no checkpoint says so."""
        until(self.logged, alive=driver)

    def await_early_save(self, driver: subprocess.Popen[str] | None = None) -> None:
        """Waits, no longer than a grace, for a checkpoint before one is due under RARELY."""
        step = int(until(lambda: self.newest()["global_step"], within_s=30, alive=driver))
        assert 0 < step < RARELY["checkpoint_every_steps"]

    def await_step(self, step: int, driver: subprocess.Popen[str]) -> int:
        """Waits until one is committed; returns which it was."""
        return int(until(lambda: self.newest()["global_step"] >= step and self.newest()["global_step"], alive=driver))

    def check(self) -> Receipt:
        """The result is the undisturbed one, and what was trained on is what the order says."""
        receipt, expected = read(self.step), read(next(self.reference.glob("pretrain-*")))
        for fact in ("global_step", "ids_digest", "images_seen", "dataset_digest"):
            assert receipt.facts[fact] == expected.facts[fact], fact
        assert curve(receipt, self.step) == pytest.approx(
            curve(expected, next(self.reference.glob("pretrain-*"))), rel=TOLERANCE
        )
        audited = audit(open_store(str(self.step)))
        assert audited.agrees, audited.line
        assert (audited.global_step, audited.recorded_count) == (TOTAL_STEPS, TOTAL_STEPS * 8)
        return receipt


def read(step: Path) -> Receipt:
    receipt = read_receipt(open_store(str(step)))
    assert receipt is not None
    return receipt


def curve(receipt: Receipt, step: Path) -> list[float]:
    """The loss of every 50th step."""
    rows = (step / f"g{receipt.generation:04d}" / "history.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def config_at(folder: Path, store: Path, images: Path, **resources: Any) -> Path:
    content: dict[str, Any] = document(store, images)
    content["pretrain"]["epochs"] = EPOCHS
    content["evaluation"]["datasets"] = []
    content["resources"] |= {"checkpoint_every_steps": EVERY, "keep_checkpoints": 9, "log_every_steps": 50} | resources
    return write_config(folder / "run.yaml", content)


def start(config: Path, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(config), "--json", *options],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
    )


def ended(driver: subprocess.Popen[str], *, code: int, within_s: float = 200) -> str:
    """Waits for the driver; its standard error."""
    try:
        _, said = driver.communicate(timeout=within_s)
    finally:
        if driver.poll() is None:
            driver.kill()
    assert driver.returncode == code, said
    return said


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, migrated_database) -> Path:
    """The store of a run that nobody disturbs, in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "store").mkdir()
    shutil.copy(migrated_database, folder / "store" / "mlflow.db")
    config = config_at(folder, folder / "store", write_images(folder / "images", 40))
    done = mae("run", config, "--in-process", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return folder / "store"


@pytest.fixture
def case(tmp_path, undisturbed, migrated_database, nodes) -> Case:
    return Case(tmp_path, undisturbed, migrated_database, nodes.env)


def workers(*of: Node) -> list[int]:
    """How many training workers each node has."""
    return [len(node.workers()) for node in of]


# --- killed --------------------------------------------------------------------------------------------------------------------


def test_a_killed_worker(case, nodes):
    first, second = nodes.only("n1", "n2")
    driver = case.drive(workers=2)
    case.await_step(EARLY, driver)
    assert workers(first, second) == [1, 1]
    second.workers()[0].kill()
    ended(driver, code=0)
    case.check()


def test_a_killed_node_and_its_worker(case, nodes):
    """Two workers become one; nobody says so."""
    first, second = nodes.only("n1", "n2")
    driver = case.drive(workers=[1, 2])
    killed_at = case.await_step(EARLY, driver)
    assert case.newest()["world_size"] == 2
    second.kill()
    until(lambda: case.newest()["global_step"] > killed_at and case.newest()["world_size"] == 1, alive=driver)
    assert workers(first) == [1]
    ended(driver, code=0)
    assert killed_at < TOTAL_STEPS
    case.check()


def test_a_killed_driver(case, nodes):
    nodes.only("n1", "n2")
    driver = case.drive(workers=[1, 2])
    killed_at = case.await_step(EARLY, driver)
    driver.kill()
    driver.communicate()
    ended(case.drive(workers=[1, 2]), code=0, within_s=RESERVED_S + 200)
    receipt = case.check()
    assert receipt.generation == 2
    claim = json.loads((case.step / "gen/0002.json").read_text())
    assert killed_at <= int(claim["continues"][-8:]) < TOTAL_STEPS


# --- nodes that come and go ------------------------------------------------------------------------------------------------------


def test_a_node_that_is_added_is_used(case, nodes):
    nodes.only("n1")
    driver = case.drive(workers=[1, 2], checkpoint_every_steps=2, keep_checkpoints=TOTAL_STEPS)  # which also takes time
    until(lambda: workers(nodes.nodes["n1"]) == [1], alive=driver)
    nodes.add("n2")
    ended(driver, code=0)
    manifests = [json.loads(path.read_text()) for path in case.step.glob("g0001/checkpoints/*/manifest.json")]
    alone = [one["global_step"] for one in manifests if one["world_size"] == 1]
    together = [one["global_step"] for one in manifests if one["world_size"] == 2]
    assert max(together) == TOTAL_STEPS
    assert min(together) - max(alone) <= 2  # saved when there was room: nothing was trained twice
    assert case.check().generation == 1


def test_a_drained_node_is_left_with_a_checkpoint(case, nodes):
    """The notice of a spot machine: saved within the grace though no checkpoint is due, and training goes on beside it."""
    first, second = nodes.only("n1", "n2")
    driver = case.drive(workers=[1, 2], **RARELY)
    case.await_training(driver)
    nodes.drain("n2", deadline_s=30)
    case.await_early_save(driver)
    assert case.newest()["world_size"] == 2
    until(lambda: second.raylet() is None, within_s=30, alive=driver)  # nothing runs there any more: Ray ends it early
    until(lambda: workers(first) == [1], alive=driver)
    ended(driver, code=0)
    assert case.check().generation == 1


def test_a_drained_node_without_another_ends_in_code_3_and_the_same_command_goes_on(case, nodes):
    """SIGTERM to the node, as a deleted pod gets it; both workers are needed."""
    _, second = nodes.only("n1", "n2")
    driver = case.drive(workers=2, node_wait_s=3, **RARELY)
    case.await_training(driver)
    second.process.terminate()
    said = ended(driver, code=3, within_s=60)
    why = "the nodes that stay have no room for 2 workers, after 3 s"
    assert f"{why}; saved; the same command goes on from there" in said
    case.await_early_save()
    nodes.only("n1", "n2")
    ended(case.drive(workers=2), code=0)
    assert case.check().generation == 2


# --- asked to stop -------------------------------------------------------------------------------------------------------


def test_sigterm_to_the_driver_ends_in_code_3_and_the_same_command_goes_on(case, nodes):
    nodes.only("n1", "n2")
    driver = case.drive(workers=[1, 2], **RARELY)
    case.await_training(driver)
    driver.send_signal(signal.SIGTERM)
    said = ended(driver, code=3, within_s=30)
    assert "saved; the same command goes on from there" in said
    case.await_early_save()
    ended(case.drive(workers=1), code=0)
    assert case.check().generation == 2


def test_the_wall_clock_ends_in_code_3_in_time_and_the_same_command_goes_on(case, nodes):
    nodes.only("n1", "n2")
    began = time.monotonic()
    driver = case.drive(workers=[1, 2], wall_clock_s=45, grace_s=20)
    said = ended(driver, code=3, within_s=60)
    assert "wall_clock_s=45 is nearly over" in said
    assert time.monotonic() - began < 60  # the clock starts when the cluster has been joined
    assert "saved; the same command goes on from there" in said
    assert case.newest()["global_step"] < TOTAL_STEPS
    ended(case.drive(workers=1), code=0)
    assert case.check().generation == 2


def test_sigterm_to_a_worker_saves_and_goes_on(case, nodes):
    _, second = nodes.only("n1", "n2")
    driver = case.drive(workers=2, **RARELY)
    case.await_training(driver)
    second.workers()[0].terminate()
    case.await_early_save(driver)
    ended(driver, code=0)
    assert case.check().generation == 1


# --- zombies -------------------------------------------------------------------------------------------------------------


def test_what_a_paused_driver_writes_late_is_never_read(tmp_path, undisturbed, migrated_database):
    """Paused by SIGSTOP in the middle of a checkpoint, which it finishes after another driver has taken over and been stopped."""
    env = environment(OMP_NUM_THREADS="1")
    case = Case(tmp_path, undisturbed, migrated_database, env)
    config = case.config(checkpoint_every_steps=1, keep_checkpoints=1)
    zombie = start(config, env, "--in-process")
    torn = paused_in_a_checkpoint(case, zombie)

    heir = start(config, env, "--in-process")
    until(lambda: list(case.step.glob("g0002/checkpoints/*/manifest.json")), alive=heir)
    claim = json.loads((case.step / "gen/0002.json").read_text())
    assert claim["continues"] == f"g0001/checkpoints/step-{torn - 1:08d}"
    heir.send_signal(signal.SIGTERM)
    ended(heir, code=3)
    stopped_at = next(committed(open_store(str(case.step))))
    assert stopped_at.startswith("g0002/")

    zombie.send_signal(signal.SIGCONT)
    said = ended(zombie, code=3)
    assert "another run has claimed a higher generation" in said
    # It did come, and is whole: this one, or one that it has made instead before it looked.
    late = [
        path.parent for path in case.step.glob("g0001/checkpoints/*/manifest.json") if int(path.parent.name[5:]) >= torn
    ]
    line = list(committed(open_store(str(case.step))))
    assert late
    assert line[0] == stopped_at
    assert not {str(folder.relative_to(case.step)) for folder in late} & set(line)
    assert claim["continues"] in line  # what the heir came from was not pruned by the zombie

    done = mae("run", case.config(), "--in-process", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert json.loads((case.step / "gen/0003.json").read_text())["continues"] == stopped_at
    assert case.check().generation == 3


def paused_in_a_checkpoint(case: Case, driver: subprocess.Popen[str]) -> int:
    """SIGSTOP when a checkpoint after step 20 has its fragments and no manifest yet; its step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for folder in sorted(case.step.glob("g0001/checkpoints/step-*"))[-1:]:
            step = int(folder.name[5:])
            if step > 20 and not (folder / "manifest.json").exists() and list(folder.glob("*.safetensors")):
                driver.send_signal(signal.SIGSTOP)
                before = folder.with_name(f"step-{step - 1:08d}") / "manifest.json"
                if list(folder.glob("*.safetensors")) and not (folder / "manifest.json").exists() and before.exists():
                    return step
                driver.send_signal(signal.SIGCONT)
    raise AssertionError(driver.communicate(timeout=1))
