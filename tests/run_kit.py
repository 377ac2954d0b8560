"""Tiny image sets, a configuration that runs in seconds, and the `mae` command as a user starts it."""

import ctypes
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_kit import tar_bytes
from PIL import Image
from rich.console import Console

from pipeline import tracking
from pipeline.runs.summary import RunSummary

ROOT = Path(__file__).parents[1]
SIDE = 16
MODEL = {
    "size": "tiny",
    "encoder": {"image_size": [SIDE, SIDE], "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3},
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
}


def write_images(folder: Path, count: int, *, classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0) -> Path:
    """Write distinct images of noise into class folders, or into the folder itself without classes."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        place = folder / classes[index % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index:04d}.png")
    return folder


def document(store: str | Path, source: str | Path) -> dict[str, Any]:
    """Return the configuration of a whole run that takes seconds. It holds out 0.3 of the images."""
    return {
        "name": "tiny",
        "store": str(store),
        "data": {"source": str(source), "test_share": 0.3, "min_shards": 2},
        "model": MODEL,
        "pretrain": {"global_batch": 8, "epochs": 2, "warmup_epochs": 0, "precision": "fp32"},
        "evaluation": {
            "datasets": [{"name": "toy"}],
            "linear": {"epochs": 2, "batch": 16, "warmup_epochs": 0},
            "finetune": {"global_batch": 8, "epochs": 1, "warmup_epochs": 0, "precision": "fp32"},
        },
        "resources": {"micro_batch": 8, "log_every_steps": 2, "checkpoint_every_steps": 4},
    }


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with the project's commands on PATH and without what would lead a run elsewhere."""
    away = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE")
    kept = {name: value for name, value in os.environ.items() if name not in away}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | more


MISSING = ("ray", "mlflow", "boto3", "botocore", "s3transfer")
BARE_SITE = f"""
import importlib.metadata, sys

sys.modules.update(dict.fromkeys({MISSING}))  # None: an import raises ModuleNotFoundError
version = importlib.metadata.version

def of_what_is_installed(name):
    if name in {(*MISSING, "mae-pipeline")}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = of_what_is_installed
"""
"""Python runs sitecustomize.py at the start of every process, so workers of the run lack the packages too."""


def bare_site(folder: Path) -> Path:
    """Return a folder that, first on PYTHONPATH, makes a machine without Ray, MLflow and boto3 of this one."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BARE_SITE)
    return site


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """For preexec_fn: end a process in a session of its own if pytest is killed before it can end it (Linux only).

    The process also hears SIGHUP again, which a pytest under nohup would hand down as ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def mae(
    *arguments: str | Path, cwd: Path = ROOT, timeout: float = 240, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `mae` and wait for its end."""
    call = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    return subprocess.run(
        call, cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False, timeout=timeout
    )


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to create a database, so each run gets a copy of this one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.check_tracking(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(tmp_path, migrated_database) -> Path:
    """An empty store with an MLflow database in it."""
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    return folder


@dataclass
class Silent:
    """A display that records its calls."""

    said: list[tuple[str, str, str]] = field(default_factory=list)

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        self.said.append((step_name, "update", f"{done}/{total} {unit}"))

    def step_state(self, step_name: str, state: Any, *, detail: str = "") -> None:
        self.said.append((step_name, state, detail))

    def show(self, what: Any) -> None:
        console = Console(width=200, file=io.StringIO())
        console.print(what)
        self.said.append(("", "table", console.file.getvalue()))


def states(summary: RunSummary) -> dict[str, str]:
    return {outcome.step.name: outcome.state for outcome in summary.outcomes}


def facts(summary: RunSummary, name: str) -> Mapping[str, Any]:
    (outcome,) = (outcome for outcome in summary.outcomes if outcome.step.name == name)
    assert outcome.receipt is not None, outcome.error
    return outcome.receipt.facts


def pictures(count: int) -> list[bytes]:
    draw, made = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


def tars(folder, per_tar=10):
    folder.mkdir()
    images = pictures(40)
    for first in range(0, 40, per_tar):
        members = [
            member
            for number in range(first, first + per_tar)
            for member in ((f"{number}.png", images[number]), (f"{number}.cls", b"cat" if number % 2 else b"dog"))
        ]
        (folder / f"{first:02d}.tar").write_bytes(tar_bytes(members))
    return folder
