"""Batches of training pictures, read by offset, checked, decoded and cropped ahead of their use, in the order of a SampleOrder.

Shapes: images [b, H, W, 3] uint8 RGB, b = this rank's share of the global batch; labels, sample_ids, epochs [b] int64.
This process computes what is read, and threads or worker processes make the pictures (decoders.py). Batches are made
`prefetch_batches` ahead of the requested one, fewer if that were more than READ_AHEAD_BYTES; shards of a remote store are fetched
further ahead, as far as the cache has room.
A training sample whose bytes are not what was written, or do not decode, is substituted and reported (substitution.py). No sample
is ever skipped.
Errors: DataError naming shard, sample and remedy: in evaluation for every sample that cannot be read, in training for a
shard that cannot be opened or of which no sample can be read; those of the decoders."""

import logging
from collections import Counter, deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from pipeline.data.feed.batch import Batch as Batch
from pipeline.data.feed.batch import Noise
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.decoders import Columns, DecodeProcesses, Decoders, DecodeThreads, start_fork_server
from pipeline.data.feed.order import SampleOrder, Slots, plain_slice, plain_slots
from pipeline.data.feed.picture_maker import Part, PictureMaker, Place, Unreadable
from pipeline.data.feed.selection import Selection
from pipeline.data.feed.substitution import Substitution, candidates
from pipeline.data.images.pictures import AugmentConfig
from pipeline.errors import ConfigError, DataError

READ_AHEAD_BYTES = 2**30
"""The most that a rank reads ahead, except that one batch always is."""
PREFETCH_BATCHES = 2
_FETCH_AHEAD = 32
"""Most batches by which a shard's download precedes its first use."""
_FETCH_THREADS = 2

log = logging.getLogger(__name__)
Unreadables = Literal["stop", "substitute"]


