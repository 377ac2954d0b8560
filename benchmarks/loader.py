"""Shards to batches: our Loader, webdataset on the same tars, and ImageFolder on the same files.

    python -m benchmarks.loader --images DIR
    python -m benchmarks.loader --quick

The photographs become files in class folders and, through the real snapshot and shard stages, shards. Each side
yields an endless stream of uint8 batches with the same kind of crops (RandomResizedCrop to 224, bicubic, flip),
from 16 workers on 16 cores where there are as many, from two on two, and from one on one. Ours: threads, and
processes (`decode_workers`). webdataset: random shards, a buffer of 1000, Pillow and its own batching, in torch's
worker processes. ImageFolder: torchvision's reader and transforms, torch's DataLoader. Both are used as their
documentation shows; workers persist. A turn begins when the other sides have filled their queues and are idle. Its
first batches were made before, so they are not timed: as much is under way at the end of a turn as at its start.

Then a loop of tiny operations, as one that launches a GPU's kernels, runs on this thread while the feed makes batches
at full speed on the other cores. `loop_slowdown_*` is its time then / its time alone.

Units:  images per second (wall clock, in total and per core, files in the page cache); images per second of CPU
        time, children included. Ratios: their time / ours within a turn; median and quartiles over turns.
Errors: SystemExit for a folder without usable JPEGs. The keys of a library that is missing are null."""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import _data
from benchmarks import _timing as timing
from benchmarks._data import Spread
from benchmarks._peers import installed
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Selection
from pipeline.data.images.decode_speed import CROP, SIZE, cores
from pipeline.data.images.pictures import AUGMENT_UNIFORMS, reference_picture

OURS, PROCESSES, WEBDATASET, IMAGEFOLDER = (
    "ours, threads",
    "ours, processes",
    "webdataset, Pillow",
    "ImageFolder, torch",
)
_MANY = 16
_SHARDS = 4
_WITHOUT_END = 10**9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One comparison."""

    workers: int
    batch: int
    timed: int
    """Timed batches per turn."""
    warmup: int
    """Untimed batches before them."""
    rounds: int


@dataclass(frozen=True)
class Taken:
    """Seconds per image of one side, by turn: wall clock and CPU time."""

    wall: list[float]
    cpu: list[float]


def ours(manifest: Manifest, plan: Plan, scratch: Path, *, decode_workers: int = 0) -> Iterator[Tensor]:
    """Yield batches of our Loader, epoch after epoch; from threads, or from `decode_workers` processes."""
    selection = Selection.all(manifest, "train")
    loader = Loader(
        selection,
        SampleOrder(selection.counts, OrderConfig(seed=0)),
        global_batch=plan.batch,
        rank=0,
        world_size=1,
        augment=CROP,
        image_size=SIZE,
        seed=0,
        cache=ShardCache(manifest.root, scratch / "cache", max_bytes=2**30),
        decode_threads=plan.workers,
        decode_workers=decode_workers,
    )
    with closing(loader.from_step(0, _WITHOUT_END)) as batches:
        for batch in batches:
            yield batch.images


def webdataset(tars: Sequence[Path], plan: Plan) -> Iterator[Tensor]:
    """Yield batches of webdataset's loader, used as in its README."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(
            [str(path) for path in tars], resampled=True, shardshuffle=False
        )  # how webdataset makes an endless stream
        .shuffle(1000)
        .map(_pillow_pair)
        .batched(plan.batch)
    )
    for images, _ in wds.WebLoader(dataset, batch_size=None, num_workers=plan.workers):
        yield images


def image_folder(folder: Path, plan: Plan) -> Iterator[Tensor]:
    """Yield batches of torch's loader on torchvision's ImageFolder, used as in PyTorch's ImageNet example."""
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped,unused-ignore]
    from torchvision.transforms import (  # type: ignore[import-untyped,unused-ignore]
        Compose,
        InterpolationMode,
        PILToTensor,
        RandomHorizontalFlip,
        RandomResizedCrop,
    )

    crop = RandomResizedCrop(SIZE, scale=CROP.scale, ratio=CROP.ratio, interpolation=InterpolationMode.BICUBIC)
    dataset: Any = ImageFolder(str(folder), Compose([crop, RandomHorizontalFlip(), PILToTensor()]))
    # one endless epoch of permutations: small folders would otherwise pause at the end of each
    sampler: Any = RandomSampler(dataset, num_samples=_WITHOUT_END)
    for images, _ in DataLoader(dataset, plan.batch, sampler=sampler, num_workers=plan.workers):
        yield images


