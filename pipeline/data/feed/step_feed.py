"""Batches by the number of their step: one after the other as a rule, and from elsewhere after a jump."""

from collections.abc import Generator

from pipeline.data.feed.loader import Batch, Loader


class Feed:
    """Reads ahead from the last step that was asked for; close it."""

    def __init__(self, loader: Loader, total_steps: int) -> None:
        self.loader, self.total_steps, self.ahead = loader, total_steps, -1
        self.batches: Generator[Batch] | None = None

    def batch(self, step: int) -> Batch:
        """This rank's part of a step."""
        if self.batches is None or step != self.ahead:
            self.close()
            self.batches = self.loader.from_step(step, self.total_steps)
        self.ahead = step + 1
        return next(self.batches)

    def close(self) -> None:
        """Ends the loader's threads."""
        if self.batches:
            self.batches.close()
