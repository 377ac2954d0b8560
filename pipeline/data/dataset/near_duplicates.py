"""Near duplicates across splits: images of `val` and `test` that show the same picture as one of `train`.

Three stages, each on what the one before leaves. (1) Of each held-out image the 64 training images with the nearest perceptual
hashes, within 16 of 64 bits. (2) Of these, the 16 whose thumbnails correlate most without alignment. (3) Their correlation
after alignment (`pipeline.data.images.alignment`). A pair is an alarm from `SAME` on, if it also stands out from what is usual
in this dataset, where digits on black all resemble each other (`alarms`).
Hashes within 4 bits of all equal (plain colours, smooth gradients) say nothing, so their images are left out and counted. Beyond
1e11 pairs of hashes a random share of the held-out images is compared, and `compared` says how many.
Letters: u held-out images, v training images, p pairs.
Memory: 20 bytes per sample, 4 KB per compared image, the bytes of one shard per thread. Time: `python -m benchmarks.scale`, and
`python -m benchmarks.leaks` for recall, false alarms and the time per image.
Source: docs/decisions/026-near-duplicates-by-pixels.md."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.facts import NearDuplicateFacts, NearPair
from pipeline.data.dataset.schema import NO_LABEL, SampleTable
from pipeline.data.images.alignment import SIDE, Thumbnail, coarse, same_pixels, similarity

DISTANCE = 16
"""Of 64 bits. Of CIFAR-10's published near duplicates, 23 % are within 4, 83 % within 12 and 94 % within 16."""
SAME = 0.86
"""Correlation after alignment from which two thumbnails may be one picture."""
_NEIGHBOURS = 64
_ALIGNED = 16
_COARSE_FROM = 0.55
_USUAL = 4
"""Rank, from 0, of the training image whose difference from a held-out one is what is usual: copies are rarely this many."""
_OF_USUAL = 0.1
"""Share of the usual difference below which a pair stands out in a whole dataset."""
_GAP = 3.0
"""Times by which the difference of the next image is larger, after a pair or a group of copies that stands out on its own."""
_LEAST = 0.02
"""Differences below this are equal: re-encoding alone makes them."""
_FLAT = 4
_BITS = 64
_PAIRS_MAX = 100_000_000_000
_HASHES_AT_ONCE = 2**16  # their differences fit into a core's cache
_THREADS = min(8, os.cpu_count() or 1)
_EXAMPLES = 3
_SEEN = np.dtype([("hash", "u8"), ("sample_id", "i8"), ("shard", "i4"), ("label", "i4")])

Hashes = NDArray[np.uint64]
Int64s = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Seen = NDArray[Any]
"""[n] of dtype _SEEN, sorted by shard and id."""


class Images(Protocol):
    """Where thumbnails and bytes of samples come from, such as `pipeline.data.dataset.thumbnails.StoredImages`."""

    def thumbnails(self, shard: int, sample_ids: Int64s) -> tuple[Thumbnail, Bools]:
        """Return [n, SIDE, SIDE] thumbnails, and [n] whether each image could be read."""
        ...

    def bytes(self, shard: int, sample_ids: Int64s) -> Iterator[bytes | None]:
        """Yield the stored bytes of each image, or None if they cannot be read."""
        ...


@dataclass(frozen=True)
class SampleRef:
    """A sample, by its shard, id and label."""

    shard: int
    sample_id: int
    label: int = NO_LABEL


@dataclass(frozen=True)
class FoundPair:
    """A held-out image and a training image that are one picture."""

    held_out: SampleRef
    train: SampleRef
    similarity: float
    same_pixels: bool
    """Whether both decode to equal pixels."""

    @property
    def conflicting(self) -> bool:
        """Whether both are labelled, and differently."""
        return NO_LABEL not in (self.held_out.label, self.train.label) and self.held_out.label != self.train.label


@dataclass(frozen=True)
class NearDuplicates:
    """The near duplicates of a dataset."""

    pairs: tuple[FoundPair, ...]
    """By held-out image, then by similarity."""
    compared: int
    """Samples of val and test that were compared: all but the flat ones, unless there are too many."""
    flat: int
    """Samples left out because their hash carries no information."""
    aligned: int
    """Pairs whose thumbnails were aligned."""
    unread: int
    """Images that could not be read, so that their pairs are unknown."""


