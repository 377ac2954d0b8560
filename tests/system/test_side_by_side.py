"""Fine-tunes side by side on a real Ray: one of them loses its worker, all of them are stopped; the scores stay the same."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from ray_kit import until
from run_kit import ROOT, document, end_with_parent, environment, mae, write_config, write_images

pytestmark = pytest.mark.system

EPOCHS = 30  # 150 steps of about 10 ms


def here(*arguments) -> subprocess.CompletedProcess[str]:
    """Run `mae` in one process and, as a worker with half a core does, on one thread, which is also quicker on a busy machine."""
    return mae(*arguments, "--in-process", timeout=600, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A configuration of two fine-tunes whose pretraining is finished, and the receipts of an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("pretrained")
    content = document(folder / "store", write_images(folder / "images", 60))
    content["evaluation"]["datasets"] = [{"name": "toy", "protocols": ["finetune", "linear"]}]
    content["evaluation"]["finetune"]["epochs"] = EPOCHS
    content["resources"] |= {"workers": 2, "cpus_per_worker": 0.5, "checkpoint_every_steps": 10, "log_every_steps": 10}
    content["tracking"] = {"uri": "none"}
    path = write_config(folder / "run.yaml", content)
    assert here("run", path, "--set", "evaluation.datasets=[]").returncode == 0
    shutil.copytree(folder / "store", folder / "calm")
    assert here("run", path, "--set", f"store={folder / 'calm'}").returncode == 0
    return path, receipts(folder / "calm")


def receipts(store: Path) -> dict[str, dict]:
    """Return the receipts of the evaluations, by step."""
    found = (json.loads(path.read_text()) for path in store.glob("*/receipt.json"))
    return {body["step"]: body for body in found if body["kind"] == "evaluate"}


def facts(store: Path) -> dict[str, dict]:
    return {name: {**body["facts"], "loss": 0} for name, body in receipts(store).items()}


class Run:
    """A `mae run` on a copy of the store."""

    def __init__(self, pretrained, folder: Path) -> None:
        path, calm = pretrained
        self.store = Path(shutil.copytree(path.parent / "store", folder / "store"))
        self.call = ["run", str(path), "--set", f"store={self.store}"]
        self.calm = {name: {**body["facts"], "loss": 0} for name, body in calm.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *self.call],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call
        )

    def wait_until_both_train(self) -> None:
        until(lambda: len(self.begun()) == 2, within_s=400, alive=self.process)

    def begun(self) -> set[str]:
        return {path.parts[-5] for path in self.store.glob("finetune-*/g0001/checkpoints/*/manifest.json")}

    def workers(self) -> list[psutil.Process]:
        """Return the processes that train."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if "ray::train_alone" in " ".join(one.cmdline())]


@pytest.fixture
def run(pretrained, tmp_path):
    """A run in the middle of both fine-tunes; ended with the test."""
    made = Run(pretrained, tmp_path)
    try:
        made.wait_until_both_train()
        yield made
    finally:
        made.process.kill()  # Ray's processes die with it


def test_a_worker_that_is_killed_beside_another_changes_nothing(run):
    victim, *_ = run.workers()
    victim.kill()
    _, said = run.process.communicate(timeout=500)
    assert run.process.returncode == 0, said
    assert facts(run.store) == run.calm
    found = receipts(run.store)
    first, second = (found[f"finetune-toy-{encoder}-s0"] for encoder in ("pretrained", "random"))
    assert {first["generation"], second["generation"]} == {1}  # the worker alone was started again
    assert max(one["made"]["time"] - one["made"]["seconds"] for one in (first, second)) < min(
        one["made"]["time"] for one in (first, second)
    )  # they ran side by side


def test_a_stop_saves_all_that_run_and_the_next_run_goes_on(run):
    run.process.send_signal(signal.SIGINT)
    _, said = run.process.communicate(timeout=500)
    assert run.process.returncode == 3, said
    assert "finetune-toy-pretrained-s0 finishes the step it is at" in said
    assert "finetune-toy-random-s0 finishes the step it is at" in said
    again = mae(*run.call, timeout=500)
    assert again.returncode == 0, again.stderr
    assert "finetune-toy-random-s0: running  resuming from step " in again.stderr
    assert facts(run.store) == run.calm
    assert {body["generation"] for name, body in receipts(run.store).items() if "finetune" in name} == {2}
