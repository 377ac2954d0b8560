"""Batches of training pictures, read by offset, checked, decoded and cropped by a few threads, in the order of a SampleOrder.

Shapes: images [b, H, W, 3] uint8 RGB, b = this rank's share of the global batch; labels, sample_ids, epochs [b] int64.
Threads fill positions of a batch that were assigned beforehand, so their timing changes nothing; the libraries that do the
work release the GIL and start no threads of their own. Threads rather than processes: two threads on two cores make nearly
twice as many pictures as one (`mae doctor --data` prints both), and a process would have to hand its batches over. Batches are
made `prefetch_batches` ahead of the requested one; shards of a remote store are fetched further ahead, as far as the cache
has room.
Every read is checked against the manifest's CRC-32 (23 us per picture of 88 KB, 2 % of its decoding time).
A training sample whose bytes are not what was written, or do not decode, is substituted and reported (substitution.py); a
cached copy that was damaged on this disk is fetched again first. No sample is ever skipped.
Errors: DataError naming shard, sample and remedy: in evaluation for every sample that cannot be read, in training for a
shard that cannot be opened or of which no sample can be read."""

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
"""Samples that a thread decodes per task: about 10 ms of work."""
_FETCH_AHEAD = 32
"""Most batches by which a shard's download precedes its first use."""
_FETCH_THREADS = 2

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One rank's samples of one step."""

    images: Tensor  # [b, H, W, 3] uint8
    labels: Tensor  # [b] int64, index into the manifest's classes; -1 = none
    sample_ids: Tensor  # [b] int64, of the samples in the batch
    epochs: Tensor  # [b] int64, of the order; 0 in evaluation
    substitutions: tuple[Substitution, ...] = ()  # samples that the order asked for and that the batch lacks


