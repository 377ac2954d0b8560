"""Near duplicates across splits: images of `train` that look like one of `val` or `test`, by their perceptual hashes.

Two images are near if their 64-bit hashes differ in at most `distance` bits. The search is exact: the 64 bits are cut into
`distance` + w bands; differing bits leave at least w bands equal, so each near pair is among those equal in w bands, and it is
counted with the first such choice of bands. Distinct hashes are compared, and pairs are weighted by how often these occur; w
is chosen by the number of candidates that it makes.
Flat hashes (within `distance` bits of all equal: plain colours, smooth gradients) are near each other whatever the images
show, so they are left out and counted. If so much looks alike that there would be more than 4e9 candidates (millions of
digits on black), a random share of the held-out hashes is compared, and `compared` says how many samples that is.
Letters: u distinct hashes of the held-out samples, v of train. Memory: 20 bytes per sample, 60 per distinct hash, and 100 MB.
Time: `python -m benchmarks.scale`; it grows with the number of candidates, up to those 4e9.
Source: Norouzi, Punjani and Fleet 2012, multi-index hashing (arXiv 1307.2982)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae_core.randomness import hash64, key64
from pipeline.data.dataset.facts import NearDuplicateFacts, NearPair
from pipeline.data.dataset.schema import SampleTable

DISTANCE = 4
"""Of 64 bits. Recompressed, resized and slightly brightened copies are within it; unrelated photographs differ in 20 to 44."""
_EXAMPLES = 3
_AT_ONCE = 2**20
"""Candidate pairs in memory at a time."""
_CANDIDATES_MAX = 4_000_000_000
_WHOLE_BANDS = (2, 3, 4)
_ESTIMATED_FROM = 20_000  # hashes of train that are looked up for the estimate
_SORTING = 30
"""Cost of sorting and looking up an element, in units of a candidate's."""
_BITS = 64
_SEEN = np.dtype([("hash", "u8"), ("sample_id", "i8"), ("shard", "i4")])

Hashes = NDArray[np.uint64]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class SampleRef:
    """A sample, by its shard and id."""

    shard: int
    sample_id: int


@dataclass(frozen=True)
class NearDuplicates:
    """The near duplicates of a dataset."""

    pairs: int
    """Pairs of one sample of train and one of val or test. Equal images are near too."""
    held_out: int
    """Samples of val and test that have a near duplicate in train."""
    compared: int
    """Samples of val and test that were compared: all but the flat ones, unless too much looks alike."""
    flat: int
    """Samples left out because their hash carries no information."""
    distance: int
    examples: tuple[tuple[SampleRef, SampleRef], ...]
    """(held out, train) with the lowest ids."""


class _Side(NamedTuple):
    """The distinct hashes of train, or of val and test together, ascending."""

    hashes: Hashes  # [u]
    counts: Int64s  # [u] samples that have it
    ids: Int64s  # [u] the lowest sample id among them
    shards: Int64s  # [u] the shard of that sample


class NearDuplicateSearch:
    """Collects the hashes of every shard, then finds the near pairs."""

    def __init__(self, *, distance: int = DISTANCE, candidates_max: int = _CANDIDATES_MAX) -> None:
        self._distance, self._candidates_max = distance, candidates_max
        self._train: list[NDArray[Any]] = []
        self._held_out: list[NDArray[Any]] = []
        self._flat = 0

    def add(self, shard: int, split: str, samples: SampleTable) -> SampleTable:
        """Collect the hashes of a shard's served samples (sample_id, dhash64, served), and return the samples unchanged."""
        served = samples.column("served").to_numpy().astype(bool)
        hashes = samples.column("dhash64").to_numpy()[served]
        flat = is_flat(hashes, self._distance)
        piece = np.empty(int((~flat).sum()), _SEEN)
        piece["hash"] = hashes[~flat]
        piece["sample_id"] = samples.column("sample_id").to_numpy()[served][~flat]
        piece["shard"] = shard
        (self._train if split == "train" else self._held_out).append(piece)
        self._flat += int(flat.sum())
        return samples

    def find(self) -> NearDuplicates:
        """Return all pairs of a sample of train and one of val or test, and forget the collected hashes."""
        train, held_out = _distinct(self._train), _distinct(self._held_out)
        whole, candidates = choose_bands(held_out.hashes, train.hashes, distance=self._distance)
        held_out = _share(held_out, self._candidates_max / max(1, candidates))
        pairs = 0
        near = np.zeros(len(held_out.hashes), dtype=bool)
        best: list[tuple[int, int]] = []  # indices of held-out and training hashes
        for u, v in near_pairs(held_out.hashes, train.hashes, distance=self._distance, whole=whole):
            pairs += int((held_out.counts[u] * train.counts[v]).sum())
            near[u] = True
            lowest = np.lexsort((train.ids[v], held_out.ids[u]))[:_EXAMPLES]
            # the best so far are merged with each piece, as all pairs together may not fit into memory
            best += zip(u[lowest].tolist(), v[lowest].tolist(), strict=True)
            best = sorted(best, key=lambda pair: (held_out.ids[pair[0]], train.ids[pair[1]]))[:_EXAMPLES]
        return NearDuplicates(
            pairs=pairs,
            held_out=int(held_out.counts[near].sum()),
            compared=int(held_out.counts.sum()),
            flat=self._flat,
            distance=self._distance,
            examples=tuple((_sample_ref(held_out, u), _sample_ref(train, v)) for u, v in best),
        )


