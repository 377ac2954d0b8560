"""Which of the workers this process is, on which device, and how all of them reach agreement.

The process group belongs to the launcher that started this process (Ray Train, torchrun). Without one, this process makes a
group of its own with a single member. Flags and sums travel as float64 over gloo on the CPU, so agreement never waits for a
GPU stream.
Errors: inside `fail_together`, a PipelineError or ConfigError on one worker is raised on every worker. Unanswered if a worker
does not come to an agreement in time."""

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ConfigError, PipelineError

log = logging.getLogger(__name__)
JOINED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables from which torch joins a group."""
LAUNCHER_VARIABLES = (*JOINED_BY, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
COLLECTIVE_TIMEOUT_S = 1800.0
_JOIN_S, _SAY_AFTER_S, _JOIN_POLL_S = 600.0, 20.0, 0.5  # seconds: give up, say what is missing, look again

ELSEWHERE = "another worker failed; its own message says why"
"""What a worker raises when the error is not its own."""


class Unanswered(PipelineError):
    """Another worker did not come to an agreement in time. The group cannot agree on anything any more, but may be restarted."""


@dataclass(frozen=True)
class World:
    """Rank, number of workers, device, and the CPU group over which workers agree."""

    rank: int
    size: int
    device: torch.device
    group: Any
    local_size: int = 1
    """Workers on this worker's node, which share its disk."""
    local_rank: int = 0
    """This worker's number on its node; ranks of a node follow each other."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs, commits and publishes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all workers, in float64. Collective."""
        # float64 counts exactly up to 2**53, so flags, counts and losses travel in one reduction.
        tensor = torch.tensor(list(values), dtype=torch.float64)
        with self._answered("sum"):
            dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor]

    def total_modulo_2_64(self, value: int) -> int:
        """Return the sum of unsigned 64-bit numbers over all workers, wrapping around. Collective."""
        signed = value - 2**64 if value >= 2**63 else value  # torch reduces signed integers only; the bits are the same
        tensor = torch.tensor([signed], dtype=torch.int64)
        with self._answered("sum"):
            dist.all_reduce(tensor, group=self.group)
        return int(tensor.item()) % 2**64

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's small Python value on every worker. Collective."""
        box = [value]
        with self._answered("broadcast"):
            dist.broadcast_object_list(box, src=0, group=self.group)  # pickles: for small values only
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every worker's small Python value, in order of rank, on every worker. Collective."""
        box: list[Any] = [None] * self.size
        with self._answered("gathering"):
            dist.all_gather_object(box, value, group=self.group)
        return box

    @contextmanager
    def _answered(self, operation: str) -> Iterator[None]:
        """Turn gloo's timeout into an error that says who waited for whom."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            # A lost peer raises RuntimeError too, "Connection closed by peer", at once: Ray Train knows of that by itself.
            if "Timed out" not in str(error):
                raise
            raise Unanswered(
                f"rank {self.rank} of {self.size} waited {time.monotonic() - began:.0f} s in a {operation} over all workers, and "
                "another one did not come. Files in stacks/ of the step's generation show what each was doing; a worker "
                "without one has lost its node. If it was only slow, raise resources.collective_timeout_s"
            ) from error

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Run work that may fail on one worker, so that it fails on all of them and none waits for the others.

        Collective at the end. The work itself must not be: a worker that failed would not take part.
        """
        problem: PipelineError | ConfigError | None = None
        try:
            yield
        except (PipelineError, ConfigError) as error:
            problem = error
        # Other exceptions skip this: the worker ends, and the reduction fails on the others, who have lost a peer.
        failures = self.total([float(problem is not None)])[0]
        if problem:
            raise problem
        if failures:
            raise PipelineError(ELSEWHERE)


def leave_launcher() -> None:
    """Make this process a world of its own: remove what a launcher, or another job's, wrote into its environment.

    For what promises one worker. Batch systems and shells keep such variables, and joining the group that they describe would
    wait for workers that nobody starts. Without effect in a process that has joined a group already."""
    if dist.is_initialized():
        return
    found = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    if "RANK" in found or "WORLD_SIZE" in found:
        described = ", ".join(f"{name}={value}" for name, value in found.items())
        log.warning(
            "one worker, in this process: the launcher's variables in the environment are ignored (%s)", described
        )


def _join_launched(backend: str, timeout: timedelta) -> None:
    """Join the group that a launcher describes.

    torch waits in C++, up to half an hour, and says nothing. In a thread of its own, that leaves this one free to hear signals,
    to say what is missing, and to give up."""
    # A list, because a thread cannot raise into the one that started it.
    failure: list[BaseException] = []

    def join() -> None:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
            failure.append(error)

    # A daemon: a join that never ends must not keep the process alive
    joining = threading.Thread(target=join, name="join-launched", daemon=True)
    joining.start()
    described = ", ".join(f"{name}={os.environ[name]}" for name in JOINED_BY)
    began, said = time.monotonic(), False
    while joining.is_alive():
        joining.join(_JOIN_POLL_S)
        waited = time.monotonic() - began
        if waited > _JOIN_S:
            raise PipelineError(
                f"not all workers came within {_JOIN_S:g} s ({described}). Start them all, or unset these variables to train alone"
            )
        if joining.is_alive() and waited > _SAY_AFTER_S and not said:
            said = True
            log.warning("waiting for the other workers of the group in the environment (%s)", described)
    if failure:
        raise failure[0]


def enter_world(*, use_gpu: bool = False, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> World:
    """Return this process's world; join the launcher's process group, or make a group with a single member.

    `use_gpu` is what `pipeline.cluster.device` decided; a GPU that is there is not used without it.

    The group is the one that is initialised already (Ray Train), or the one that torchrun's variables describe. A group that
    is made here ends with the process. `timeout_s`: how long workers wait for one another to agree.
    """
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if use_gpu else "gloo"
        if os.environ.keys() >= set(JOINED_BY):
            _join_launched(backend, timeout)
        else:  # neither a port nor variables: child processes would take them for their own
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        # Not at the end of a training: the next one in this process needs it again, and DeepSpeed keeps groups made from it.
        atexit.register(_leave)
    device = torch.device("cpu")
    if use_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        # NCCL and DeepSpeed use the current device, which would be 0 in every process of a node.
        torch.cuda.set_device(device)
    # With NCCL as the default group, agreement needs a second group on the CPU; with gloo the default one serves.
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    # Set by Ray Train and torchrun. DeepSpeed sets the rank, to 0, even without a launcher.
    local_size, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), device, group, local_size, local_rank)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()  # NCCL would warn of leaked communicators
