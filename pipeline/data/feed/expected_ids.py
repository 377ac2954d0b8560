"""Whether the right samples reached the devices: what a checkpoint recorded against what dataset and order imply.

A checkpoint holds the number of ids that reached a device and their digest, a sum of a hash of every (epoch, id). Both follow
from the dataset and the order: a whole epoch is every sample once, and the rest is computed. Recorded substitutions are
excused one by one if the order asked for the replaced sample; anything else is a difference. One extra sample, one missing
sample, or one in place of another is found by looking for the hash (or the difference of two hashes) that the sum is off by.
Letters: N samples per epoch. Cost: 30 ns per sample seen; naming a culprit takes N log N per epoch searched."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mae_core.randomness import Words, hash64
from pipeline.data.feed.order import Int64s, SampleOrder, ids_digest
from pipeline.data.feed.selection import Selection
from pipeline.data.feed.substitution import Substitution, candidates

_AT_ONCE = 2**20  # positions located at a time: Slots holds five int64 arrays of this length, 42 MB
_SEARCHED = 50_000_000
"""Samples searched for a culprit: this takes a minute, and the chance that a pair of samples is named wrongly is 1e-4."""


@dataclass(frozen=True)
class Ids:
    """A multiset of (epoch, id), as its size and its digest."""

    count: int
    digest: int
    """Modulo 2**64."""

    def minus(self, other: "Ids") -> "Ids":
        """Return these without the others."""
        return Ids(self.count - other.count, (self.digest - other.digest) % 2**64)


def expected_ids(
    selection: Selection,
    order: SampleOrder,
    *,
    global_batch: int,
    start: int,
    stop: int,
    substitutions: Iterable[Substitution] = (),
) -> Ids:
    """Return what steps start..stop-1 put on devices, given the substitutions recorded for them."""
    total = order.samples_per_epoch
    first, last = start * global_batch, stop * global_batch
    digest = 0
    whole = range(-(-first // total), last // total)  # epochs that are complete within these steps
    if whole:
        everything = all_ids(selection)
        # independent of the order, so whole epochs need no shuffles
        digest += sum(ids_digest(np.full_like(everything, epoch), everything) for epoch in whole)
        parts = [(first, whole.start * total), (whole.stop * total, last)]
    else:
        parts = [(first, last)]
    for low, high in parts:
        for begin in range(low, high, _AT_ONCE):
            slots = order.locate(np.arange(begin, min(begin + _AT_ONCE, high)))
            digest += ids_digest(slots.epochs, selection.sample_ids(slots))
    for one in substitutions:
        # the digest is a sum, so a substitution takes one term out of it and adds another
        if start <= one.step < stop:
            epoch = np.array([one.epoch])
            digest += ids_digest(epoch, np.array([one.substitute_id])) - ids_digest(epoch, np.array([one.sample_id]))
    return Ids(last - first, digest % 2**64)


def not_of_this_order(
    selection: Selection, order: SampleOrder, *, global_batch: int, substitutions: Iterable[Substitution]
) -> list[Substitution]:
    """Return the recorded substitutions whose sample is not at that step, or whose substitute the rule does not allow."""
    wrong = []
    seen: set[tuple[int, int]] = set()
    for one in substitutions:
        # the whole global batch: a record does not say which rank read the sample
        slots = order.global_batch(one.step, global_batch)
        ids = selection.sample_ids(slots)
        here = np.flatnonzero((ids == one.sample_id) & (slots.epochs == one.epoch))
        # an (epoch, id) is excused once: a second record of it would hide a second wrong sample
        if len(here) != 1 or (one.epoch, one.sample_id) in seen:
            wrong.append(one)
            continue
        seen.add((one.epoch, one.sample_id))
        others = selection.rows(int(slots.shards[here[0]])).sample_ids
        # any of the candidates: which of those before it were unreadable at the time cannot be known now
        allowed = others[candidates(others, one.sample_id, seed=order.config.seed, epoch=one.epoch)]
        if one.substitute_id not in allowed:
            wrong.append(one)
    return wrong


def describe_difference(excess: Ids, ids: Int64s, epochs: range, *, counted: bool) -> str:
    """Describe what `excess` (recorded less expected; a digest of zero is no difference) says about samples of these epochs.

    `counted`: whether the number of ids was recorded, and not only their digest.
    """
    looked_at = list(reversed(epochs))[: max(1, _SEARCHED // max(1, len(ids)))]
    amount = ""
    if counted and excess.count:
        amount = f"{abs(excess.count)} too {'many' if excess.count > 0 else 'few'}: "
    elif counted:
        amount = "as many as expected, but not the same: "
    if not counted or excess.count in {1, -1}:
        for epoch in looked_at:
            hashes = _hashes(ids, epoch)
            for digest, words in ((excess.digest, "once too often"), (-excess.digest % 2**64, "once too rarely")):
                found = np.flatnonzero(hashes == np.uint64(digest))
                if len(found):
                    return f"{amount}sample {ids[found[0]]} of epoch {epoch} came {words}"
    if not counted or excess.count == 0:
        for epoch in looked_at:
            pair = _exchanged(_hashes(ids, epoch), excess.digest)
            if pair:
                instead, missing = (int(ids[index]) for index in pair)
                return (
                    f"{amount}in epoch {epoch} sample {instead} came once too often, and sample {missing} was left out"
                )
    return f"{amount}more than one sample is wrong, and the sum alone cannot tell which"


def all_ids(selection: Selection) -> Int64s:
    """Return [N] ids of all selected samples."""
    return np.concatenate([selection.rows(shard).sample_ids for shard in range(len(selection.shards))])


def epochs_of(start: int, stop: int, *, global_batch: int, samples: int) -> range:
    """Return the epochs that steps start..stop-1 touch."""
    return range(start * global_batch // samples, -(-stop * global_batch // samples))


def named(substitutions: Sequence[Substitution], most: int = 3) -> str:
    """Name a few substitutions for a message."""
    shown = ", ".join(f"{one.sample_id} by {one.substitute_id} at step {one.step}" for one in substitutions[:most])
    return shown + (f" and {len(substitutions) - most} more" if len(substitutions) > most else "")


def _hashes(ids: Int64s, epoch: int) -> Words:
    return hash64(ids, hash64(np.full_like(ids, epoch), 0))


def _exchanged(hashes: Words, difference: int) -> tuple[int, int] | None:
    """Return indices a and b with hash a - hash b = difference, so a came where b should have, or None."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    # wrapping around at 2**64 is meant: the digest does so too
    with np.errstate(over="ignore"):
        wanted: npt.NDArray[np.uint64] = hashes - np.uint64(difference)  # [N] what b must be for each a
    # clipped because searchsorted returns N for a value beyond the last; the comparison below rejects it
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    found = np.flatnonzero(ordered[at] == wanted)
    return (int(found[0]), int(order[at[found[0]]])) if len(found) else None
