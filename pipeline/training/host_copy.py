"""A rank's part of a checkpoint in memory: a copy of its fragments that is, byte for byte, the safetensors file they become.

It is allocated and touched once, before training (pinned for CUDA), and filled again at every save: the loop waits for one memory
copy and nothing else. Layout: 8 bytes length of the header, the header (JSON, padded to 8 bytes), float32 values; tensors are
named "kind|parameter|start", shape [count]. Units: bytes."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from pipeline.training.engine import Fragment

_VALUE_BYTES = 4


class HostCopy:
    """Memory for the fragments of one rank, which are the same runs of the same parameters at every save."""

    def __init__(self, fragments: Iterable[Fragment], *, pinned: bool) -> None:
        header: dict[str, Any] = {}
        self._places: dict[str, slice] = {}
        end = 0
        for fragment in fragments:
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
        for fragment in fragments:
            place = self._values[self._places[_name(fragment)]]
            if (
                fragment.values.device.type == "cpu"
            ):  # torch's copy would wait for all its threads, fragment by fragment
                np.copyto(place.numpy(), fragment.values.numpy())
            else:
                place.copy_(fragment.values, non_blocking=True)
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()

    @property
    def file(self) -> memoryview:
        """The whole file; it stays as it is until the next `take`."""
        view: Any = self._memory.numpy()
        return memoryview(view)


def _name(fragment: Fragment) -> str:
    return f"{fragment.kind}|{fragment.parameter}|{fragment.start}"