class NearDuplicateSearch:
    """Collects the hashes of every shard, then finds the pairs."""

    def __init__(self, *, pairs_max: int = _PAIRS_MAX) -> None:
        self._pairs_max = pairs_max
        self._train: list[Seen] = []
        self._held_out: list[Seen] = []
        self._flat = 0

    def add(self, shard: int, split: str, samples: SampleTable) -> SampleTable:
        """Collect the hashes of a shard's served samples (sample_id, dhash64, label, served), and return the samples unchanged."""
        served = samples.column("served").to_numpy().astype(bool)
        hashes = samples.column("dhash64").to_numpy()[served]
        flat = is_flat(hashes)
        piece = np.empty(int((~flat).sum()), _SEEN)
        piece["hash"] = hashes[~flat]
        piece["sample_id"] = samples.column("sample_id").to_numpy()[served][~flat]
        piece["label"] = samples.column("label").to_numpy()[served][~flat]
        piece["shard"] = shard
        (self._train if split == "train" else self._held_out).append(piece)
        self._flat += int(flat.sum())
        return samples

    def find(self, images: Images) -> NearDuplicates:
        """Return all pairs of a sample of train and one of val or test, and forget the collected hashes."""
        train, held_out = _joined(self._train), _joined(self._held_out)
        held_out = _share(held_out, self._pairs_max / max(1, len(train) * len(held_out)))
        u, v = nearest(held_out["hash"], train["hash"])
        looked_up = np.unique(u)
        thumbnails, readable = _read(images, held_out[looked_up])
        # from here on, u counts the held-out images that have a candidate
        u = np.searchsorted(looked_up, u)
        vectors = coarse(thumbnails)
        scores = _compared(images, train, u, v, lambda a, one: np.einsum("pd,pd->p", vectors[a], coarse(one)))
        unread = int((~readable).sum()) + len(np.unique(v[np.isnan(scores)]))
        kept = _best(u, scores, least=_COARSE_FROM, most=_ALIGNED) & readable[u]
        u, v = u[kept], v[kept]

        def aligned(a: Int64s, ones: Thumbnail) -> Floats:
            return np.array([similarity(thumbnails[i], one) for i, one in zip(a, ones, strict=True)], np.float32)

        scores = _compared(images, train, u, v, aligned)
        alarmed = np.flatnonzero(alarms(u, scores, count=len(held_out)))
        alarmed = alarmed[np.lexsort((v[alarmed], -scores[alarmed], u[alarmed]))]
        pairs = (_pair(images, held_out[looked_up[u[at]]], train[v[at]], float(scores[at])) for at in alarmed.tolist())
        return NearDuplicates(tuple(pairs), len(held_out), self._flat, len(u), unread)


def near_duplicate_facts(
    found: NearDuplicates, samples: Callable[[int], SampleTable], *, classes: Sequence[str]
) -> NearDuplicateFacts:
    """Return the numbers, and examples by their sources: conflicting labels first. `samples` reads a shard's samples."""
    first = sorted(found.pairs, key=lambda pair: (not pair.conflicting, -pair.similarity))[:_EXAMPLES]
    return NearDuplicateFacts(
        pairs=len(found.pairs),
        held_out=len({pair.held_out for pair in found.pairs}),
        compared=found.compared,
        flat=found.flat,
        distance=DISTANCE,
        examples=named_pairs(first, samples, classes=classes),
        aligned=found.aligned,
        same_pixels=len({pair.held_out for pair in found.pairs if pair.same_pixels}),
        conflicting=len({pair.held_out for pair in found.pairs if pair.conflicting}),
        unread=found.unread,
    )


def named_pairs(
    pairs: Sequence[FoundPair], samples: Callable[[int], SampleTable], *, classes: Sequence[str]
) -> tuple[NearPair, ...]:
    """Return pairs by their sources and classes. Each shard's samples (sample_id, source) are read once."""
    source_of: dict[tuple[int, int], str] = {}
    for shard in {sample.shard for pair in pairs for sample in (pair.held_out, pair.train)}:
        table = samples(shard)
        ids, sources = table.column("sample_id").to_pylist(), table.column("source").to_pylist()
        source_of |= {(shard, sample_id): source for sample_id, source in zip(ids, sources, strict=True)}

    def label(sample: SampleRef) -> str:
        return "" if sample.label == NO_LABEL else classes[sample.label]

    return tuple(
        NearPair(
            held_out=source_of[pair.held_out.shard, pair.held_out.sample_id],
            train=source_of[pair.train.shard, pair.train.sample_id],
            held_out_label=label(pair.held_out),
            train_label=label(pair.train),
            similarity=round(pair.similarity, 3),
        )
        for pair in pairs
    )


def nearest(
    first: Hashes, second: Hashes, *, distance: int = DISTANCE, most: int = _NEIGHBOURS
) -> tuple[Int64s, Int64s]:
    """Return indices (into `first`, into `second`), ascending, of the pairs within `distance` bits.

    Of each of `first`, at most `most`: the nearest, and of equally near ones those that come first. Every pair is looked at, at a
    nanosecond each: at this distance, an index by bands of equal bits has to look at more of them than there are.
    """

    def of_one(one: np.uint64) -> Int64s:
        near, differ = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
        for start in range(0, len(second), _HASHES_AT_ONCE):
            bits = np.bitwise_count(second[start : start + _HASHES_AT_ONCE] ^ one)
            at = np.flatnonzero(bits <= distance)
            near.append(at + start)
            differ.append(bits[at])
        found, bits = np.concatenate(near), np.concatenate(differ)
        if len(found) <= most:
            return found
        # the radius at which there are enough, so that a million equal hashes need no sorting
        within = np.cumsum(np.bincount(bits, minlength=distance + 1))
        radius = int(np.searchsorted(within, most))
        inside = found[bits < radius]
        return np.sort(np.concatenate([inside, found[bits == radius][: most - len(inside)]]))

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(of_one, first))
    counts = np.array([len(one) for one in found], np.int64)
    return np.repeat(np.arange(len(first)), counts), np.concatenate([np.empty(0, np.int64), *found])