class Unreadable(NamedTuple):
    """A sample whose picture cannot be made."""

    reason: Literal["crc32", "truncated", "undecodable"]
    message: str
    """Shard, sample and remedy."""


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
        """`fetch_bytes`: size of the shards that this rank may have in its lookahead; None: the size of the cache."""
        if not np.array_equal(order.served_counts, selection.counts):
            raise ConfigError(
                f"the order has {order.samples_per_epoch} samples in {order.served_counts.size} shards, the selection of split "
                f"{selection.split!r} has {selection.counts.sum()} in {selection.counts.size}: make the order from selection.counts"
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
        """Time that the consumer has spent waiting for batches so far."""
        self._reported: set[int] = set()  # shared by the threads without a lock: at worst a warning is repeated
        # asked once per shard here rather than for each shard of each step
        self._remote = [cache.local_path(shard.key) is None for shard in selection.shards]

    def from_step(self, start: int, stop: int) -> Generator[Batch]:
        """Yield this rank's part of the global batches of steps start..stop-1. Closing the generator ends its threads."""
        steps = (self.order.rank_slice(t, self.global_batch, self.rank, self.world_size) for t in range(start, stop))
        return self._batches(steps, self.augment, unreadable="substitute")

    def evaluation_batches(
        self, batch_size: int, *, unreadable: Literal["stop", "substitute"] = "stop"
    ) -> Generator[Batch]:
        """Yield this rank's samples in plain order, cropped from the centre; over all ranks each sample comes once.

        The last batch may be smaller. `unreadable="substitute"` is for pictures to look at, never for a score.
        """
        part = plain_slice(int(self.selection.counts.sum()), self.rank, self.world_size)
        starts = range(part.start, part.stop, batch_size)
        positions = (np.arange(start, min(start + batch_size, part.stop)) for start in starts)
        steps = (plain_slots(self.selection.counts, p) for p in positions)
        return self._batches(steps, replace(self.augment, kind="center", flip=False), unreadable=unreadable)

    def bytes_at_once(self, ranks_here: int) -> int:
        """Return the size of the remote shards that the ranks of one node read in turns: a window per lane, and one shard more.

        0 if no shard needs a copy.
        """
        if not any(self._remote):
            return 0
        order = self.order.config
        # + 1: a rank's share of the lanes may begin and end within a lane
        lanes = min(order.lanes, -(-order.lanes * ranks_here // self.world_size) + 1)
        sizes = [shard.bytes for shard in self.selection.shards]
        return min(len(sizes), lanes * (order.window_shards + 1)) * sum(sizes) // len(sizes)

    def _batches(
        self, steps: Iterable[Slots], config: AugmentConfig, *, unreadable: Literal["stop", "substitute"]
    ) -> Generator[Batch]:
        pending: deque[tuple[Batch, list[Future[list[Substitution]]]]] = deque()
        pool = ThreadPoolExecutor(self.decode_threads, "decode")
        try:
            # closed here: an abandoned generator would keep its download threads until it is collected
            with closing(self._fetched_ahead(steps)) as fetched:
                for slots in fetched:
                    pending.append(self._begin(pool, slots, config, unreadable))
                    if len(pending) > self.prefetch_batches:
                        yield self._finish(*pending.popleft())
                while pending:
                    yield self._finish(*pending.popleft())
        finally:
            # waits for tasks that are still writing into a batch, and drops those that have not begun
            pool.shutdown(cancel_futures=True)

    def _fetched_ahead(self, steps: Iterable[Slots]) -> Generator[Slots]:
        """Yield the steps in their order, with the download of their shards started earlier.

        The lookahead covers the next steps, up to _FETCH_AHEAD of them and up to `fetch_bytes`, and the batches that are being
        read. A shard that enters it is fetched, or marked as used if it is cached. A download that fails is not reported here:
        the read that needs the shard tries again, and then raises.
        """
        if not any(self._remote):
            yield from steps
            return
        lookahead = _Lookahead([shard.bytes for shard in self.selection.shards])
        ahead: deque[tuple[Slots, list[int]]] = deque()
        read: deque[list[int]] = deque()  # shards of batches that are being made or were just handed out
        requested: dict[int, Future[None]] = {}
        pool = ThreadPoolExecutor(_FETCH_THREADS, "fetch")
        try:
            for slots in steps:
                shards = [int(shard) for shard in np.unique(slots.shards) if self._remote[shard]]
                # a step enters the lookahead only when its shards fit; otherwise they would evict shards needed before them
                while len(ahead) > _FETCH_AHEAD or (ahead and lookahead.bytes_with(shards) > self.fetch_bytes):
                    ready, its_shards = ahead.popleft()
                    read.append(its_shards)
                    yield ready
                    if len(read) > self.prefetch_batches + 1:
                        lookahead.remove(read.popleft())
                lookahead.add(shards)
                ahead.append((slots, shards))
                for shard in shards:
                    _, key, _, sha256 = self.selection.shards[shard]
                    # without this, a download that is still running would be started again and block the second fetch thread
                    under_way = shard in requested and not requested[shard].done()
                    if not under_way and not self.cache.touch(key, sha256=sha256):
                        requested[shard] = pool.submit(self._fetch, shard)
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
        # allocated once and filled in place by the threads; from pinned memory, the copy to the device overlaps with computation
        labels, sample_ids, epochs = (
            torch.empty(count, dtype=torch.int64, pin_memory=self.pin_memory) for _ in range(3)
        )
        images = torch.empty((count, *self.image_size, 3), dtype=torch.uint8, pin_memory=self.pin_memory)
        batch = Batch(images, labels, sample_ids, epochs)
        # the pool is first in, first out, so reading ahead never overtakes the batch that is awaited
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
        within: range,
        config: AugmentConfig,
        unreadable: Literal["stop", "substitute"],
    ) -> list[Substitution]:
        """Fill some positions of a batch; runs in a thread of the pool."""
        # views: writing to them fills the batch
        images, labels, sample_ids, epochs = (tensor.numpy() for tensor in batch[:4])
        for i in within:
            shard, index = int(slots.shards[i]), int(slots.indices[i])
            rows = self.selection.rows(shard)
            labels[i], sample_ids[i] = rows.labels[index], rows.sample_ids[index]
        here = slice(within.start, within.stop)
        epochs[here] = slots.epochs[here]
        # keyed by epoch and id, so the crop is the same at any position, world size and after any resume
        uniforms = uniform_rows(self.seed, epochs[here], sample_ids[here], "augment", AUGMENT_UNIFORMS)
        substitutions = []
        for i, numbers in zip(within, uniforms, strict=True):
            shard, index = int(slots.shards[i]), int(slots.indices[i])
            image = self._image(shard, index, numbers, config)
            if isinstance(image, Unreadable):
                if unreadable == "stop":
                    raise DataError(image.message)
                step = int(slots.positions[i]) // self.global_batch
                image, substitute, record = self._substitute(shard, index, int(epochs[i]), step, image, config)
                substitutions.append(record)
                rows = self.selection.rows(shard)
                labels[i], sample_ids[i] = rows.labels[substitute], rows.sample_ids[substitute]
            images[i] = image
        return substitutions

    def _substitute(
        self, shard: int, index: int, epoch: int, step: int, why: Unreadable, config: AugmentConfig
    ) -> tuple[Image, int, Substitution]:
        """Return another picture of the shard, its index in the shard, and the record of the substitution."""
        rows = self.selection.rows(shard)
        sample_id = int(rows.sample_ids[index])
        others = candidates(rows.sample_ids, sample_id, seed=self.seed, epoch=epoch)
        for candidate in map(int, others):
            # its crop follows from its own id, so it looks as it would where the order itself asks for it
            own = uniform_rows(self.seed, [epoch], rows.sample_ids[[candidate]], "augment", AUGMENT_UNIFORMS)[0]
            image = self._image(shard, candidate, own, config)
            if not isinstance(image, Unreadable):
                record = Substitution(
                    sample_id,
                    int(rows.sample_ids[candidate]),
                    epoch,
                    step,
                    why.reason,
                    self.selection.source(shard, index),
                )
                if sample_id not in self._reported:  # it would come back in every epoch
                    self._reported.add(sample_id)
                    log.warning("%s. Sample %d of its shard is used instead", why.message, record.substitute_id)
                return image, candidate, record
        raise DataError(
            f"{why.message}. No other sample of its shard can be used instead: {len(others)} were tried and cannot be read either"
        )

    def _image(self, shard: int, index: int, uniforms: Uniforms, config: AugmentConfig) -> Image | Unreadable:
        """Return a sample's training picture. Its bytes are checked first, as `picture` does not notice all damage."""
        data = self._read(shard, index)
        if isinstance(data, Unreadable):
            return data
        try:
            return picture(data, uniforms, config, self.image_size)
        except DataError as error:
            return Unreadable(
                "undecodable",
                f"{self.selection.describe(shard, index)}: {error}, although its bytes are those that were written. "
                "Remove it from the source; the same command then shards it again",
            )

    def _read(self, shard: int, index: int) -> bytes | Unreadable:
        """Return the sample's bytes exactly as they were written, from a new copy if this node's was damaged."""
        _, key, size, sha256 = self.selection.shards[shard]
        # ends: a copy is discarded at most once per damage, and a new one is used only after its SHA-256 has matched
        while True:
            try:
                descriptor = self.cache.open(key, sha256=sha256, bytes=size)
                try:
                    data = self._checked(descriptor, shard, index)
                    if not isinstance(data, Unreadable) or not self.cache.discard_if_damaged(
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
        """Return a sample's bytes from an open shard, or what is wrong with them."""
        rows = self.selection.rows(shard)
        length, crc32 = int(rows.lengths[index]), int(rows.crc32s[index])
        # pread: no seek, and it still works if the shard is evicted meanwhile, since the descriptor keeps the file alive
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
        return "The shard is as it was written, but its row in samples.parquet is not: shard the source again"

    def _fetch(self, shard: int) -> None:
        _, key, size, sha256 = self.selection.shards[shard]
        self.cache.path(key, sha256=sha256, bytes=size)


class _Lookahead:
    """The distinct shards that some steps need, and their total size."""

    def __init__(self, shard_bytes: list[int]) -> None:
        self._shard_bytes, self._steps = shard_bytes, Counter[int]()
        self._bytes = 0

    def bytes_with(self, shards: list[int]) -> int:
        """Return what the total size would be with one more step's shards."""
        return self._bytes + sum(self._shard_bytes[shard] for shard in shards if not self._steps[shard])

    def add(self, shards: list[int]) -> None:
        """Add a step's shards."""
        self._bytes = self.bytes_with(shards)
        self._steps.update(shards)

    def remove(self, shards: list[int]) -> None:
        """Remove a step's shards."""
        self._steps.subtract(shards)
        self._bytes -= sum(self._shard_bytes[shard] for shard in shards if not self._steps[shard])
