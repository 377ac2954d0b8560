"""Batches of training pictures: read by offset, checked, decoded and cut by a few threads, in the order's order.

Shapes: images [b, H, W, 3] uint8 RGB, b = this rank's share of the global batch; labels, sample_ids, epochs [b] int64.
Threads fill places of a batch that were laid out beforehand, so their timing changes nothing; the libraries that do the
work release the GIL and start no threads of their own. Batches are made `prefetch_batches` ahead of
the one that is asked for; the shards of a remote store are fetched further ahead.
Every read is checked against the manifest's CRC-32 (23 us a picture of 88 KB, 2 % of its decode).
Errors: DataError naming shard, sample and remedy for bytes that are not what was written. Nothing is ever skipped."""

import os
import time
import zlib
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.cache import ShardCache
from pipeline.data.images import AUGMENT_UNIFORMS, AugmentConfig, augment, decode
from pipeline.data.order import SampleOrder, Slots, plain_slice, plain_slots
from pipeline.data.randomness import uniform_rows
from pipeline.data.selection import Selection
from pipeline.errors import ConfigError, DataError

_CHUNK = 8
"""Samples a thread takes at once: about 10 ms of decoding."""
_FETCH_AHEAD = 32
"""Batches by which a shard's download goes before its first use."""
_FETCH_THREADS = 2
_EVICTED_TRIES = 10


class Batch(NamedTuple):
    """One rank's samples of one step."""

    images: Tensor  # [b, H, W, 3] uint8
    labels: Tensor  # [b] int64, index into the manifest's classes; -1 = none
    sample_ids: Tensor  # [b] int64
    epochs: Tensor  # [b] int64, of the order; 0 in evaluation


