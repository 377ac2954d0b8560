"""Substitutes for training samples that cannot be read: chosen by a keyed hash, recorded, and limited in number.

Skipping a sample would shift the order and unbalance the ranks. So another sample of the same shard replaces it: the first one
that can be read, in a permutation keyed by (seed, epoch, id of the sample). It is the same at any world size and after a resume.
The substitute keeps its own id, crop, mask and label, and its id counts as the one that reached the device.
Nothing is substituted in evaluation: a score must be of exactly the images it claims.
Errors: DataError when an epoch has more substitutions than SUBSTITUTED_STOP_SHARE allows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.randomness import hash64, key64
from pipeline.errors import DataError

Int64s = npt.NDArray[np.int64]

SUBSTITUTED_STOP_SHARE = 1e-4
"""Share of an epoch's samples that may be substituted before the run stops. Every image was read and decoded when it was
sharded, so more than a stray failure means that a disk or a copy is going bad."""
SUBSTITUTED_STOP_LEAST = 3
"""Substitutions that are always allowed, however small the dataset."""
CANDIDATES = 16
"""Samples tried as substitutes before the whole shard counts as damaged."""
_NAMED = 5


class Substitution(NamedTuple):
    """A sample that another one replaced in one epoch. Checkpoints keep it as a JSON list, so its values are plain."""

    sample_id: int
    """The sample that the order asked for."""
    substitute_id: int
    """The sample that reached the device."""
    epoch: int
    step: int
    """Number of the global batch, from 0."""
    reason: str
    """`crc32`, `truncated` or `undecodable`; the same on every machine."""
    source: str
    """Path of the replaced sample, relative to the source."""


def candidates(sample_ids: Int64s, sample_id: int, *, seed: int, epoch: int) -> Int64s:
    """Return [<= CANDIDATES] indices of the shard's samples that may replace one, in the order in which they are tried."""
    keyed = hash64(sample_ids, key64("substitute", seed, epoch, sample_id))
    # stable, so that even equal hashes give one order everywhere
    order = np.argsort(keyed, kind="stable")
    others: Int64s = order[sample_ids[order] != sample_id][:CANDIDATES]
    return others


def most_allowed(samples_per_epoch: int) -> int:
    """Return the number of substitutions in one epoch that a run tolerates."""
    # the least: 1e-4 of a small dataset is less than one image
    return max(SUBSTITUTED_STOP_LEAST, int(SUBSTITUTED_STOP_SHARE * samples_per_epoch))


def check_limit(substitutions: Sequence[Substitution], samples_per_epoch: int, where: str) -> None:
    """Raise DataError if the last epoch among these, or the one before, has too many. `where`: address of the dataset."""
    if not substitutions:
        return
    epoch = max(one.epoch for one in substitutions)
    allowed = most_allowed(samples_per_epoch)
    # a batch may end one epoch and begin the next, so the one before is checked too
    for looked_at in (epoch - 1, epoch):
        found = [one for one in substitutions if one.epoch == looked_at]
        if len(found) > allowed:
            named = ", ".join(f"{one.source} (id {one.sample_id}, {one.reason})" for one in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            raise DataError(
                f"{where}: {len(found)} samples of epoch {looked_at} could not be read, more than the {allowed} that may be "
                f"substituted: {named}{more}. crc32 and truncated: restore the shards from a copy, or delete them and run the "
                "shard step again. undecodable: remove those images from the source and shard it again. Then the same command "
                "continues from the last checkpoint"
            )
