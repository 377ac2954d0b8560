"""Read images of a dataset again, by offset, for comparisons of pixels. Only the images that are asked for are decoded.

Memory: the bytes of one shard at most, per call. Errors: an image that cannot be read is left out, not an exception."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.dataset.address import locate_shard
from pipeline.data.dataset.schema import SampleTable
from pipeline.data.images.alignment import SIDE, Thumbnail, thumbnail
from pipeline.errors import DataError, StorageError
from pipeline.storage import Store

_DENSE = 0.25
"""Share of a range's bytes from which the range is read at once: a request per image is slower, above all from a bucket."""

Int64s = NDArray[np.int64]


class StoredImages:
    """The images of a dataset, by shard and sample id."""

    def __init__(self, root: Store, keys: Mapping[int, str], samples: Callable[[int], SampleTable]) -> None:
        """`keys`: shard -> key of its tar, relative to `root`. `samples` reads a shard's samples (sample_id, offset, length)."""
        self._root, self._keys, self._samples = root, keys, samples

    def rows(self, shard: int, sample_ids: Int64s) -> SampleTable:
        """Return the samples of a shard with these ids, in this order."""
        table = self._samples(shard)
        at = pc.index_in(pa.array(sample_ids, pa.int64()), value_set=table.column("sample_id").combine_chunks())
        return table.take(at)

    def bytes(self, shard: int, sample_ids: Int64s) -> Iterator[bytes | None]:
        """Yield the stored bytes of each image, or None if they cannot be read."""
        rows = self.rows(shard, sample_ids)
        offsets, lengths = rows.column("offset").to_pylist(), rows.column("length").to_pylist()
        if not offsets:
            return
        store, key = locate_shard(self._root, self._keys[shard])
        first, end = min(offsets), max(offset + length for offset, length in zip(offsets, lengths, strict=True))
        whole = b""
        if sum(lengths) > _DENSE * (end - first):
            with contextlib.suppress(StorageError):  # some of the images may still be there
                whole = store.read_range(key, first, end - first)
        for offset, length in zip(offsets, lengths, strict=True):
            if whole:
                yield whole[offset - first : offset - first + length]
                continue
            try:
                yield store.read_range(key, offset, length)
            except StorageError:
                yield None

    def thumbnails(self, shard: int, sample_ids: Int64s) -> tuple[Thumbnail, NDArray[np.bool_]]:
        """Return [n, SIDE, SIDE] thumbnails, and [n] whether each image could be read; the others are black."""
        small = np.zeros((len(sample_ids), SIDE, SIDE), np.uint8)
        readable = np.zeros(len(sample_ids), dtype=bool)
        for number, data in enumerate(self.bytes(shard, sample_ids)):
            if data is None:
                continue
            with contextlib.suppress(DataError):  # `mae shards verify` names it
                small[number] = thumbnail(data)
                readable[number] = True
        return small, readable
