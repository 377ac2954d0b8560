"""A rank's part of a checkpoint: a copy of its fragments that is, byte for byte, the safetensors file that is written.

The copy is allocated once, before training, and refilled at every save. In memory (pinned for CUDA) its pages are touched in
advance, so the loop waits for one memory copy and nothing else. On disk it is a memory-mapped file without a name: the kernel
writes its pages out and reclaims their memory when that is short, and the loop may have to wait for the disk. Values lie in
the order of the optimiser's flat buffers, so few long runs are copied; at every short run threads would wait for each other.

Layout: 8 bytes for the length of the header; the header (JSON, padded so that values start at a multiple of 64 bytes); float32
values. Tensors are named "kind|parameter|start" and have shape [count]. Units: bytes.
Errors: StorageError if the disk has no room for the copy."""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cluster.resources import Resources
from pipeline.errors import StorageError
from pipeline.storage import expand_address
from pipeline.training.engine.deepspeed_engine import Fragment

Allocator = Callable[[int], Tensor]
"""Number of bytes -> uint8 [bytes]."""

_VALUE_BYTES = 4
_PIECE_VALUES = 4 * 2**20
"""Threads take the next 16 MiB as they become free, so none waits for one that the system has descheduled."""
_MOST_THREADS = 8
_ALIGNMENT = 64
"""Values start on a cache line, as they do in the buffers that they are copied from."""


def in_memory(size: int) -> Tensor:
    """Allocate ordinary memory, for CPU workers."""
    return _touched(torch.empty(size, dtype=torch.uint8))


def pinned(size: int) -> Tensor:
    """Allocate pinned memory, to which CUDA copies asynchronously."""
    return _touched(torch.empty(size, dtype=torch.uint8, pin_memory=True))


def on_disk(directory: Path) -> Allocator:
    """Return an allocator of mapped files in a directory; they have no name, so they vanish with the process."""

    def allocate(size: int) -> Tensor:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # The mapping outlives the closed file, and nothing else refers to it.
            with TemporaryFile(dir=directory) as file:
                # Reserve the blocks now: writing to a mapped page when the disk is full would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        except OSError as error:
            raise StorageError(
                f"{directory}: {size} bytes for a copy of the worker's state: {error.strerror}. Free that much, name a folder on a "
                "larger disk in resources.cache_directory, or write resources.checkpoint_copy=memory"
            ) from error

    return allocate


def allocator_for(resources: Resources, device: torch.device) -> Allocator:
    """Return the allocator of the copy that `resources` ask for: pinned memory for CUDA, ordinary memory, or a file on disk."""
    if resources.checkpoint_copy == "disk":
        return on_disk(Path(expand_address(resources.cache_directory)) / "copies")
    return pinned if device.type == "cuda" else in_memory


def _touched(memory: Tensor) -> Tensor:
    return memory.fill_(0)  # the kernel maps pages on the first write, which takes longer than the copy: do it now


class HostCopy:
    """A copy of one rank's fragments, which are the same ranges of the same parameters at every save."""

    def __init__(self, fragments: Iterable[Fragment], allocate: Allocator = in_memory) -> None:
        header: dict[str, Any] = {}
        self._ranges: dict[str, slice] = {}  # by tensor name, in values from the end of the header
        end = 0
        for fragment in sorted(fragments, key=_memory_order):
            start, end = end, end + fragment.values.numel()
            self._ranges[_name(fragment)] = slice(start, end)
            offsets = [_VALUE_BYTES * start, _VALUE_BYTES * end]
            header[_name(fragment)] = {"dtype": "F32", "shape": [end - start], "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # safetensors allows blanks after the header
        values_start = 8 + len(text)
        self._memory = allocate(values_start + _VALUE_BYTES * end)
        self._memory[:values_start] = torch.tensor(list(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._values = self._memory[values_start:].view(torch.float32)  # the same memory; its start is aligned
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, torch.get_num_threads()))

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the values; training may change them once this returns."""
        values = {_name(fragment): fragment.values for fragment in fragments}
        pieces: list[tuple[Tensor, Tensor]] = []
        for target, run in joined((target, values[name]) for name, target in self._ranges.items()):
            if run.device.type == "cpu":
                # Queued for the threads below; a CUDA tensor's copy runs on the device's stream instead.
                pieces += zip(
                    torch.split(self._values[target], _PIECE_VALUES), torch.split(run, _PIECE_VALUES), strict=True
                )
            else:
                self._values[target].copy_(run, non_blocking=True)
        # numpy's copy releases the interpreter lock, so the threads run in parallel; `list` waits and raises their errors.
        list(self._threads.map(lambda piece: np.copyto(piece[0].numpy(), piece[1].numpy()), pieces))
        if self._memory.is_pinned():  # the copies were only queued: wait, or the next step would overwrite their source
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)

    @property
    def file(self) -> memoryview:
        """Return the whole file without copying it; it does not change until the next `take`."""
        view: Any = self._memory.numpy()
        return memoryview(view)


def joined(pieces: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
    """Join pieces that follow each other both in the file and in memory: (range of values in the file, its source)."""
    run: tuple[slice, Tensor] | None = None
    for target, values in pieces:
        if run and _follows(run[1], values):
            # The run grows over its neighbour in the same buffer: a longer view, no copy.
            start, whole = run[0].start, run[1].as_strided((target.stop - run[0].start,), (1,))
            run = (slice(start, target.stop), whole)
            continue
        if run:
            yield run
        run = (target, values)
    if run:
        yield run


def _memory_order(fragment: Fragment) -> tuple[int, int, int]:
    """Return a sort key: large buffers first, because the odd sizes of small ones would push them off their alignment."""
    storage = fragment.values.untyped_storage()
    return -storage.nbytes(), storage.data_ptr(), int(fragment.values.storage_offset())


def _follows(run: Tensor, values: Tensor) -> bool:
    """Whether the values lie right behind the run, in the same buffer."""
    same = run.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() and run.dtype == values.dtype
    return same and bool(run.storage_offset() + run.numel() == values.storage_offset())


def _name(fragment: Fragment) -> str:
    return f"{fragment.kind}|{fragment.parameter}|{fragment.start}"
