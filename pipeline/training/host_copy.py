"""A rank's part of a checkpoint in memory: a copy of its fragments that is, byte for byte, the safetensors file they become.

It is allocated and touched once, before training (pinned for CUDA), and filled again at every save: the loop waits for one memory
copy and nothing else. Values lie in the file in the order in which the optimiser's flat buffers hold them, so that few long runs
are copied: of 600 short ones memcpy takes 1.7 times as long, and torch's threads wait for each other at every one (20 times, on
a busy machine). Layout: 8 bytes length of the header, the header (JSON, padded to 8 bytes), float32 values; tensors are
named "kind|parameter|start", shape [count]. Units: bytes."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.training.engine import Fragment

_VALUE_BYTES = 4


class HostCopy:
    """Memory for the fragments of one rank, which are the same runs of the same parameters at every save."""

    def __init__(self, fragments: Iterable[Fragment], *, pinned: bool) -> None:
        header: dict[str, Any] = {}
        self._places: dict[str, slice] = {}
        end = 0
        for fragment in sorted(fragments, key=lambda fragment: fragment.values.data_ptr()):
            start, end = end, end + fragment.values.numel()
            self._places[_name(fragment)] = slice(start, end)
            offsets = [_VALUE_BYTES * start, _VALUE_BYTES * end]
            header[_name(fragment)] = {"dtype": "F32", "shape": [end - start], "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self._memory = torch.empty(begin + _VALUE_BYTES * end, dtype=torch.uint8, pin_memory=pinned)
        self._memory.fill_(0)  # pages are given when first written to, which takes longer than the copy: done now
        self._memory[:begin] = torch.tensor(list(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._values = self._memory[begin:].view(torch.float32)

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copies the values; when it returns, training may change them."""
        values = {_name(fragment): fragment.values for fragment in fragments}
        for place, run in joined((place, values[name]) for name, place in self._places.items()):
            if run.device.type == "cpu":
                np.copyto(self._values[place].numpy(), run.numpy())
            else:
                self._values[place].copy_(run, non_blocking=True)
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()

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


def _follows(run: Tensor, values: Tensor) -> bool:
    """Whether values lie right behind a run, in the same memory."""
    same = run.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() and run.dtype == values.dtype
    return same and bool(run.storage_offset() + run.numel() == values.storage_offset())


def _name(fragment: Fragment) -> str:
    return f"{fragment.kind}|{fragment.parameter}|{fragment.start}"
