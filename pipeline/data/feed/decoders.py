"""What makes the pictures of batches ahead of time: threads of this process, or worker processes. Batches are equal either way.

A job is one batch, whose memory is laid out before its parts are handed out; workers fill positions that were assigned beforehand,
so their timing changes nothing. Threads are enough where the loop's thread has little to do: the libraries that decode release the
interpreter's lock, but some 300 us of Python per picture do not. On a GPU that slows the loop by half and more, hence processes
(docs/decisions/019-decode-workers.md has the figures).

Processes come from a fork server that has imported what they need: a fork of this process would copy locks that its threads hold
(Ray, CUDA), and a fresh interpreter would import torch once per worker. Batches lie in anonymous shared memory (memfd), which
workers open by the path that /proc gives it: it needs no /dev/shm, and it is gone when this process is. A worker that dies or
hangs takes its pool with it, because it may have held the pool's locks. A new pool then fills the parts that were not done.
Errors: an error of a worker is raised as itself; PipelineError if workers die again and again."""

import logging
import mmap
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from typing import NamedTuple, Protocol

import torch

from pipeline.data.feed.batch import Batch, Int64s
from pipeline.data.feed.cache import CacheCounts
from pipeline.data.feed.picture_maker import Part, PictureMaker, Unreadable
from pipeline.errors import PipelineError
from pipeline.storage import Traffic, count_traffic

THREAD_CHUNK = 8
"""Samples that a thread decodes per task: about 10 ms of work."""
PROCESS_CHUNK = 64
"""The most samples that a process decodes per task: 150 ms of work, against some 0.2 ms for handing it over."""
MOST_RESTARTS = 3
"""How often in a row, without a batch in between, dead workers are replaced."""
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """What is known of a batch before its pictures are made."""

    labels: Int64s  # [b]
    sample_ids: Int64s  # [b]
    epochs: Int64s  # [b]

    def write(self, batch: Batch) -> None:
        """Write the columns into a batch."""
        for name, column in self._asdict().items():
            getattr(batch, name).numpy()[:] = column


class Filled(NamedTuple):
    """What became of a part of a batch."""

    unreadable: list[tuple[int, Unreadable]]
    """Positions whose pictures could not be made."""
    cache: CacheCounts = CacheCounts()
    """What a worker process's own cache object did meanwhile."""
    traffic: Traffic = Traffic(0, 0, 0)
    """A worker process's own traffic meanwhile."""


class Decoders(Protocol):
    """Makes batches ahead. Jobs are finished in the order in which they were begun."""

    restarts: int
    """How often dead or hung workers were replaced."""

    def chunk(self, count: int) -> int:
        """Return the most samples in a part of a batch of `count`."""
        ...

    def begin(self, columns: Columns, parts: Sequence[Part]) -> None:
        """Begin to make a batch."""
        ...

    def finish(self) -> tuple[Batch, list[tuple[int, Unreadable]]]:
        """Wait for the oldest batch, and return it with the positions that could not be filled."""
        ...

    def close(self) -> None:
        """End all threads and processes; drop what is under way."""
        ...


class DecodeThreads:
    """Threads of this process. From pinned memory, the copy to the device overlaps with computation."""

    restarts = 0

    def __init__(self, maker: PictureMaker, threads: int, *, pin_memory: bool) -> None:
        self.maker, self.pin_memory = maker, pin_memory
        self.pool = ThreadPoolExecutor(threads, "decode")
        self.jobs: deque[tuple[Batch, list[Future[list[tuple[int, Unreadable]]]]]] = deque()

    def chunk(self, count: int) -> int:
        """Return the most samples in a part."""
        return THREAD_CHUNK

    def begin(self, columns: Columns, parts: Sequence[Part]) -> None:
        """Begin to make a batch."""
        size = len(columns.labels) * self.maker.layout.bytes_per_sample
        batch = self.maker.layout.tensors(torch.empty(size, dtype=torch.uint8, pin_memory=self.pin_memory))
        columns.write(batch)
        # the pool is first in, first out, so reading ahead never overtakes the batch that is awaited
        self.jobs.append((batch, [self.pool.submit(self.maker.fill, batch, part) for part in parts]))

    def finish(self) -> tuple[Batch, list[tuple[int, Unreadable]]]:
        """Wait for the oldest batch."""
        batch, chunks = self.jobs.popleft()
        return batch, [one for chunk in chunks for one in chunk.result()]

    def close(self) -> None:
        """End the threads, which finish what they are writing; what has not begun is dropped."""
        self.pool.shutdown(cancel_futures=True)


