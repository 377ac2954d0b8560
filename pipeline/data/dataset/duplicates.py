"""Exact duplicates: samples whose stored bytes equal those of another sample of the dataset.

Of equal samples with one label in one split, the one with the lowest sample id is served. Equal samples with different labels
are not copies of each other: each label keeps one, because to choose one by the order of names would be to make up an answer. A
sample without a label is a copy of any equal one. Two images count as equal if the first 128 bits of their SHA-256 are equal:
among a billion different images, the chance of one false pair is 1e-21.
Memory: 110 bytes per sample during the search; afterwards the ids of the duplicates."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.dataset.schema import SampleTable

# packed, 33 bytes a row: every sample of the dataset is in memory at once
_SEEN = np.dtype(
    [("high", "u8"), ("low", "u8"), ("sample_id", "i8"), ("shard", "i4"), ("label", "u4"), ("split", "i1")]
)
_UNLABELLED = np.uint32(2**32 - 1)
"""NO_LABEL as an unsigned number, which sorts behind all labels."""
_EXAMPLES = 10


class Sample(NamedTuple):
    """Where a sample is."""

    shard: int
    sample_id: int


@dataclass(frozen=True)
class Contradictions:
    """Images whose copies have different labels, in one split or in several."""

    images: int = 0
    copies: int = 0
    """Labelled samples of these images."""
    examples: tuple[tuple[Sample, Sample], ...] = ()
    """Two samples of an image with different labels."""


@dataclass(frozen=True)
class Copies:
    """Images that are stored more than once."""

    images: int = 0
    across: int = 0
    """Those that are in more than one split."""
    conflicting: int = 0
    """Those of `across` whose copies have different labels."""
    examples: tuple[tuple[Sample, Sample], ...] = ()
    """Two samples of an image in two splits; different labels first."""


@dataclass(frozen=True)
class Duplicates:
    """The exact duplicates of a dataset."""

    within: Mapping[int, frozenset[int]]
    """Shard -> ids of samples not to be served, because another of the same split has the same bytes and the same label."""
    copies: Copies
    contradictions: Contradictions

    def mark(self, shard: int, samples: SampleTable) -> SampleTable:
        """Return a shard's samples with `served` set."""
        unserved = pa.array(sorted(self.within.get(shard, ())), pa.int64())
        served = pc.invert(pc.is_in(samples.column("sample_id"), value_set=unserved))
        return samples.set_column(samples.column_names.index("served"), "served", served)


def find_duplicates(shards: Iterable[tuple[int, str, SampleTable]]) -> Duplicates:
    """Return the duplicates among all samples. `shards`: number, split and samples (sample_id, sha256, label) of each."""
    splits: dict[str, int] = {}
    pieces: list[NDArray[Any]] = []
    for number, split, samples in shards:
        piece = np.empty(samples.num_rows, _SEEN)
        # one conversion per shard rather than one per row
        hashes = bytes.fromhex("".join(samples.column("sha256").to_pylist()))
        # big-endian, as hex is written; the first two of four words are the 128 bits that are compared
        piece["high"], piece["low"] = np.frombuffer(hashes, ">u8").reshape(-1, 4)[:, :2].T
        piece["split"] = splits.setdefault(split, len(splits))
        piece["sample_id"] = samples.column("sample_id").to_numpy()
        piece["label"] = samples.column("label").to_numpy().astype(np.uint32)
        piece["shard"] = number
        pieces.append(piece)
    seen = np.concatenate(pieces) if pieces else np.empty(0, _SEEN)
    pieces.clear()  # the concatenation is a copy, and both would stay in memory while it is sorted
    # lexsort sorts by its last key first
    seen = seen[np.lexsort((seen["sample_id"], seen["label"], seen["split"], seen["low"], seen["high"]))]
    same_image = (seen["high"][1:] == seen["high"][:-1]) & (seen["low"][1:] == seen["low"][:-1])
    same_split = seen["split"][1:] == seen["split"][:-1]
    # unlabelled samples come last of their image and split, so one that has a row before it has an equal to be served
    same_label = (seen["label"][1:] == seen["label"][:-1]) | (seen["label"][1:] == _UNLABELLED)
    copies = seen[1:][same_image & same_split & same_label]
    within: dict[int, set[int]] = {}
    for shard, sample_id in zip(copies["shard"].tolist(), copies["sample_id"].tolist(), strict=True):
        within.setdefault(shard, set()).add(sample_id)
    image = np.cumsum(np.concatenate([[0], ~same_image])) if len(seen) else np.empty(0, np.int64)
    frozen = {number: frozenset(ids) for number, ids in within.items()}
    contradictions, numbers = _contradictions(seen, image)
    return Duplicates(frozen, _copies(seen, image, numbers), contradictions)


def _copies(seen: NDArray[Any], image: NDArray[np.int64], contradicting: NDArray[np.int64]) -> Copies:
    """Return the images that are there more than once. `contradicting`: numbers of the images with several labels."""
    again = image[1:] == image[:-1]
    # rows of one image are sorted by split, so an image is in several splits if the split changes within its rows
    changes = np.flatnonzero(again & (seen["split"][1:] != seen["split"][:-1]))
    across = np.unique(image[changes])
    differ = seen["label"][changes] != seen["label"][changes + 1]
    labelled = (seen["label"][changes] != _UNLABELLED) & (seen["label"][changes + 1] != _UNLABELLED)
    order = np.argsort(~(differ & labelled), kind="stable")
    # the first pair of each image, in this order
    _, first = np.unique(image[changes][order], return_index=True)
    chosen = changes[order][np.sort(first)[:_EXAMPLES]]
    return Copies(
        images=len(np.unique(image[:-1][again])),
        across=len(across),
        conflicting=int(np.isin(across, contradicting).sum()),
        examples=tuple((_sample(seen[at]), _sample(seen[at + 1])) for at in chosen),
    )


def _contradictions(seen: NDArray[Any], image: NDArray[np.int64]) -> tuple[Contradictions, NDArray[np.int64]]:
    """Return the images with several labels, and their numbers.

    `seen`: rows of one image are adjacent; `image`: the number of each row's image.
    """
    labelled = np.flatnonzero(seen["label"] != _UNLABELLED)
    rows, numbers = seen[labelled], image[labelled]
    differs = (numbers[1:] == numbers[:-1]) & (rows["label"][1:] != rows["label"][:-1])
    contradicting, first = np.unique(numbers[1:][differs], return_index=True)
    # `first` indexes the differing pairs: the first one of each image
    pairs = np.flatnonzero(differs)[first[:_EXAMPLES]]
    examples = tuple((_sample(rows[at]), _sample(rows[at + 1])) for at in pairs)
    copies = int(np.isin(numbers, contradicting).sum())
    return Contradictions(len(contradicting), copies, examples), contradicting


def _sample(row: NDArray[Any]) -> Sample:
    return Sample(int(row["shard"]), int(row["sample_id"]))
