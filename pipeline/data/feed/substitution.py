"""What stands in for a training sample that cannot be read: decided by a keyed hash, written down, limited.

Skipping would shift the order and unbalance the ranks. So another sample of the same shard takes the place: the first in a
permutation keyed by (seed, epoch, id of the sample) that can be read. The same at any world size and after a resume.
Its own id travels with it: crop, mask and label are its own, and it is its id that reached the device.
Nothing is substituted in evaluation: a score must be of the images it says it is of.
Errors: DataError when an epoch has more substitutions than SUBSTITUTED_STOP_SHARE allows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.randomness import hash64, key64
from pipeline.errors import DataError

Int64s = npt.NDArray[np.int64]

SUBSTITUTED_STOP_SHARE = 1e-4
"""Share of an epoch's samples that may be substituted before the run stops: every one was read and decoded when it was
sharded, so more than a stray one means that a disk or a copy is going bad."""
SUBSTITUTED_STOP_LEAST = 3
"""So many are borne however few samples there are."""
CANDIDATES = 16
"""Samples tried as substitutes before the shard as a whole is called damaged."""
_NAMED = 5


class Substitution(NamedTuple):
    """One sample of one epoch that another stood in for. Plain values: it is kept in checkpoints as a JSON list."""

    sample_id: int
    """The one the order asked for."""
    substitute_id: int
    """The one that reached the device."""
    epoch: int
    step: int
    """Number of the global batch, from 0."""
    reason: str
    """`crc32`, `truncated` or `undecodable`: the same on every machine."""
    source: str
    """Where the sample came from, relative to the source."""


def candidates(sample_ids: Int64s, sample_id: int, *, seed: int, epoch: int) -> Int64s:
    """[<= CANDIDATES] indices of the shard's samples that may stand in for one, in the order in which they are tried."""
    keyed = hash64(sample_ids, key64("substitute", seed, epoch, sample_id))
    order = np.argsort(keyed, kind="stable")
    others: Int64s = order[sample_ids[order] != sample_id][:CANDIDATES]
    return others


def most_allowed(samples_per_epoch: int) -> int:
    """Substitutions in one epoch that a run goes on with."""
    return max(SUBSTITUTED_STOP_LEAST, int(SUBSTITUTED_STOP_SHARE * samples_per_epoch))


def check_limit(substitutions: Sequence[Substitution], samples_per_epoch: int, where: str) -> None:
    """DataError when the last epoch among these has too many; `where`: address of the dataset."""
    if not substitutions:
        return
    epoch = max(one.epoch for one in substitutions)
    allowed = most_allowed(samples_per_epoch)
    # a batch may end one epoch and begin the next, so the one before is looked at too
    for looked_at in (epoch - 1, epoch):
        found = [one for one in substitutions if one.epoch == looked_at]
        if len(found) > allowed:
            named = ", ".join(f"{one.source} (id {one.sample_id}, {one.reason})" for one in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise DataError(
                f"{where}: {len(found)} samples of epoch {looked_at} could not be read, more than the {allowed} that others "
                f"may stand in for: {named}{more}. crc32 and truncated: restore the shards from a copy, or delete them and run "
                "the shard step again. undecodable: take those images out of the source and shard it anew. Then the same "
                "command goes on from the last checkpoint"
            )