def _pillow_pair(sample: Mapping[str, bytes]) -> tuple[Tensor, int]:
    """Return the crop and the label of a sample."""
    uniforms = np.array([random.random() for _ in range(AUGMENT_UNIFORMS)])
    return torch.from_numpy(reference_picture(sample["jpg"], uniforms, CROP, SIZE)), int(sample["cls"])


def cpu_seconds() -> float:
    """Return the CPU time of this process and its workers so far (man 5 proc). Raises OSError outside Linux."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def wait_for_rest(*, within_s: float = 20.0) -> None:
    """Wait until the workers have filled their queues and are idle. Raises RuntimeError if they never are."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.02:  # one tick of the kernel's clock is 0.01 s
            return
    raise RuntimeError(
        f"workers are still busy {within_s:g} s after the last request: end whatever else runs in this process"
    )


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Pin this thread, and all that it starts, to `count` cores (man 2 sched_setaffinity). Raises OSError outside Linux."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def take_turns(sides: Mapping[str, Iterator[Tensor]], plan: Plan) -> dict[str, Taken]:
    """Time every side once per round; each round starts with another side."""
    taken = {name: Taken([], []) for name in sides}
    names, images = list(sides), plan.timed * plan.batch
    for turn in range(plan.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait_for_rest()
            for batch in islice(sides[name], plan.warmup):
                if batch.dtype != torch.uint8 or len(batch) != plan.batch or 3 not in batch.shape:
                    raise TypeError(
                        f"{name} yields {batch.dtype} of {tuple(batch.shape)}, so the comparison would be unfair"
                    )
            began, cpu_began = time.perf_counter(), cpu_seconds()
            for _ in islice(sides[name], plan.timed):
                pass
            taken[name].wall.append((time.perf_counter() - began) / images)
            taken[name].cpu.append((cpu_seconds() - cpu_began) / images)
    return taken


def compare(manifest: Manifest, folder: Path, scratch: Path, plan: Plan) -> tuple[dict[str, Taken], dict[str, Spread]]:
    """Measure all sides with the plan's number of workers, print the table, and return times and ratios."""
    keys = manifest.shards("train").column("key").to_pylist()
    tars = [path for key in keys if (path := manifest.root.local_path(key)) is not None]
    makers: dict[str, Callable[[], Iterator[Tensor]]] = {}
    if installed("torchvision"):
        makers[IMAGEFOLDER] = lambda: image_folder(folder, plan)
    makers[WEBDATASET] = lambda: webdataset(tars, plan)
    makers[PROCESSES] = lambda: ours(manifest, plan, scratch, decode_workers=plan.workers)
    makers[OURS] = lambda: ours(manifest, plan, scratch)  # last: its threads must start after the others have forked
    with on_cores(plan.workers), ExitStack() as stack:
        sides = {}
        for name, make in makers.items():
            side = make()
            stack.callback(side.close)  # type: ignore[attr-defined]
            next(side)
            sides[name] = side
        for child in multiprocessing.active_children():  # a fork server may have started on other cores
            os.sched_setaffinity(child.pid or 0, os.sched_getaffinity(0))
        taken = take_turns(dict(reversed(sides.items())), plan)
    against = {name: _data.ratios(taken[OURS].wall, side.wall) for name, side in taken.items()}
    print(
        f"{plan.workers} workers on {plan.workers} cores, batches of {plan.batch}, {plan.rounds} turns of {plan.timed} batches"
    )
    print(
        timing.table(
            ("", "images/s", "per core", "images/CPU-second", "its time / ours (quartiles)", "its CPU time / ours"),
            [
                (
                    name,
                    f"{1 / median(side.wall):.0f}",
                    f"{1 / median(side.wall) / plan.workers:.0f}",
                    f"{1 / median(side.cpu):.0f}",
                    _data.shown(against[name]),
                    f"{_data.ratios(taken[OURS].cpu, side.cpu).median:.2f}",
                )
                for name, side in taken.items()
            ],
        )
    )
    return taken, against


def _core_wait_s() -> float:
    """Return how long this thread has waited for a core so far (Linux, Documentation/scheduler/sched-stats)."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def loop_slowdown(manifest: Manifest, plan: Plan, scratch: Path, *, decode_workers: int) -> float:
    """Return how many times longer a loop of tiny operations takes beside the feed, without waits for batches or cores."""

    one = torch.zeros(1)

    def spin() -> float:
        began, delayed = time.perf_counter(), _core_wait_s()
        for _ in range(10_000):  # some 10 ms, less than a batch takes, so the feed is never idle
            one.add_(1)  # releases and takes the interpreter's lock, as every launch of a kernel does
        return time.perf_counter() - began - (_core_wait_s() - delayed)

    alone = median(spin() for _ in range(20))
    with closing(ours(manifest, plan, scratch, decode_workers=decode_workers)) as batches:  # type: ignore[type-var]
        return median(spin() for _ in islice(batches, plan.warmup + plan.timed)) / alone


def result(workers: int, taken: Mapping[str, Taken], against: Mapping[str, Spread]) -> dict[str, float | None]:
    """Return the keys of the JSON line that depend on the number of workers."""
    peers = {"webdataset": WEBDATASET, "imagefolder": IMAGEFOLDER}
    ratios = {
        f"ratio_vs_{key}": round(against[name].median, 3) if name in against else None for key, name in peers.items()
    }
    cpu = {
        f"cpu_ratio_vs_{key}": round(_data.ratios(taken[OURS].cpu, taken[name].cpu).median, 3)
        if name in taken
        else None
        for key, name in peers.items()
    }
    processes = {
        "ratio_vs_processes": round(against[PROCESSES].median, 3),
        "processes_images_per_s": round(1 / median(taken[PROCESSES].wall), 1),
    }
    return {**ratios, **processes, "images_per_s_per_core": round(1 / median(taken[OURS].wall) / workers, 1), **cpu}


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the tables and return the JSON line."""
    found = _data.chosen_photos(options, count=64 if options.quick else 512)
    plans = [
        Plan(
            workers=workers,
            batch=options.batch,
            timed=options.batches or (8 if options.quick else 24),
            warmup=min(options.batches or 6, 6),
            rounds=options.rounds or (3 if options.quick else 7),
        )
        for workers in sorted({min(2, cores()), 1, *([_MANY] if cores() >= _MANY else [])}, reverse=True)
    ]
    print(f"{found.words}\n{timing.device_name(torch.device('cpu'))}")
    lines = {}
    with tempfile.TemporaryDirectory(prefix="mae-benchmark-") as name, _data.one_torch_thread():
        scratch = Path(name)
        folder = _data.write_files(found.files, scratch / "images")
        manifest = _data.sharded(folder, scratch, shards=_SHARDS)
        for plan in plans[:1] if options.quick else plans:
            lines[plan.workers] = result(plan.workers, *compare(manifest, folder, scratch, plan))
        beside = replace(plans[0], workers=max(1, cores() - 1))
        slowdown = {
            f"loop_slowdown_{kind}": round(loop_slowdown(manifest, beside, scratch, decode_workers=processes), 3)
            for kind, processes in (("threads", 0), ("processes", beside.workers))
        }
    print(
        f"A loop of tiny operations beside {beside.workers} workers takes "
        + ", ".join(
            f"{times} times as long ({kind.removeprefix('loop_slowdown_')})" for kind, times in slowdown.items()
        )
    )
    most = max(lines)
    line: dict[str, object] = {"benchmark": "loader", **lines[most], **slowdown, "workers": most}
    if most > 1 and 1 in lines:
        line["one_worker"] = lines[1]
    return line | {"images": found.words}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("loader", "Shards to batches, side by side.")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--batches", type=int, help="timed batches per turn")
    parser.add_argument("--rounds", type=int)
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
