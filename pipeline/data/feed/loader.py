"""Batches of training pictures: read by offset, checked, decoded and cut by a few threads, in the order's order.

Shapes: images [b, H, W, 3] uint8 RGB, b = this rank's share of the global batch; labels, sample_ids, epochs [b] int64.
Threads fill places of a batch that were laid out beforehand, so their timing changes nothing; the libraries that do the
work release the GIL and start no threads of their own. Threads and not processes: two threads on two cores make nearly twice what
one makes (`mae doctor --data` prints both), and a process would have its batches handed over. Batches are made
`prefetch_batches` ahead of the one that is asked for; the shards of a remote store are fetched further ahead, as far as the
cache has room for.
Every read is checked against the manifest's CRC-32 (23 us a picture of 88 KB, 2 % of its decode).
A training sample whose bytes are not what was written, or do not decode, is substituted and reported (substitution.py); a
cached copy that was damaged on this disk is fetched again first. Nothing is ever skipped.
Errors: DataError naming shard, sample and remedy: in evaluation for every sample that cannot be read, in training for a
shard that cannot be opened, or of which no sample can be read."""

import logging
import os
import time
import zlib
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae_core.randomness import uniform_rows
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.order import SampleOrder, Slots, plain_slice, plain_slots
from pipeline.data.feed.selection import Selection
from pipeline.data.feed.substitution import Substitution, candidates
from pipeline.data.images.pictures import AUGMENT_UNIFORMS, AugmentConfig, Image, Uniforms, picture
from pipeline.errors import ConfigError, DataError

_CHUNK = 8
"""Samples a thread takes at once: about 10 ms of decoding."""
_FETCH_AHEAD = 32
"""Batches by which a shard's download goes before its first use, at most."""
_FETCH_THREADS = 2

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One rank's samples of one step."""

    images: Tensor  # [b, H, W, 3] uint8
    labels: Tensor  # [b] int64, index into the manifest's classes; -1 = none
    sample_ids: Tensor  # [b] int64, of the samples that are in it
    epochs: Tensor  # [b] int64, of the order; 0 in evaluation
    substitutions: tuple[Substitution, ...] = ()  # samples that the order asked for and that are not in it


