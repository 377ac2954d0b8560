"""Where a training begins: its own newest checkpoint, else another training's that it was forked from, else initial weights.

Errors: CheckpointError when the forked checkpoint is gone, damaged, or another one than was forked."""

import hashlib
from dataclasses import dataclass

from pipeline.errors import CheckpointError
from pipeline.graph.step import Attempt
from pipeline.storage import MissingObject, open_store
from pipeline.training.checkpoints.format import MANIFEST, Checkpoint, newest, open_checkpoint


@dataclass(frozen=True, kw_only=True)
class StartPoint:
    """A checkpoint of another training in the same store, from which this one goes on: weights, moments and position."""

    checkpoint: str
    """Its key in the store: `pretrain-<fingerprint>/g0001/checkpoints/step-00000500`."""
    manifest_sha256: str
    """Of its manifest, which names all of it by hash."""


def beginning(attempt: Attempt, start: StartPoint | None) -> Checkpoint | None:
    """The checkpoint to begin from, opened and verified; None: there is none."""
    return newest(attempt) or forked(attempt, start)


def forked(attempt: Attempt, start: StartPoint | None) -> Checkpoint | None:
    """The other training's checkpoint, opened and verified; None: this one is no fork."""
    if not start:
        return None
    store = open_store(attempt.root_uri.rpartition("/")[0])
    try:
        found = hashlib.sha256(store.read(f"{start.checkpoint}/{MANIFEST}")).hexdigest()
    except MissingObject as cause:
        raise CheckpointError(
            f"{store.uri}/{start.checkpoint}, which was forked, is gone. Restore it, or fork again"
        ) from cause
    if found != start.manifest_sha256:
        raise CheckpointError(
            f"{store.uri}/{start.checkpoint} is another checkpoint ({found[:12]}) than the one that was forked "
            f"({start.manifest_sha256[:12]}). Fork again"
        )
    return open_checkpoint(store, start.checkpoint)
