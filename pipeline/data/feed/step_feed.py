"""Batches by step number, each prepared on a thread while the one before is used.

Usually one step follows the other; after a jump (a resume or a rollback) reading starts again from there. Whatever a batch takes
besides decoding happens on the thread: its order, its place in pinned memory, and what `prepare` makes of it, such as a copy to
the device. The training loop only takes what is ready."""

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Generic, TypeVar

import torch

from pipeline.data.feed.loader import Batch, Loader

T = TypeVar("T")


class Feed(Generic[T]):
    """Reads ahead from the last requested step. The caller closes it."""

    def __init__(
        self, loader: Loader, total_steps: int, prepare: Callable[[Batch], T], *, device: torch.device
    ) -> None:
        self.loader, self.total_steps, self.ahead = loader, total_steps, -1
        self.prepare, self.device = prepare, device
        self.prepared: Generator[tuple[Batch, T]] | None = None
        self.wait_seconds = 0.0
        """Time that the consumer has spent waiting for batches so far."""

    def batch(self, step: int) -> tuple[Batch, T]:
        """Return this rank's part of a step, and what `prepare` made of it."""
        began = time.perf_counter()
        if self.prepared is None or step != self.ahead:  # a jump: what was read ahead is of no use
            self.close()
            batches = self.loader.from_step(step, self.total_steps)
            self.prepared = one_ahead(batches, self.prepare, device=self.device)
        self.ahead = step + 1
        try:
            return next(self.prepared)
        finally:
            self.wait_seconds += time.perf_counter() - began

    def close(self) -> None:
        """End the loader's threads and processes."""
        if self.prepared:
            self.prepared.close()


def one_ahead(
    batches: Generator[Batch], prepare: Callable[[Batch], T], *, device: torch.device
) -> Generator[tuple[Batch, T]]:
    """Yield the batches and what `prepare` makes of each, on a thread that works on one while the one before is used."""
    used = deque[Batch]()

    def take() -> tuple[Batch, T] | None:
        # Freed here: giving 77 MB back to the system takes 5 ms. The newest may still be in use.
        while len(used) > 1:
            used.popleft()
        batch = next(batches, None)
        return None if batch is None else (batch, prepare(batch))

    # CUDA's current device belongs to a thread; pinning memory without one would open a context on the first GPU.
    begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with closing(batches), ThreadPoolExecutor(1, "feed", begin) as thread:
        following = thread.submit(take)
        while (ready := following.result()) is not None:
            following = thread.submit(take)
            yield ready
            used.append(ready[0])