def near_duplicate_facts(found: NearDuplicates, samples: Callable[[int], SampleTable]) -> NearDuplicateFacts:
    """Return the numbers, and the examples by their sources. `samples` reads a shard's samples (sample_id, source)."""

    def source(sample: SampleRef) -> str:
        table = samples(sample.shard)
        row = table.column("sample_id").to_pylist().index(sample.sample_id)
        return str(table.column("source")[row].as_py())

    return NearDuplicateFacts(
        pairs=found.pairs,
        held_out=found.held_out,
        compared=found.compared,
        flat=found.flat,
        distance=found.distance,
        examples=tuple(NearPair(held_out=source(one), train=source(other)) for one, other in found.examples),
    )


def near_pairs(first: Hashes, second: Hashes, *, distance: int, whole: int = 2) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield, in pieces, indices (into `first`, into `second`) of all pairs within `distance` bits, each pair once.

    Both arrays hold distinct hashes. `whole`: bands in which candidates are equal; it affects only the time.
    """
    masks = _masks(distance, whole)
    for number, mask in enumerate(masks):
        order = np.argsort(first & mask, kind="stable")
        keys = (first & mask)[order]
        # sorted lookups walk through the sorted keys, which is 5 times as fast as random order
        asked = np.argsort(second & mask, kind="stable")
        low = np.searchsorted(keys, (second & mask)[asked], side="left")
        high = np.searchsorted(keys, (second & mask)[asked], side="right")
        for u, v in _expanded(low, high):
            left, right = order[u], asked[v]
            differ = first[left] ^ second[right]
            near = np.bitwise_count(differ) <= distance
            left, right, differ = left[near], right[near], differ[near]
            for earlier in masks[:number]:  # drop the pairs that an earlier choice of bands has counted
                new = (differ & earlier) != 0
                left, right, differ = left[new], right[new], differ[new]
            if len(left):
                yield left, right


def choose_bands(first: Hashes, second: Hashes, *, distance: int) -> tuple[int, int]:
    """Return the cheapest number of whole bands and about how many candidates it makes, estimated from a sample of `second`."""
    # evenly spaced in ascending order, so that clusters of like images count in proportion
    some = second[:: max(1, len(second) // _ESTIMATED_FROM)]
    scale = len(second) / max(1, len(some))
    costs = []
    for whole in _WHOLE_BANDS:
        masks = _masks(distance, whole)
        found = sum(_matches(np.sort(first & mask), np.sort(some & mask)) for mask in masks)
        costs.append((found * scale + _SORTING * len(masks) * (len(first) + len(second)), whole, int(found * scale)))
    _, whole, candidates = min(costs)
    return whole, candidates


def is_flat(hashes: Hashes, distance: int) -> NDArray[np.bool_]:
    """Return [n] whether each hash is within `distance` bits of all zeros or all ones."""
    ones = np.bitwise_count(hashes)
    return (ones <= distance) | (ones >= _BITS - distance)


def _masks(distance: int, whole: int) -> list[np.uint64]:
    """Return a mask for each choice of `whole` bands out of `distance` + `whole` bands of about equal length."""
    count = distance + whole
    if not (distance >= 0 and whole > 0 and count <= _BITS):
        raise ValueError(f"distance={distance} with {whole} whole bands does not fit {_BITS} bits: write 4 and 2")
    edges = [_BITS * number // count for number in range(count + 1)]
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(bands, whole)]


def _matches(keys: Hashes, asked: Hashes) -> int:
    """Return the number of equal pairs of two sorted arrays."""
    return int((np.searchsorted(keys, asked, side="right") - np.searchsorted(keys, asked, side="left")).sum())


def _share(side: _Side, share: float) -> _Side:
    """Return the side, or this share of its hashes, chosen by a hash of theirs."""
    if share >= 1:
        return side
    chosen = hash64(side.hashes.astype(np.int64), key64("near duplicates")) < np.uint64(share * 2.0**64)
    return _Side(side.hashes[chosen], side.counts[chosen], side.ids[chosen], side.shards[chosen])


def _expanded(low: Int64s, high: Int64s) -> Iterator[tuple[Int64s, Int64s]]:
    """Yield pairs (i, j) with low[j] <= i < high[j], about a million at a time; the pairs of one j stay together."""
    counts = high - low
    ends = np.cumsum(counts)
    start, done = 0, 0
    while start < len(counts):
        # + 1: a single j with more matches than that still has to go out
        stop = max(start + 1, int(np.searchsorted(ends, done + _AT_ONCE, side="right")))
        here = counts[start:stop]
        j = np.repeat(np.arange(start, stop), here)
        first_of_j = np.repeat(ends[start:stop] - here, here)
        yield low[j] + (np.arange(done, int(ends[stop - 1])) - first_of_j), j
        start, done = stop, int(ends[stop - 1])


def _distinct(pieces: list[NDArray[Any]]) -> _Side:
    seen = np.concatenate(pieces) if pieces else np.empty(0, _SEEN)
    pieces.clear()
    # by id within a hash: `unique` returns the first index, which is then the lowest id
    seen = seen[np.lexsort((seen["sample_id"], seen["hash"]))]
    hashes, first, counts = np.unique(seen["hash"], return_index=True, return_counts=True)
    return _Side(hashes, counts, seen["sample_id"][first], seen["shard"][first].astype(np.int64))


def _sample_ref(side: _Side, index: int) -> SampleRef:
    return SampleRef(int(side.shards[index]), int(side.ids[index]))