def alarms(u: Int64s, scores: Floats, *, count: int) -> Bools:
    """Return [p] which pairs are one picture. `u`: the held-out image of each pair, ascending; `count`: of all held-out images.

    A score of `SAME` is not enough where everything looks alike, so the pair's difference (1 - score) must also be small beside
    what is usual: a tenth of the median, over all held-out images, of the difference from their fifth most similar training
    image; or the held-out image's differences triple right behind the pair, as behind a copy or a group of copies.
    """
    differences = np.ones((count, _ALIGNED), np.float32)  # [u, rank]; 1 where there is no such image
    order = np.lexsort((-scores, u))
    rank = np.empty(len(u), np.int64)
    rank[order] = np.arange(len(u)) - np.searchsorted(u, u)  # both ascend by u, so a group keeps its place
    differences[u, rank] = np.maximum(1 - scores, _LEAST)
    usual = float(np.median(differences[:, _USUAL])) if count else 1.0
    within = differences <= max(1 - SAME, _LEAST)
    jump = np.zeros_like(within)  # never behind the last rank, as the next one is unknown
    jump[:, :-1] = within[:, :-1] & (differences[:, 1:] >= _GAP * differences[:, :-1])
    # everything up to the last jump
    grouped = np.logical_or.accumulate(jump[:, ::-1], axis=1)[:, ::-1]
    return (scores >= SAME) & ((1 - scores <= _OF_USUAL * usual) | grouped[u, rank])


def is_flat(hashes: Hashes) -> Bools:
    """Return [n] whether each hash is within 4 bits of all zeros or all ones."""
    ones = np.bitwise_count(hashes)
    return (ones <= _FLAT) | (ones >= _BITS - _FLAT)


def _compared(
    images: Images, train: Seen, u: Int64s, v: Int64s, measure: Callable[[Int64s, Thumbnail], Floats]
) -> Floats:
    """Return the measure of each pair, shard by shard of train; NaN if the training image cannot be read."""
    scores = np.full(len(u), np.nan, np.float32)
    by_shard = np.argsort(train["shard"][v], kind="stable")
    shards = train["shard"][v][by_shard]
    pieces = np.split(by_shard, np.flatnonzero(np.diff(shards)) + 1) if len(u) else []

    def of_one(pairs: Int64s) -> None:
        own, at = np.unique(v[pairs], return_inverse=True)
        small, readable = images.thumbnails(int(train["shard"][own[0]]), train["sample_id"][own])
        known = readable[at]
        scores[pairs[known]] = measure(u[pairs[known]], small[at[known]])

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(of_one, pieces))
    return scores


def _read(images: Images, samples: Seen) -> tuple[Thumbnail, Bools]:
    """Return the thumbnails of samples that are sorted by shard."""
    if not len(samples):
        return np.zeros((0, SIDE, SIDE), np.uint8), np.zeros(0, dtype=bool)
    pieces = np.split(samples, np.flatnonzero(np.diff(samples["shard"])) + 1)
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(lambda piece: images.thumbnails(int(piece["shard"][0]), piece["sample_id"]), pieces))
    return np.concatenate([small for small, _ in read]), np.concatenate([readable for _, readable in read])


def _best(u: Int64s, scores: Floats, *, least: float, most: int) -> Bools:
    """Return [p] which pairs have at least this score and are among the best `most` of their held-out image. `u` ascends."""
    order = np.lexsort((-np.nan_to_num(scores, nan=-1), u))
    rank = np.empty(len(u), np.int64)
    rank[order] = np.arange(len(u)) - np.searchsorted(u, u)
    return (rank < most) & (scores >= least)


def _pair(images: Images, held_out: Any, train: Any, score: float) -> FoundPair:
    one, other = (SampleRef(int(row["shard"]), int(row["sample_id"]), int(row["label"])) for row in (held_out, train))
    same = score > 1 - _LEAST and _same_pixels(images, one, other)  # anything less alike cannot have equal pixels
    return FoundPair(one, other, score, same)


def _same_pixels(images: Images, *samples: SampleRef) -> bool:
    one, other = (next(iter(images.bytes(ref.shard, np.array([ref.sample_id])))) for ref in samples)
    return one is not None and other is not None and same_pixels(one, other)


def _share(samples: Seen, share: float) -> Seen:
    """Return the samples, or this share of them, chosen by a hash of their ids."""
    if share >= 1:
        return samples
    return samples[hash64(samples["sample_id"], key64("near duplicates")) < np.uint64(share * 2.0**64)]


def _joined(pieces: list[Seen]) -> Seen:
    seen = np.concatenate(pieces) if pieces else np.empty(0, _SEEN)
    pieces.clear()
    return seen[np.lexsort((seen["sample_id"], seen["shard"]))]