class Unreadable(NamedTuple):
    """Why a sample's picture cannot be had."""

    reason: Literal["crc32", "truncated", "undecodable"]
    words: str
    """For a person: file, sample, and what to do."""


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
        fetch_bytes: int | None = None,
    ) -> None:
        """`fetch_bytes`: shards that this rank may have in view at once; None: as many as the cache holds."""
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
        self.fetch_bytes = cache.max_bytes if fetch_bytes is None else fetch_bytes
        self.wait_seconds = 0.0
        """Time the consumer spent waiting for batches, so far."""
        self._told: set[int] = set()
        self._remote = [cache.local_path(shard.key) is None for shard in selection.shards]

    def from_step(self, start: int, stop: int) -> Generator[Batch]:
        """This rank's part of the global batches of steps start..stop-1; closing it ends its threads."""
        steps = (self.order.rank_slice(t, self.global_batch, self.rank, self.world_size) for t in range(start, stop))
        return self._batches(steps, self.augment, unreadable="substitute")

    def evaluation_batches(
        self, batch_size: int, *, unreadable: Literal["stop", "substitute"] = "stop"
    ) -> Generator[Batch]:
        """Each sample once over all ranks, this rank's in plain order and from the centre; the last batch may be smaller.

        `unreadable="substitute"` is for pictures to look at, from which no score is made.
        """
        part = plain_slice(int(self.selection.counts.sum()), self.rank, self.world_size)
        starts = range(part.start, part.stop, batch_size)
        positions = (np.arange(start, min(start + batch_size, part.stop)) for start in starts)
        steps = (plain_slots(self.selection.counts, p) for p in positions)
        return self._batches(steps, replace(self.augment, kind="center", flip=False), unreadable=unreadable)

    def bytes_at_once(self, ranks_here: int) -> int:
        """Of remote shards that so many ranks on one node read in turns: a window in each of their lanes, and one shard more.

        0 where shards are read where they lie.
        """
        if not any(self._remote):
            return 0
        order = self.order.config
        lanes = min(order.lanes, -(-order.lanes * ranks_here // self.world_size) + 1)
        sizes = [shard.bytes for shard in self.selection.shards]
        return min(len(sizes), lanes * (order.window_shards + 1)) * sum(sizes) // len(sizes)

    def _batches(
        self, steps: Iterable[Slots], config: AugmentConfig, *, unreadable: Literal["stop", "substitute"]
    ) -> Generator[Batch]:
        pending: deque[tuple[Batch, list[Future[list[Substitution]]]]] = deque()
        pool = ThreadPoolExecutor(self.decode_threads, "decode")
        try:
            with closing(self._fetched_ahead(steps)) as fetched:
                for slots in fetched:
                    pending.append(self._begin(pool, slots, config, unreadable))
                    if len(pending) > self.prefetch_batches:
                        yield self._finish(*pending.popleft())
                while pending:
                    yield self._finish(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetched_ahead(self, steps: Iterable[Slots]) -> Generator[Slots]:
        """The steps as they come; shards of a remote store are asked for before, and marked as used when they come into view.

        In view is what the next steps need, up to _FETCH_AHEAD of them and up to `fetch_bytes`, and what is being read. A fetch
        that fails says nothing here: the read that needs the shard tries again, and then raises.
        """
        if not any(self._remote):
            yield from steps
            return
        view = _View([shard.bytes for shard in self.selection.shards])
        ahead: deque[tuple[Slots, list[int]]] = deque()
        read: deque[list[int]] = deque()  # by batches that are being made or have just been handed out
        asked: dict[int, Future[None]] = {}
        pool = ThreadPoolExecutor(_FETCH_THREADS, "fetch")
        try:
            for slots in steps:
                shards = [int(shard) for shard in np.unique(slots.shards) if self._remote[shard]]
                while len(ahead) > _FETCH_AHEAD or (ahead and view.bytes_with(shards) > self.fetch_bytes):
                    ready, its_shards = ahead.popleft()
                    read.append(its_shards)
                    yield ready
                    if len(read) > self.prefetch_batches + 1:
                        view.remove(read.popleft())
                view.add(shards)
                ahead.append((slots, shards))
                for shard in shards:
                    _, key, _, sha256 = self.selection.shards[shard]
                    under_way = shard in asked and not asked[shard].done()
                    if not under_way and not self.cache.touch(key, sha256=sha256):
                        asked[shard] = pool.submit(self._fetch, shard)
            while ahead:
                yield ahead.popleft()[0]
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(
        self,
        pool: ThreadPoolExecutor,
        slots: Slots,
        config: AugmentConfig,
        unreadable: Literal["stop", "substitute"],
    ) -> tuple[Batch, list[Future[list[Substitution]]]]:
        count = len(slots.positions)
        labels, sample_ids, epochs = (
            torch.empty(count, dtype=torch.int64, pin_memory=self.pin_memory) for _ in range(3)
        )
        images = torch.empty((count, *self.image_size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        batch = Batch(images, labels, sample_ids, epochs)
        return batch, [
            pool.submit(self._fill, batch, slots, range(first, min(first + _CHUNK, count)), config, unreadable)
            for first in range(0, count, _CHUNK)
        ]

    def _finish(self, batch: Batch, chunks: list[Future[list[Substitution]]]) -> Batch:
        began = time.perf_counter()
        substitutions = tuple(one for chunk in chunks for one in chunk.result())
        self.wait_seconds += time.perf_counter() - began
        return batch._replace(substitutions=substitutions)

    def _fill(
        self,
        batch: Batch,
        slots: Slots,
        places: range,
        config: AugmentConfig,
        unreadable: Literal["stop", "substitute"],
    ) -> list[Substitution]:
        """Fills some places of a batch; runs in a thread."""
        images, labels, sample_ids, epochs = (tensor.numpy() for tensor in batch[:4])
        for place in places:
            shard, index = int(slots.shards[place]), int(slots.indices[place])
            rows = self.selection.rows(shard)
            labels[place], sample_ids[place] = rows.labels[index], rows.sample_ids[index]
        here = slice(places.start, places.stop)
        epochs[here] = slots.epochs[here]
        uniforms = uniform_rows(self.seed, epochs[here], sample_ids[here], "augment", AUGMENT_UNIFORMS)
        substitutions = []
        for place, numbers in zip(places, uniforms, strict=True):
            shard, index = int(slots.shards[place]), int(slots.indices[place])
            image = self._image(shard, index, numbers, config)
            if isinstance(image, Unreadable):
                if unreadable == "stop":
                    raise DataError(image.words)
                step = int(slots.positions[place]) // self.global_batch
                image, stand_in, made = self._substitute(shard, index, int(epochs[place]), step, image, config)
                substitutions.append(made)
                rows = self.selection.rows(shard)
                labels[place], sample_ids[place] = rows.labels[stand_in], rows.sample_ids[stand_in]
            images[place] = image
        return substitutions

    def _substitute(
        self, shard: int, index: int, epoch: int, step: int, why: Unreadable, config: AugmentConfig
    ) -> tuple[Image, int, Substitution]:
        """Another picture of the shard, its index there, and what is to be written down."""
        rows = self.selection.rows(shard)
        sample_id = int(rows.sample_ids[index])
        tried = candidates(rows.sample_ids, sample_id, seed=self.seed, epoch=epoch)
        for candidate in map(int, tried):
            own = uniform_rows(self.seed, [epoch], rows.sample_ids[[candidate]], "augment", AUGMENT_UNIFORMS)[0]
            image = self._image(shard, candidate, own, config)
            if not isinstance(image, Unreadable):
                made = Substitution(
                    sample_id,
                    int(rows.sample_ids[candidate]),
                    epoch,
                    step,
                    why.reason,
                    self.selection.source(shard, index),
                )
                if sample_id not in self._told:
                    self._told.add(sample_id)
                    log.warning("%s. Sample %d of its shard stands in for it", why.words, made.substitute_id)
                return image, candidate, made
        raise DataError(
            f"{why.words}. No sample of its shard can stand in for it: {len(tried)} others were tried and cannot be read either"
        )

    def _image(self, shard: int, index: int, uniforms: Uniforms, config: AugmentConfig) -> Image | Unreadable:
        """A sample's training picture, of bytes that are as intake decoded them."""
        data = self._read(shard, index)
        if isinstance(data, Unreadable):
            return data
        try:
            return picture(data, uniforms, config, self.image_size)
        except DataError as error:
            return Unreadable(
                "undecodable",
                f"{self.selection.describe(shard, index)}: {error}, though its bytes are as they were written. "
                "Remove it from the source, then the same command shards it anew",
            )

    def _read(self, shard: int, index: int) -> bytes | Unreadable:
        """The sample's bytes, exactly as they were written; from a copy fetched anew where this node's was damaged."""
        _, key, size, sha256 = self.selection.shards[shard]
        while True:
            try:
                descriptor = self.cache.open(key, sha256=sha256, bytes=size)
                try:
                    data = self._checked(descriptor, shard, index)
                    if not isinstance(data, Unreadable) or not self.cache.repaired(
                        key, sha256=sha256, descriptor=descriptor
                    ):
                        return data
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise DataError(
                    f"{self.selection.describe(shard, index)}: it cannot be read ({error}). {self._remedy(shard)}"
                ) from error

    def _checked(self, descriptor: int, shard: int, index: int) -> bytes | Unreadable:
        """One sample's bytes from an open shard, or what is wrong with them."""
        rows = self.selection.rows(shard)
        length, crc32 = int(rows.lengths[index]), int(rows.crc32s[index])
        data = os.pread(descriptor, length, int(rows.offsets[index]))
        reason: Literal["truncated", "crc32"]
        if len(data) != length:
            reason, what = "truncated", f"the shard ends after {len(data)} of its bytes"
        elif (found := zlib.crc32(data)) != crc32:
            reason, what = "crc32", f"its CRC-32 is {found:08x}, the manifest says {crc32:08x}"
        else:
            return data
        return Unreadable(reason, f"{self.selection.describe(shard, index)}: {what}. {self._remedy(shard)}")

    def _remedy(self, shard: int) -> str:
        local = self.cache.local_path(self.selection.shards[shard].key)
        if local is not None:
            return f"Restore {local} from a copy, or shard the source again"
        return "The shard is as it was written, its row in samples.parquet is not: shard the source again"

    def _fetch(self, shard: int) -> None:
        _, key, size, sha256 = self.selection.shards[shard]
        self.cache.path(key, sha256=sha256, bytes=size)


class _View:
    """Bytes of the different shards that some steps need."""

    def __init__(self, shard_bytes: list[int]) -> None:
        self._shard_bytes, self._steps = shard_bytes, Counter[int]()
        self._bytes = 0

    def bytes_with(self, shards: list[int]) -> int:
        """What they would be with one more step's shards."""
        return self._bytes + sum(self._shard_bytes[shard] for shard in shards if not self._steps[shard])

    def add(self, shards: list[int]) -> None:
        """A step comes into view."""
        self._bytes = self.bytes_with(shards)
        self._steps.update(shards)

    def remove(self, shards: list[int]) -> None:
        """A step has gone."""
        self._steps.subtract(shards)
        self._bytes -= sum(self._shard_bytes[shard] for shard in shards if not self._steps[shard])
