"""Cost of a dataset of millions in the coordinating process: listing, planning, exact and near duplicates, without any image.

    python -m benchmarks.scale                     # 10 million synthetic entries
    python -m benchmarks.scale --quick

Entries are names of 40 bytes in folders of a thousand; they replace a store's listing, whose speed depends on
the store. Hashes are random. Each part runs in a process of its own, so that peaks stay apart.

Units:  wall-clock seconds; peak MiB of resident memory above what the process held with everything imported.
        Mapped files (the plan's listing) are not counted, since the kernel can evict them. Both searches
        include making the hashes, whose share has a line of its own.
Errors: OSError outside Linux.
Source: man 5 proc (RssAnon)."""

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks import _data
from benchmarks import _timing as timing
from pipeline.data.dataset.duplicates import find_duplicates
from pipeline.data.dataset.near_duplicates import NearDuplicateSearch
from pipeline.data.images.alignment import SIDE
from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sharding.shard_plan import open_snapshot, plan_shards
from pipeline.data.snapshots import writer
from pipeline.data.snapshots.parts import SNAPSHOT_FILE
from pipeline.data.sources.listing import SourceItem
from pipeline.storage import open_store

_SHARD_SAMPLES = 1_000
_HELD_OUT_SHARE = 0.01
_SAMPLED_EVERY_S = 0.005


class Cost(NamedTuple):
    """What one part took."""

    seconds: float
    mib: float


def entries(count: int) -> Iterator[SourceItem]:
    """Yield synthetic images in key order."""
    for number in range(count):
        yield SourceItem(f"n{number // 1000:08d}/n{number // 1000:08d}_{number:012d}.JPEG", 110_000, "image")


def listing(count: int, root: Path) -> Cost:
    """Run the snapshot stage on the entries."""
    vars(writer)["list_source"] = lambda uri, *, besides=None: entries(count)
    return measured(lambda: _data.listed(Path("/synthetic"), root))


def plan(count: int, root: Path) -> Cost:
    """Plan the shards of the listing, and take the digests of the first hundred plans."""
    store = _data.attempt(root).store

    def planned() -> None:
        with open_snapshot(store) as table:
            plans = plan_shards(table, seed=0, shard_max_bytes=2**27, min_shards=16, policy=IntakePolicy())
            for shard in range(min(100, len(plans))):
                _ = plans[shard].digest

    return measured(planned)


def hashes_alone(count: int, root: Path) -> Cost:
    """Make the hashes that both searches read, and throw them away."""
    return measured(lambda: sum(table.num_rows for _, _, table in _shards(count)))


def exact_duplicates(count: int, root: Path) -> Cost:
    """Search all hashes for exact duplicates."""
    return measured(lambda: find_duplicates((n, split, table) for n, split, table in _shards(count)))


def near_duplicates(count: int, root: Path) -> Cost:
    """Search the held-out hashes for near duplicates among the others, with images of noise."""

    def searched() -> None:
        search = NearDuplicateSearch()
        for number, split, table in _shards(count):
            search.add(number, split, table)
        search.find(_Noise())

    return measured(searched)


class _Noise:
    """Images of noise, none of which resembles another, so that only the hashes and the coarse comparison count."""

    def thumbnails(self, shard: int, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        noise = np.random.default_rng(shard).integers(0, 256, (len(sample_ids), SIDE, SIDE), dtype=np.uint8)
        return noise, np.ones(len(sample_ids), dtype=bool)

    def bytes(self, shard: int, sample_ids: NDArray[np.int64]) -> Iterator[bytes | None]:
        return iter([None] * len(sample_ids))


PARTS: Mapping[str, Callable[[int, Path], Cost]] = {
    "listing": listing,
    "plan": plan,
    "the hashes alone": hashes_alone,
    "exact duplicates": exact_duplicates,
    "near duplicates": near_duplicates,
}


def _shards(count: int) -> Iterator[tuple[int, str, Any]]:
    rng = np.random.default_rng(0)
    shards = -(-count // _SHARD_SAMPLES)
    for number in range(shards):
        held_out = number < max(1, round(_HELD_OUT_SHARE * shards))
        columns = {
            "sample_id": np.arange(number * _SHARD_SAMPLES, (number + 1) * _SHARD_SAMPLES),
            "sha256": [rng.bytes(32).hex() for _ in range(_SHARD_SAMPLES)],
            "label": np.zeros(_SHARD_SAMPLES, dtype=np.int32),
            "dhash64": rng.integers(0, 2**64, _SHARD_SAMPLES, dtype=np.uint64),
            "served": np.ones(_SHARD_SAMPLES, dtype=bool),
        }
        yield number, "test" if held_out else "train", pa.table(columns)


def measured(work: Callable[[], object]) -> Cost:
    """Do the work while a thread watches the memory."""
    before, peak, done = _anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLED_EVERY_S):
            peak = max(peak, _anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return Cost(seconds, max(peak, _anonymous_mib()) - before)


def _anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def measure(count: int) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    found = {}
    with TemporaryDirectory(prefix="mae-benchmark-") as name:
        for part, function in PARTS.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                found[part] = alone.submit(function, count, Path(name)).result()
        size = open_store(_data.attempt(Path(name)).store.uri).list(SNAPSHOT_FILE)
        listing_mib = sum(info.size for info in size) / 2**20
    print(f"{count:,} images; snapshot.parquet is {listing_mib:.0f} MiB")
    rows = [(part, f"{one.seconds:.1f} s", f"{one.mib:.0f} MiB") for part, one in found.items()]
    print(timing.table(("", "time", "memory at most"), rows))
    line: dict[str, object] = {"benchmark": "scale", "images": count}
    for part, one in found.items():
        line[part.replace(" ", "_")] = {"seconds": round(one.seconds, 2), "mib": round(one.mib)}
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description="Time and memory for millions of images."
    )
    parser.add_argument("--quick", action="store_true", help="200,000 images: within 40 s on 2 cores")
    parser.add_argument("--images", type=int, metavar="COUNT", help="default: 10,000,000")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.images or (200_000 if options.quick else 10_000_000))))


if __name__ == "__main__":
    main()
