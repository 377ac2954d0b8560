"""Which of how many workers this process is, on which device, and how all of them agree.

The process group is whoever started us's (Ray Train, torchrun) or, alone, one of our own with a single member.
Flags and sums travel as float64 over gloo on the CPU, so that agreeing never waits for a GPU stream.
Errors: `together` raises on every worker what a person's error (PipelineError, ConfigError) on one of them ended."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, PipelineError

ELSEWHERE = "another worker failed; its own message says why"
"""What a worker raises when the error is not its own."""


@dataclass(frozen=True)
class World:
    """Rank, number of workers, device, and the CPU group over which they agree."""

    rank: int
    size: int
    device: torch.device
    group: Any
    local_size: int = 1
    """Workers on this worker's node: they share its disk."""

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that logs, commits and publishes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all workers, in float64."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor]

    def total_modulo_2_64(self, value: int) -> int:
        """Sum of unsigned 64-bit numbers over all workers, wrapping around."""
        signed = value - 2**64 if value >= 2**63 else value
        tensor = torch.tensor([signed], dtype=torch.int64)
        dist.all_reduce(tensor, group=self.group)
        return int(tensor.item()) % 2**64

    def from_first(self, value: Any) -> Any:
        """Rank 0's small Python value, on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def all_of(self, value: Any) -> list[Any]:
        """Every worker's small Python value, in order of rank, on every worker."""
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.group)
        return box

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that may fail on one worker (reading, writing; nothing collective): it then fails on all, and nobody waits."""
        problem: PipelineError | ConfigError | None = None
        try:
            yield
        except (PipelineError, ConfigError) as error:
            problem = error
        failures = self.total([float(problem is not None)])[0]
        if problem:
            raise problem
        if failures:
            raise PipelineError(ELSEWHERE)


def enter_world() -> World:
    """The world of this process; joins the group that is there, or that torchrun describes, or makes one with a single member."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            dist.init_process_group(backend)
        else:  # no port and no variables: children would take them for theirs
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), dist.get_world_size(), device, group, local_size)