class _Job(NamedTuple):
    """A batch that processes fill."""

    block: torch.Tensor  # uint8, all of the batch's memory
    descriptor: int  # of that memory; -1 for an empty batch
    parts: Sequence[Part]
    futures: list[Future[Filled]]


class DecodeProcesses:
    """Worker processes. A batch that is pinned is copied once more, since only this process can pin."""

    def __init__(self, maker: PictureMaker, processes: int, *, pin_memory: bool, answer_s: float) -> None:
        """`answer_s`: how long a worker may take for a part, including its shards' download, before it counts as hung."""
        self.maker, self.processes, self.pin_memory, self.answer_s = maker, processes, pin_memory, answer_s
        self.jobs: deque[_Job] = deque()
        self.restarts = self._restarts_in_a_row = 0
        start_fork_server(maker)
        self.pool = self._new_pool()

    def chunk(self, count: int) -> int:
        """Return the most samples in a part: every process gets some of a small batch."""
        return min(PROCESS_CHUNK, max(1, -(-count // self.processes)))

    def begin(self, columns: Columns, parts: Sequence[Part]) -> None:
        """Begin to make a batch."""
        size = len(columns.labels) * self.maker.layout.bytes_per_sample
        descriptor, block = -1, torch.empty(size, dtype=torch.uint8)
        if size:
            descriptor = os.memfd_create("mae-batch")
            os.ftruncate(descriptor, size)
            block = _mapped(descriptor)
        columns.write(self.maker.layout.tensors(block))
        self.jobs.append(_Job(block, descriptor, parts, []))
        self._submit(self.jobs[-1])

    def finish(self) -> tuple[Batch, list[tuple[int, Unreadable]]]:
        """Wait for the oldest batch."""
        job = self.jobs[0]
        while any(not _is_filled(future) for future in job.futures):
            self._wait(job)
        filled = [future.result() for future in job.futures]
        self.jobs.popleft()
        self._restarts_in_a_row = 0
        for one in filled:
            self.maker.cache.count(**one.cache._asdict())
            count_traffic(**one.traffic._asdict())
        _release(job)
        block = torch.empty_like(job.block, pin_memory=True).copy_(job.block) if self.pin_memory else job.block
        return self.maker.layout.tensors(block), [found for one in filled for found in one.unreadable]

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown(cancel_futures=True)
        while self.jobs:
            _release(self.jobs.popleft())

    def _submit(self, job: _Job) -> None:
        """Hand out the parts of a job that are not filled yet."""
        path, kept = f"/proc/{os.getpid()}/fd/{job.descriptor}", job.futures[:]
        job.futures.clear()
        for number, part in enumerate(job.parts):
            if number < len(kept) and _is_filled(kept[number]):
                job.futures.append(kept[number])
                continue
            try:
                job.futures.append(self.pool.submit(_fill_here, path, part))
            except BrokenProcessPool as error:  # a worker died since the last answer
                lost: Future[Filled] = Future()
                lost.set_exception(error)
                job.futures.append(lost)

    def _wait(self, job: _Job) -> None:
        """Wait until a job is filled; replace the workers if they died or hang."""
        for future in job.futures:
            try:
                future.result(self.answer_s)
            except BrokenProcessPool:
                self._replace_workers(hung=False)
                return
            except TimeoutError:
                if future.done():
                    raise  # a worker's own error
                self._replace_workers(hung=True)
                return

    def _replace_workers(self, *, hung: bool) -> None:
        workers = dict(self.pool._processes or {})  # not public before Python 3.14 (`kill_workers`)
        if hung:
            for worker in workers.values():
                worker.kill()
        self.pool.shutdown(cancel_futures=True)
        cause = f"no answer within {self.answer_s:g} s" if hung else _ends(workers)
        self.restarts, self._restarts_in_a_row = self.restarts + 1, self._restarts_in_a_row + 1
        if self._restarts_in_a_row > MOST_RESTARTS:
            raise PipelineError(
                f"decode workers ended {self._restarts_in_a_row} times in a row ({cause}). Look for a lack of memory on this node "
                "(`dmesg`) and lower resources.decode_workers; with 0, threads of the training process decode. The same command "
                "goes on from the last checkpoint"
            )
        log.warning("decode workers are replaced, and nothing is lost: %s", cause)
        self.pool = self._new_pool()
        for job in self.jobs:
            self._submit(job)

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        return ProcessPoolExecutor(self.processes, context, _begin_worker, (self.maker,))


def start_fork_server(maker: PictureMaker) -> None:
    """Start the server that workers are forked from, unless it runs. Its imports take seconds, for which nobody has to wait yet."""
    needed = [__name__, *([maker.noise.__module__] if maker.noise else [])]
    if maker.augment.rand_augment:
        needed.append("timm.data.auto_augment")
    forkserver.set_forkserver_preload(needed)
    with _blocked(_FOR_THE_PARENT):  # both inherit this: a stop sent to the whole group must not end the feed
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)  # once more, as the tracker's start unblocks some
        forkserver.ensure_running()


@contextmanager
def _blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _release(job: _Job) -> None:
    if job.descriptor >= 0:
        os.close(job.descriptor)  # the mapping stays for as long as a tensor uses it


def _is_filled(future: Future[Filled]) -> bool:
    """Whether a part is done, or failed for a reason that another worker would meet as well."""
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


def _ends(workers: Mapping[int, multiprocessing.process.BaseProcess]) -> str:
    """Describe how workers ended. The pool ends those that are left with SIGTERM, so others are named first."""
    codes = {pid: worker.exitcode for pid, worker in workers.items() if worker.exitcode}
    first = {pid: code for pid, code in codes.items() if code != -signal.SIGTERM} or codes
    named = (
        f"pid {pid} {signal.Signals(-code).name if code < 0 else f'exit code {code}'}" for pid, code in first.items()
    )
    return ", ".join(named) or "a worker ended"


def _mapped(descriptor: int) -> torch.Tensor:
    """Return shared memory as bytes; it is unmapped with the last tensor that uses it."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


# In a worker process

_maker: PictureMaker


def _begin_worker(maker: PictureMaker) -> None:
    global _maker  # noqa: PLW0603 - a pool hands its tasks to plain functions
    _maker = maker
    os.setsid()  # out of reach of signals to the group and to the session
    for one in (signal.SIGINT, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)  # which also drops what arrived while they were blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)  # the pool ends its workers with SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """End this worker when the training process is gone. Its parent is the fork server, which waits for its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def _fill_here(path: str, part: Part) -> Filled:
    cache, traffic = _maker.cache.counts, _maker.cache.store.traffic
    descriptor = os.open(path, os.O_RDWR)
    try:
        batch = _maker.layout.tensors(_mapped(descriptor))
    finally:
        os.close(descriptor)
    unreadable = _maker.fill(batch, part)
    return Filled(
        unreadable,
        CacheCounts(*(now - then for now, then in zip(_maker.cache.counts, cache, strict=True))),
        Traffic(*(now - then for now, then in zip(_maker.cache.store.traffic, traffic, strict=True))),
    )
