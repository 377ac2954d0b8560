"""Where a training stands: read from a checkpoint, moved by the loop, handed to the saver.

Units: steps are global batches consumed."""

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
    """Everything that a step changes, apart from weights and moments.

    `digest` and `count` cover what this rank has seen since the checkpoint; on rank 0 they start from the checkpoint's own
    totals, so that the sum over ranks is right.
    """

    global_step: int = 0
    digest: int = 0
    count: int = 0
    substitutions: list[Substitution] = field(default_factory=list)
    """Those of all ranks, on every rank."""
    loss: float = math.nan
    grad_norm: float = math.nan
    guard: GuardState = FRESH
    saved_at: int = -1
    """Step of the newest checkpoint; -1 if nothing has been saved yet."""
    saved_key: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    """Logged rows; complete on rank 0, which is the one that writes them."""

    def count_in(self, batch: Batch) -> None:
        """Add the ids of a batch that has reached the device."""
        # A sum and not a chain: parts of any number of ranks, in any order, add up to the same digest.
        self.digest = (self.digest + ids_digest(batch.epochs.numpy(), batch.sample_ids.numpy())) % 2**64
        self.count += len(batch.sample_ids)


def position_of(checkpoint: Checkpoint, *, global_batch: int, world: World) -> Position:
    """Return the position that a checkpoint was saved at.

    Checkpoints from before ids were counted get the count that their step implies.
    """
    manifest, history = checkpoint.manifest, checkpoint.history()
    count = manifest.global_step * global_batch if manifest.ids_count is None else manifest.ids_count
    return Position(
        global_step=manifest.global_step,
        digest=manifest.ids_digest if world.is_first else 0,
        count=count if world.is_first else 0,
        substitutions=list(manifest.substitutions),
        loss=history[-1]["loss"] if history else math.nan,
        grad_norm=history[-1]["grad_norm"] if history else math.nan,
        guard=manifest.guard,
        saved_at=manifest.global_step,
        saved_key=checkpoint.key,
        history=history,
    )


@contextmanager
def opened_on_all_ranks(world: World, find: Callable[[], Checkpoint | None]) -> Iterator[Checkpoint | None]:
    """Open on every rank the checkpoint that `find` returns on rank 0; None if it finds none.

    Only rank 0 searches: between two listings of the store a checkpoint may appear or be pruned, and ranks that chose
    different ones would train on different weights. The first rank of each node fetches and verifies the files; the others
    on its node read the same ones.
    """
    with ExitStack() as stack:
        checkpoint = None
        with world.fail_together():
            if world.is_first and (checkpoint := find()):
                stack.enter_context(checkpoint)
        # Rank 0 has found one or failed by now; a failure after this point would leave the others in the broadcast.
        root_uri, key = world.broadcast((checkpoint.root.uri, checkpoint.key) if checkpoint else ("", ""))
        if key:
            with world.fail_together():
                if world.local_rank == 0 and checkpoint is None:
                    checkpoint = stack.enter_context(open_checkpoint(open_store(root_uri), key))
            verified = world.all_gather(checkpoint.paths if checkpoint else {})
            # Once this is over, every rank has its files open, so the first of a node may remove their names.
            with world.fail_together():
                if checkpoint is None:
                    store, of_node = open_store(root_uri), verified[world.rank - world.local_rank]
                    checkpoint = stack.enter_context(open_checkpoint(store, key, verified=of_node))
        yield checkpoint