def batches_ahead(prefetch: int, batch_bytes: int) -> int:
    """Return how many batches of this size are made ahead of the requested one."""
    return min(prefetch, max(1, READ_AHEAD_BYTES // max(1, batch_bytes)))


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
        decode_workers: int = 0,
        prefetch_batches: int = PREFETCH_BATCHES,
        pin_memory: bool = False,
        fetch_bytes: int | None = None,
        noise: Noise | None = None,
        answer_s: float = 240.0,
        together: int = 1,
    ) -> None:
        """Check the settings; with `decode_workers`, start the server that forks them.

        `decode_workers`: processes that decode; 0: `decode_threads` threads of this process do.
        `answer_s`: how long such a process may take for its part of a batch, including downloads, before it counts as hung.
        `together`: neighbours of a global batch that are in the same rank's part.
        `fetch_bytes`: size of the shards that this rank may have in its lookahead; None: the size of the cache.
        """
        if not np.array_equal(order.served_counts, selection.counts):
            raise ConfigError(
                f"the order has {order.samples_per_epoch} samples in {order.served_counts.size} shards, the selection of split "
                f"{selection.split!r} has {selection.counts.sum()} in {selection.counts.size}: make the order from selection.counts"
            )
        for name, value in (("global_batch", global_batch), ("decode_threads", decode_threads)):
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive: write 1 or more")
        for name, value in (("prefetch_batches", prefetch_batches), ("decode_workers", decode_workers)):
            if value < 0:
                raise ConfigError(f"{name}={value} is negative: write 0 or more")
        if global_batch % together:
            raise ConfigError(f"global_batch={global_batch} is not a multiple of {together}: write one")
        self.selection, self.order, self.cache, self.together = selection, order, cache, together
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self.maker = PictureMaker(cache=cache, augment=augment, image_size=image_size, seed=seed, noise=noise)
        self.decode_threads, self.decode_workers = decode_threads, decode_workers
        self.prefetch_batches, self.pin_memory, self.answer_s = prefetch_batches, pin_memory, answer_s
        self.fetch_bytes = cache.max_bytes if fetch_bytes is None else fetch_bytes
        self.restarts = 0
        """How often decode workers that died or hung were replaced so far."""
        self._reported: set[int] = set()
        # asked once per shard here rather than for each shard of each step
        self._remote = [cache.local_path(shard.key) is None for shard in selection.shards]
        if decode_workers:
            start_fork_server(self.maker)

    def from_step(self, start: int, stop: int) -> Generator[Batch]:
        """Yield this rank's part of the global batches of steps start..stop-1. Closing the generator ends what it has started."""
        steps = (
            self.order.rank_slice(t, self.global_batch, self.rank, self.world_size, together=self.together)
            for t in range(start, stop)
        )
        return self._made(steps, self.maker, unreadable="substitute")

    def evaluation_batches(self, batch_size: int, *, unreadable: Unreadables = "stop") -> Generator[Batch]:
        """Yield this rank's samples in plain order, cropped from the centre; over all ranks each sample comes once.

        The last batch may be smaller. `unreadable="substitute"` is for pictures to look at, never for a score.
        """
        centre = self.maker.augment.for_evaluation()
        part = plain_slice(int(self.selection.counts.sum()), self.rank, self.world_size)
        starts = range(part.start, part.stop, batch_size)
        positions = (np.arange(start, min(start + batch_size, part.stop)) for start in starts)
        steps = (plain_slots(self.selection.counts, p) for p in positions)
        return self._made(steps, replace(self.maker, augment=centre, noise=None), unreadable=unreadable)

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

    def _made(self, steps: Iterable[Slots], maker: PictureMaker, *, unreadable: Unreadables) -> Generator[Batch]:
        under_way: deque[Slots] = deque()
        decoders: Decoders
        if self.decode_workers:
            decoders = DecodeProcesses(maker, self.decode_workers, pin_memory=self.pin_memory, answer_s=self.answer_s)
        else:
            decoders = DecodeThreads(maker, self.decode_threads, pin_memory=self.pin_memory)
        restarts = self.restarts

        def finished() -> Batch:
            batch, failed = decoders.finish()
            self.restarts = restarts + decoders.restarts
            return self._mended(batch, under_way.popleft(), failed, maker, unreadable)

        # closed here: an abandoned generator would keep its download threads until it is collected
        with closing(decoders), closing(self._fetched_ahead(steps)) as fetched:
            for slots in fetched:
                ahead = batches_ahead(self.prefetch_batches, len(slots.indices) * maker.layout.bytes_per_sample)
                under_way.append(slots)
                self._begin(decoders, slots)
                while len(under_way) > ahead:
                    yield finished()
            while under_way:
                yield finished()

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

    def _begin(self, decoders: Decoders, slots: Slots) -> None:
        rows = self.selection.rows_at(slots)
        count = len(rows.labels)
        size = decoders.chunk(count)
        parts = []
        for here in (slice(first, first + size) for first in range(0, count, size)):
            shards, shard = np.unique(slots.shards[here], return_inverse=True)
            distinct = tuple(self.selection.shards[one] for one in shards)
            parts.append(Part(here.start, distinct, shard, rows.offsets[here], rows.lengths[here], rows.crc32s[here]))
        decoders.begin(Columns(rows.labels, rows.sample_ids, slots.epochs), parts)

    def _mended(
        self,
        batch: Batch,
        slots: Slots,
        failed: list[tuple[int, Unreadable]],
        maker: PictureMaker,
        unreadable: Unreadables,
    ) -> Batch:
        """Return the batch with other samples in the positions that could not be filled, or raise DataError."""
        substitutions = []
        for position, why in failed:
            shard, index = int(slots.shards[position]), int(slots.indices[position])
            if unreadable == "stop" or why.reason == "unopened":
                raise DataError(self._message(shard, index, why))
            step = int(slots.positions[position]) // self.global_batch
            substitutions.append(self._substitute(batch, position, shard, index, step, why, maker))
        return batch._replace(substitutions=tuple(substitutions))

    def _substitute(
        self, batch: Batch, position: int, shard: int, index: int, step: int, why: Unreadable, maker: PictureMaker
    ) -> Substitution:
        """Write another sample of the shard into a position of a batch, and return the record of it."""
        rows, epoch = self.selection.rows(shard), int(batch.epochs[position])
        sample_id = int(rows.sample_ids[index])
        others = candidates(rows.sample_ids, sample_id, seed=maker.seed, epoch=epoch)
        message = self._message(shard, index, why)
        for candidate in map(int, others):
            one, epochs = slice(candidate, candidate + 1), np.array([epoch])
            # its crop follows from its own id, so it looks as it would where the order itself asks for it
            own = maker.uniforms(epochs, rows.sample_ids[one])[0]
            place = Place(self.selection.shards[shard], *(int(column[candidate]) for column in rows[2:]))
            image = maker.picture(place, own)
            if isinstance(image, Unreadable):
                if image.reason == "unopened":
                    raise DataError(self._message(shard, candidate, image))
                continue
            batch.images[position] = torch.from_numpy(image)
            batch.labels[position], batch.sample_ids[position] = (
                int(rows.labels[candidate]),
                int(rows.sample_ids[candidate]),
            )
            if maker.noise:
                batch.noise[position] = torch.from_numpy(maker.noise(epochs, rows.sample_ids[one])[0])
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
                log.warning("%s. Sample %d of its shard is used instead", message, record.substitute_id)
            return record
        raise DataError(
            f"{message}. No other sample of its shard can be used instead: {len(others)} were tried and cannot be read either"
        )

    def _message(self, shard: int, index: int, why: Unreadable) -> str:
        """Return shard, sample, what is wrong, and the remedy."""
        local = self.cache.local_path(self.selection.shards[shard].key)
        if why.reason == "undecodable":
            remedy = "Remove it from the source; the same command then shards it again"
        elif local is not None:
            remedy = f"Restore {local} from a copy, or shard the source again"
        else:
            remedy = "The shard is as it was written, but its row in samples.parquet is not: shard the source again"
        return f"{self.selection.describe(shard, index)}: {why.what}. {remedy}"

    def _fetch(self, shard: int) -> None:
        _, key, size, sha256 = self.selection.shards[shard]
        self.selection.rows(shard)  # before the loop's thread needs them
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
