"""Where the tasks of a `mae shards` command run: in this process, or on a Ray cluster.

`mae run` needs no choice, since a run is on Ray unless it is told `--in-process`. These commands
often read a few megabytes, for which starting a cluster (seconds) would take longer than the work."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline import cluster
from pipeline.cluster.tasks import Executor
from pipeline.errors import DataError
from pipeline.runs.finished.datasets import FinishedDataset

CLUSTER_FROM_BYTES = 2 * 2**30
"""Fewer bytes are read in this process before a cluster would have started."""


def executor_for_reading(datasets: Sequence[FinishedDataset], *, workers: int | None) -> Executor:
    """Choose Ray if RAY_ADDRESS names a cluster, several workers are asked for, or much is to be read."""
    if "RAY_ADDRESS" in os.environ:
        return "ray"
    cpus = os.cpu_count() or 1
    if workers is not None:
        return "in_process" if workers == 1 else "ray"
    try:
        shards = [line for dataset in datasets for line in dataset.address.open().all_shards().to_pylist()]
    except DataError:  # a damaged manifest: verify reports it, and reads no shard
        return "in_process"
    return "ray" if cpus > 1 and sum(line["bytes"] for line in shards) >= CLUSTER_FROM_BYTES else "in_process"


def executor_for_indexing(*, workers: int | None) -> Executor:
    """Choose Ray if RAY_ADDRESS names a cluster or several workers are asked for.

    How much there is to read is unknown before the source is listed."""
    return "ray" if "RAY_ADDRESS" in os.environ or (workers or 1) > 1 else "in_process"


@contextmanager
def connected(executor: Executor, *, workers: int | None) -> Iterator[None]:
    """Join or start a cluster for executor `ray`, and leave it afterwards. `workers`: CPUs of one that is started."""
    if executor == "ray":
        cluster.connect(cpus=workers)
    try:
        yield
    finally:
        if executor == "ray":
            cluster.disconnect()
