"""Where a training starts: its own newest checkpoint, else that of the training it was forked from, else initial weights.

Errors: CheckpointError when the fork's checkpoint is gone, damaged, or not the one that was forked."""

import hashlib
from dataclasses import dataclass

from pipeline.errors import CheckpointError
from pipeline.graph.step import Attempt
from pipeline.storage import MissingObject, open_store
from pipeline.training.checkpoints.format import MANIFEST, Checkpoint, newest_checkpoint, open_checkpoint


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """A checkpoint of another training in the same store, from which this one takes weights, moments and position."""

    checkpoint: str
    """Its key in the store: `pretrain-<fingerprint>/g0001/checkpoints/step-00000500`."""
    manifest_sha256: str
    """SHA-256 of its manifest, which in turn names every file by hash."""


def starting_checkpoint(attempt: Attempt, start: StartPoint | None) -> Checkpoint | None:
    """Open and verify the checkpoint to start from; None if training starts from initial weights."""
    # Its own progress first: the parent's checkpoint would undo it.
    return newest_checkpoint(attempt) or forked_checkpoint(attempt, start)


def forked_checkpoint(attempt: Attempt, start: StartPoint | None) -> Checkpoint | None:
    """Open and verify the checkpoint that this training was forked from; None if it is no fork."""
    if not start:
        return None
    store = open_store(attempt.root_uri.rpartition("/")[0])
    try:
        sha256 = hashlib.sha256(store.read(f"{start.checkpoint}/{MANIFEST}")).hexdigest()
    except MissingObject as cause:
        raise CheckpointError(
            f"{store.uri}/{start.checkpoint}, which was forked, is gone. Restore it, or fork again"
        ) from cause
    if sha256 != start.manifest_sha256:
        raise CheckpointError(
            f"{store.uri}/{start.checkpoint} is another checkpoint ({sha256[:12]}) than the one that was forked "
            f"({start.manifest_sha256[:12]}). Fork again"
        )
    return open_checkpoint(store, start.checkpoint)
