"""Where training stands: read from a checkpoint, moved by the loop, handed to the saver. Steps are global batches consumed."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pipeline.data.feed.loader import Batch
from pipeline.data.feed.order import ids_digest
from pipeline.data.feed.substitution import Substitution
from pipeline.storage import open_store
from pipeline.training.checkpoints.format import Checkpoint, open_checkpoint
from pipeline.training.guard import FRESH, GuardState
from pipeline.training.world import World


@dataclass
class Position:
    """`digest` and `count` are this rank's part since the checkpoint (rank 0: and what that one held)."""

    global_step: int = 0
    digest: int = 0
    count: int = 0
    substitutions: list[Substitution] = field(default_factory=list)
    """Of all ranks, on every one."""
    loss: float = math.nan
    grad_norm: float = math.nan
    guard: GuardState = FRESH
    saved_at: int = -1
    saved_key: str = ""
    history: list[dict[str, float]] = field(default_factory=list)

    def count_in(self, batch: Batch) -> None:
        """These ids have reached the device."""
        self.digest = (self.digest + ids_digest(batch.epochs.numpy(), batch.sample_ids.numpy())) % 2**64
        self.count += len(batch.sample_ids)


def position_at(checkpoint: Checkpoint, *, global_batch: int, world: World) -> Position:
    """Where a checkpoint stands. Ids that nobody counted are taken for as many as there must have been."""
    manifest, history = checkpoint.manifest, checkpoint.history()
    counted = manifest.global_step * global_batch if manifest.ids_count is None else manifest.ids_count
    return Position(
        global_step=manifest.global_step,
        digest=manifest.ids_digest if world.is_first else 0,
        count=counted if world.is_first else 0,
        substitutions=list(manifest.substitutions),
        loss=history[-1]["loss"] if history else math.nan,
        grad_norm=history[-1]["grad_norm"] if history else math.nan,
        guard=manifest.guard,
        saved_at=manifest.global_step,
        saved_key=checkpoint.key,
        history=history,
    )


@contextmanager
def found(world: World, find: Callable[[], Checkpoint | None]) -> Iterator[Checkpoint | None]:
    """The checkpoint that rank 0 finds, opened (and verified) on every worker. None: there is none."""
    with ExitStack() as held:
        checkpoint = None
        with world.together():
            if world.is_first and (checkpoint := find()):
                held.enter_context(checkpoint)
        root_uri, key = world.from_first((checkpoint.root.uri, checkpoint.key) if checkpoint else ("", ""))
        with world.together():
            if key and not world.is_first:
                checkpoint = held.enter_context(open_checkpoint(open_store(root_uri), key))
        yield checkpoint
