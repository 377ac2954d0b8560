"""A rank's part of a checkpoint: a copy of its fragments that is, byte for byte, the safetensors file they become.

It is allocated once, before training, and filled again at every save. In memory it is touched too (pinned for CUDA): the loop then
waits for one memory copy and nothing else. On disk it is a nameless file that is mapped: the system writes it out and takes its
memory back where that is short, and the loop waits for the disk as far as it must. Values lie in the order in which the
optimiser's flat buffers hold them, so that few long runs are copied: at every short one threads would wait for each other.
Layout: 8 bytes length of the header, the header (JSON, padded so that values begin at a multiple of 64 bytes), float32 values;
tensors are named "kind|parameter|start", shape [count]. Units: bytes. Errors: StorageError for a disk that has no room for it."""

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
from pipeline.training.engine.deepspeed_engine import Fragment

Room = Callable[[int], Tensor]
"""Gives so many bytes, shape [bytes], uint8."""

_VALUE_BYTES = 4
_PIECE_VALUES = 4 * 2**20
"""Whichever thread is free takes the next 16 MiB: none waits for one that the machine has taken away."""
_MOST_THREADS = 8
_ALIGNMENT = 64
"""Values begin on a cache line, as they do where they come from."""


def in_memory(size: int) -> Tensor:
    """For CPUs."""
    return _touched(torch.empty(size, dtype=torch.uint8))


def pinned(size: int) -> Tensor:
    """For CUDA, which copies to such memory by itself."""
    return _touched(torch.empty(size, dtype=torch.uint8, pin_memory=True))


def on_disk(directory: Path) -> Room:
    """In a file there, without a name: it is gone when its process is."""

    def room(size: int) -> Tensor:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=directory) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # later a full disk would be a killed process
                return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        except OSError as error:
            raise StorageError(
                f"{directory}: {size} bytes for a copy of the worker's state: {error.strerror}. Free as much, name a folder on a "
                "larger disk in resources.cache_directory, or write resources.checkpoint_copy=memory"
            ) from error

    return room


def room_for_copy(resources: Resources, device: torch.device) -> Room:
    """Return where a worker's state is copied to before it is written: pinned memory for CUDA, memory, or a file on disk."""
    if resources.checkpoint_copy == "disk":
        return on_disk(Path(resources.cache_directory).expanduser() / "copies")
    return pinned if device.type == "cuda" else in_memory


def _touched(memory: Tensor) -> Tensor:
    return memory.fill_(0)  # pages are given when first written to, which takes longer than the copy: done now


class HostCopy:
    """Room for the fragments of one rank, which are the same runs of the same parameters at every save."""

    def __init__(self, fragments: Iterable[Fragment], room: Room = in_memory) -> None:
        header: dict[str, Any] = {}
        self._places: dict[str, slice] = {}
        end = 0
        for fragment in sorted(fragments, key=_place_in_memory):
            start, end = end, end + fragment.values.numel()
            self._places[_name(fragment)] = slice(start, end)
            offsets = [_VALUE_BYTES * start, _VALUE_BYTES * end]
            header[_name(fragment)] = {"dtype": "F32", "shape": [end - start], "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        begin = 8 + len(text)
        self._memory = room(begin + _VALUE_BYTES * end)
        self._memory[:begin] = torch.tensor(list(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._values = self._memory[begin:].view(torch.float32)
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, torch.get_num_threads()))

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copies the values; when it returns, training may change them."""
        values = {_name(fragment): fragment.values for fragment in fragments}
        pieces: list[tuple[Tensor, Tensor]] = []
        for place, run in joined((place, values[name]) for name, place in self._places.items()):
            if run.device.type == "cpu":
                pieces += zip(
                    torch.split(self._values[place], _PIECE_VALUES), torch.split(run, _PIECE_VALUES), strict=True
                )
            else:
                self._values[place].copy_(run, non_blocking=True)
        list(self._threads.map(lambda piece: np.copyto(piece[0].numpy(), piece[1].numpy()), pieces))
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False)

    @property
    def file(self) -> memoryview:
        """The whole file; it stays as it is until the next `take`."""
        view: Any = self._memory.numpy()
        return memoryview(view)


def joined(pieces: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
    """Pieces that follow each other in memory as they do in the file, as one."""
    run: tuple[slice, Tensor] | None = None
    for place, values in pieces:
        if run and _follows(run[1], values):
            start, whole = run[0].start, run[1].as_strided((place.stop - run[0].start,), (1,))
            run = (slice(start, place.stop), whole)
            continue
        if run:
            yield run
        run = (place, values)
    if run:
        yield run


def _place_in_memory(fragment: Fragment) -> tuple[int, int, int]:
    """Large buffers first: the odd sizes of small ones would push them off their alignment."""
    storage = fragment.values.untyped_storage()
    return -storage.nbytes(), storage.data_ptr(), int(fragment.values.storage_offset())


def _follows(run: Tensor, values: Tensor) -> bool:
    """Whether values lie right behind a run, in the same memory."""
    same = run.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() and run.dtype == values.dtype
    return same and bool(run.storage_offset() + run.numel() == values.storage_offset())


def _name(fragment: Fragment) -> str:
    return f"{fragment.kind}|{fragment.parameter}|{fragment.start}"
