"""Exact duplicates: samples whose stored bytes another sample of the dataset has too.

Of equal samples in one split the lowest sample id is served. Two images are taken for equal when the first 128 bits of
their SHA-256 are: among a billion different ones a false pair has a chance of 1e-21.
Memory: 90 bytes a sample while it is found out; then the ids of the duplicates."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Duplicates:
    """What was found."""

    within: Mapping[int, frozenset[int]]
    """Shard -> ids of samples not to be served: a lower id of the same split has the same bytes."""
    across: int
    """Distinct images that stand in more than one split."""

    def mark(self, shard: int, samples: Any) -> Any:
        """The samples of a shard (SAMPLES) with `served` as found."""
        unserved = pa.array(sorted(self.within.get(shard, ())), pa.int64())
        served = pc.invert(pc.is_in(samples.column("sample_id"), value_set=unserved))
        return samples.set_column(samples.column_names.index("served"), "served", served)


def find_duplicates(shards: Iterable[tuple[int, str, Any]]) -> Duplicates:
    """`shards`: number, split and samples (sample_id, sha256) of each."""
    splits: dict[str, int] = {}
    pieces: list[NDArray[Any]] = []
    for number, split, samples in shards:
        piece = np.empty(samples.num_rows, _SEEN)
        hashes = bytes.fromhex("".join(samples.column("sha256").to_pylist()))
        piece["high"], piece["low"] = np.frombuffer(hashes, ">u8").reshape(-1, 4)[:, :2].T
        piece["split"] = splits.setdefault(split, len(splits))
        piece["sample_id"] = samples.column("sample_id").to_numpy()
        piece["shard"] = number
        pieces.append(piece)
    seen = np.concatenate(pieces) if pieces else np.empty(0, _SEEN)
    pieces.clear()
    seen = seen[np.lexsort((seen["sample_id"], seen["split"], seen["low"], seen["high"]))]
    same_image = (seen["high"][1:] == seen["high"][:-1]) & (seen["low"][1:] == seen["low"][:-1])
    same_split = seen["split"][1:] == seen["split"][:-1]
    copies = seen[1:][same_image & same_split]
    within: dict[int, set[int]] = {}
    for shard, sample_id in zip(copies["shard"].tolist(), copies["sample_id"].tolist(), strict=True):
        within.setdefault(shard, set()).add(sample_id)
    # an image's rows stand together, split by split: each change of split is one split more
    first_changes = same_image & ~same_split
    image = np.cumsum(np.concatenate([[0], ~same_image])) if len(seen) else np.empty(0, np.int64)
    across = len(np.unique(image[1:][first_changes]))
    return Duplicates({number: frozenset(ids) for number, ids in within.items()}, across)


_SEEN = np.dtype([("high", "u8"), ("low", "u8"), ("sample_id", "i8"), ("shard", "i4"), ("split", "i1")])
