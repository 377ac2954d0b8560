"""Batches by step number: usually one after the other, and from anywhere else after a jump (a resume or a rollback)."""

from collections.abc import Generator

from pipeline.data.feed.loader import Batch, Loader


class Feed:
    """Reads ahead from the last requested step. The caller closes it."""

    def __init__(self, loader: Loader, total_steps: int) -> None:
        self.loader, self.total_steps, self.ahead = loader, total_steps, -1
        self.batches: Generator[Batch] | None = None

    def batch(self, step: int) -> Batch:
        """Return this rank's part of a step."""
        if self.batches is None or step != self.ahead:  # a jump: what was read ahead is of no use
            self.close()
            self.batches = self.loader.from_step(step, self.total_steps)
        self.ahead = step + 1
        return next(self.batches)

    def close(self) -> None:
        """End the loader's threads and processes."""
        if self.batches:
            self.batches.close()