class Loader:
    """Reads one rank's samples."""

    def __init__(
        self,
        selection: Selection,
        order: SampleOrder,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        augment: AugmentConfig,
        image_size: tuple[int, int],
        seed: int,
        cache: ShardCache,
        decode_threads: int = 1,
        prefetch_batches: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if not np.array_equal(order.served_counts, selection.counts):
            raise ConfigError(
                f"the order is of {order.samples_per_epoch} samples in {order.served_counts.size} shards, the selection of split "
                f"{selection.split!r} of {selection.counts.sum()} in {selection.counts.size}: make the order from selection.counts"
            )
        for name, value in (("global_batch", global_batch), ("decode_threads", decode_threads)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive: write 1 or more")
        if prefetch_batches < 0:
            raise ConfigError(f"prefetch_batches={prefetch_batches} is negative: write 0 or more")
        self.selection, self.order, self.cache = selection, order, cache
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.augment, self.image_size, self.seed = augment, image_size, seed
        self.decode_threads, self.prefetch_batches, self.pin_memory = decode_threads, prefetch_batches, pin_memory
        self.wait_seconds = 0.0
        """Time the consumer spent waiting for batches, so far."""

    def from_step(self, start: int, stop: int) -> Generator[Batch]:
        """This rank's part of the global batches of steps start..stop-1; closing it ends its threads."""
        steps = (self.order.rank_slice(t, self.global_batch, self.rank, self.world_size) for t in range(start, stop))
        return self._batches(steps, self.augment)

    def evaluation_batches(self, batch_size: int) -> Generator[Batch]:
        """Each sample once over all ranks, this rank's in plain order and from the centre; the last batch may be smaller."""
        part = plain_slice(int(self.selection.counts.sum()), self.rank, self.world_size)
        starts = range(part.start, part.stop, batch_size)
        positions = (np.arange(start, min(start + batch_size, part.stop)) for start in starts)
        steps = (plain_slots(self.selection.counts, p) for p in positions)
        return self._batches(steps, replace(self.augment, kind="center", flip=False))

    def _batches(self, steps: Iterable[Slots], config: AugmentConfig) -> Generator[Batch]:
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.decode_threads, "decode")
        try:
            with closing(self._fetched_ahead(steps)) as fetched:
                for slots in fetched:
                    pending.append(self._begin(pool, slots, config))
                    if len(pending) > self.prefetch_batches:
                        yield self._finish(*pending.popleft())
                while pending:
                    yield self._finish(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetched_ahead(self, steps: Iterable[Slots]) -> Generator[Slots]:
        """The steps as they come; shards of a remote store are asked for _FETCH_AHEAD steps before.

        A fetch that fails says nothing here: the read that needs the shard tries again, and then raises.
        """
        if self._stored_here():
            yield from steps
            return
        waiting: deque[tuple[Slots, set[int]]] = deque()
        pool = ThreadPoolExecutor(_FETCH_THREADS, "fetch")
        try:
            for slots in steps:
                shards = {int(shard) for shard in np.unique(slots.shards)}
                for shard in sorted(shards.difference(*(others for _, others in waiting))):
                    pool.submit(self._path, shard)
                waiting.append((slots, shards))
                if len(waiting) > _FETCH_AHEAD:
                    yield waiting.popleft()[0]
            while waiting:
                yield waiting.popleft()[0]
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, slots: Slots, config: AugmentConfig) -> tuple[Batch, list[Future[None]]]:
        count = len(slots.positions)
        integers = (torch.empty(count, dtype=torch.int64, pin_memory=self.pin_memory) for _ in range(3))
        images = torch.empty((count, *self.image_size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        batch = Batch(images, *integers)
        return batch, [
            pool.submit(self._fill, batch, slots, range(first, min(first + _CHUNK, count)), config)
            for first in range(0, count, _CHUNK)
        ]

    def _finish(self, batch: Batch, chunks: list[Future[None]]) -> Batch:
        began = time.perf_counter()
        for chunk in chunks:
            chunk.result()
        self.wait_seconds += time.perf_counter() - began
        return batch

    def _fill(self, batch: Batch, slots: Slots, places: range, config: AugmentConfig) -> None:
        """Fills some places of a batch; runs in a thread."""
        images, labels, sample_ids, epochs = (tensor.numpy() for tensor in batch)
        for place in places:
            shard, index = int(slots.shards[place]), int(slots.indices[place])
            rows = self.selection.rows(shard)
            labels[place], sample_ids[place] = rows.labels[index], rows.sample_ids[index]
        here = slice(places.start, places.stop)
        epochs[here] = slots.epochs[here]
        uniforms = uniform_rows(self.seed, epochs[here], sample_ids[here], "augment", AUGMENT_UNIFORMS)
        for place, numbers in zip(places, uniforms, strict=True):
            shard, index = int(slots.shards[place]), int(slots.indices[place])
            data = self._read(shard, index)
            try:
                image = decode(data)
            except DataError as error:
                raise DataError(
                    f"{self.selection.describe(shard, index)}: {error}, though its bytes are as they were written. "
                    "Remove it from the source, then the same command shards it anew"
                ) from error
            images[place] = augment(image, numbers, config, self.image_size)

    def _read(self, shard: int, index: int) -> bytes:
        """The sample's bytes, exactly as they were written."""
        rows = self.selection.rows(shard)
        length, crc32 = int(rows.lengths[index]), int(rows.crc32s[index])
        try:
            descriptor = self._open(shard)
            try:
                data = os.pread(descriptor, length, int(rows.offsets[index]))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._damaged(shard, index, f"it cannot be read ({error})") from error
        if len(data) != length:
            raise self._damaged(shard, index, f"the shard ends after {len(data)} of its bytes")
        if (found := zlib.crc32(data)) != crc32:
            raise self._damaged(shard, index, f"its CRC-32 is {found:08x}, the manifest says {crc32:08x}")
        return data

    def _damaged(self, shard: int, index: int, what: str) -> DataError:
        path = self._path(shard)
        if self._stored_here():
            remedy = f"Restore {path} from a copy, or shard the source again"
        else:  # the download was checked, so it is the copy
            path.unlink(missing_ok=True)
            remedy = f"The cached copy {path} was damaged on this node and is now deleted; the same command goes on"
        return DataError(f"{self.selection.describe(shard, index)}: {what}. {remedy}")

    def _open(self, shard: int) -> int:
        for tries_left in reversed(range(_EVICTED_TRIES)):
            try:
                return os.open(self._path(shard), os.O_RDONLY)
            except FileNotFoundError:
                if self._stored_here() or not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _path(self, shard: int) -> Path:
        _, key, size, sha256 = self.selection.shards[shard]
        return self.cache.path(key, sha256=sha256, bytes=size)

    def _stored_here(self) -> bool:
        return self.cache.store.local_path("any") is not None
