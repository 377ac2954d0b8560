"""ViT-H/14 in the training loop: some steps, a checkpoint, then one more step with other workers at another ZeRO stage.

    python -m benchmarks.huge                                     # 2 workers at ZeRO-3, 3 steps; then 1 worker at ZeRO-1
    python -m benchmarks.huge --steps 200 --batch 64 --workers 1  # on a GPU
    python -m benchmarks.huge --quick                             # ViT-tiny

Workers are processes that call `train` in pipeline.training.loop.loop on real shards (generated photographs,
unless --images). The second part starts from the checkpoint of the first.

Units:  seconds; peak GiB of anonymous resident memory (RssAnon) of all workers together, and of one worker's
        CUDA allocator; mfu, data_wait: shares, from the last logged row.
Errors: SystemExit for a folder without usable JPEGs; OSError outside Linux; PipelineError if a worker fails.
Source: man 5 proc (RssAnon)."""

import argparse
import json
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import _data
from benchmarks import _timing as timing
from mae_core import SIZES, MAEConfig, parameter_count
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.graph.receipts import claim
from pipeline.graph.step import Attempt
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint, resume_point
from pipeline.training.health.stop_reasons import StopReason
from pipeline.training.loop.loop import train
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import enter_world

_SAMPLED_EVERY_S = 0.05
_HAND_BACK = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.hugetlb=1"
"""Makes the C library return large blocks to the system when they are freed; by default it keeps them in its heap."""


@dataclass
class StopAfter:
    """A stop signal that asks the loop to stop after `steps` steps."""

    steps: int

    def stop_reason(self) -> StopReason:
        """Return "asked" once the steps are used up. The loop calls this before every step."""
        self.steps -= 1
        return "asked" if self.steps < 0 else ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The outcome of one part."""

    layout: str
    seconds: float
    """Including the start and the checkpoint."""
    peak_gib: float
    row: Mapping[str, float]
    """The last row of the history."""


def part(spec: TrainSpec, attempt: Attempt, *, workers: int, steps: int) -> Part:
    """Train for `steps` steps from the newest checkpoint, in processes of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    began = time.perf_counter()
    os.environ.setdefault("GLIBC_TUNABLES", _HAND_BACK)  # read by the workers when they start
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        started = [pool.submit(_worker, rank, workers, port, spec, attempt, steps) for rank in range(workers)]
        memory = _Memory(pool)
        for worker in started:
            worker.result()
        peak = memory.ended()
    with open_checkpoint(attempt.root, resume_point(attempt.root)) as checkpoint:
        row = checkpoint.history()[-1]
    layout = f"{workers} x ZeRO-{spec.resources.zero_stage}, {spec.recipe.precision}"
    return Part(layout=layout, seconds=time.perf_counter() - began, peak_gib=peak / 2**30, row=row)


def _worker(rank: int, workers: int, port: int, spec: TrainSpec, attempt: Attempt, steps: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    train(
        spec,
        attempt,
        world=enter_world(use_gpu=local_gpu_count() > 0),
        tracker=NullTracker(),
        stop_signal=StopAfter(steps),
    )


class _Memory:
    """Watches the peak memory of all processes of a pool together, in a thread."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool, self.peak, self.done = pool, 0, threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def ended(self) -> int:
        """Stop watching, and return the peak in bytes."""
        self.done.set()
        self.watcher.join()
        return self.peak

    def _watch(self) -> None:
        while not self.done.wait(_SAMPLED_EVERY_S):
            self.peak = max(self.peak, sum(_anonymous_bytes(pid) for pid in list(self.pool._processes)))


def _anonymous_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024
    except (OSError, IndexError):  # the process has ended
        return 0


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    model = MAEConfig(encoder=SIZES["tiny" if options.quick else "huge"]())
    total = options.steps + 1
    resources = Resources(
        zero_stage=3,
        micro_batch=options.micro_batch,
        log_every_steps=1,
        checkpoint_every_steps=total,
        checkpoint_copy=options.copy,
    )
    found = _data.chosen_photos(options, count=min(64, total * options.batch))
    with TemporaryDirectory(prefix="mae-benchmark-") as name:
        root = Path(name)
        dataset = _data.dataset(_data.write_files(found.files, root / "images"), root, shards=1)
        # As many epochs as the steps take. Copies would not do: duplicates are not served.
        epochs = math.ceil(total * options.batch / DatasetFacts.read(dataset.facts).counts.total.served)
        recipe = Recipe(global_batch=options.batch, epochs=epochs, warmup_epochs=0.0, precision=options.precision)
        spec = _data.pretraining(model, recipe, resources, dataset, cache=root / "cache")
        attempt = _data.attempt(root / "pretrain-huge")
        claim(attempt.root, continues="")
        first = part(spec, attempt, workers=options.workers, steps=options.steps)
        size = sum(info.size for info in attempt.store.list("checkpoints/"))
        second = part(
            replace(spec, resources=spec.resources.model_copy(update={"zero_stage": 1})), attempt, workers=1, steps=1
        )
    parameters = parameter_count(model) / 1e6
    print(
        f"{parameters:.0f} million parameters, global batch {options.batch}; "
        f"{timing.device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}; checkpoint {size / 2**30:.2f} GiB"
    )
    rows = [
        (one.layout, f"{one.row['step']:.0f}", f"{one.row['loss']:.4f}", f"{one.seconds:.0f} s", f"{one.peak_gib:.1f}")
        for one in (first, second)
    ]
    print(timing.table(("workers, stage", "at step", "loss", "in all", "GiB at most"), rows))
    return {
        "benchmark": "huge",
        "parameters_millions": round(parameters, 1),
        "steps": second.row["step"],
        "peak_gib": round(max(first.peak_gib, second.peak_gib), 2),
        "peak_gib_resumed": round(second.peak_gib, 2),
        "checkpoint_gib": round(size / 2**30, 2),
        "images_per_s": round(first.row["images_per_s"], 3),
        "mfu": round(first.row["mfu"], 4),
        "data_wait": round(first.row["data_wait"], 4),
        "device_gib": round(first.row.get("device_gib", 0.0), 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("huge", "ViT-H/14 in the training loop.")
    parser.add_argument("--steps", type=int, default=3, help="steps before the checkpoint; one more follows it")
    parser.add_argument("--batch", type=int, default=2, help="global batch")
    parser.add_argument("--micro-batch", type=int, default=64, help="largest micro-batch")
    parser.add_argument("--workers", type=int, default=2, help="workers of the first part")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument(
        "--copy", choices=("memory", "disk"), default="disk", help="where a save copies a worker's state to"
    )
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
