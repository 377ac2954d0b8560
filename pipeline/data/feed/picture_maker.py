"""From a place in a shard to a training picture in a batch: read by offset, check, decode, crop.

Every read is checked against the manifest's CRC-32 (23 us per picture of 88 KB, 2 % of its decoding time). A cached copy that was
damaged on this disk is fetched again first. What cannot be read all the same is returned, not raised: whether it is substituted or
ends the run is for the loader to decide, which knows the manifest.
A maker knows no manifest and no order, so it is small enough to be sent to every decode worker.
Errors: those of the cache, for a shard that cannot be fetched."""

import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from mae_core.randomness import uniform_rows
from pipeline.data.feed.batch import Batch, BatchLayout, Int64s, Noise
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.selection import Shard
from pipeline.data.images.pictures import AugmentConfig, Image, Uniforms, picture
from pipeline.errors import DataError


class Unreadable(NamedTuple):
    """A sample whose picture cannot be made."""

    reason: Literal["crc32", "truncated", "undecodable", "unopened"]
    what: str
    """What is wrong, as a clause."""


class Place(NamedTuple):
    """Where a sample's bytes are, and their checksum."""

    shard: Shard
    offset: int
    length: int
    crc32: int


class Part(NamedTuple):
    """Consecutive positions of a batch, and where their samples are."""

    first: int
    shards: tuple[Shard, ...]  # the distinct ones
    shard: Int64s  # [n] index into `shards`
    offsets: Int64s  # [n]
    lengths: Int64s  # [n]
    crc32s: Int64s  # [n]

    @property
    def within(self) -> slice:
        """The positions of the batch."""
        return slice(self.first, self.first + len(self.shard))

    def places(self) -> list[Place]:
        """Return the samples' places, in their order."""
        columns = zip(*(column.tolist() for column in self[2:]), strict=True)
        return [Place(self.shards[shard], *rest) for shard, *rest in columns]


@dataclass(frozen=True, kw_only=True)
class PictureMaker:
    """Makes the pictures of a batch whose ids and epochs are filled in."""

    cache: ShardCache
    augment: AugmentConfig
    image_size: tuple[int, int]
    seed: int
    noise: Noise | None = None

    @cached_property
    def layout(self) -> BatchLayout:
        """The layout of the batches."""
        none = np.empty(0, np.int64)
        shape = self.noise(none, none).shape[1:] if self.noise else (0,)
        return BatchLayout(image_size=self.image_size, noise_shape=shape)

    def fill(self, batch: Batch, part: Part) -> list[tuple[int, Unreadable]]:
        """Fill in pictures and noise of some positions; return the positions whose pictures cannot be made."""
        epochs, sample_ids = batch.epochs[part.within].numpy(), batch.sample_ids[part.within].numpy()
        images, unreadable = batch.images.numpy(), []
        # keyed by epoch and id, so the crop is the same at any position, world size and after any resume
        uniforms = self.uniforms(epochs, sample_ids)
        for position, (place, numbers) in enumerate(zip(part.places(), uniforms, strict=True), part.first):
            image = self.picture(place, numbers)
            if isinstance(image, Unreadable):
                unreadable.append((position, image))
            else:
                images[position] = image  # the only copy of a picture between its decoding and the micro-batch
        if self.noise:
            batch.noise[part.within].numpy()[:] = self.noise(epochs, sample_ids)
        return unreadable

    def uniforms(self, epochs: Int64s, sample_ids: Int64s) -> Uniforms:
        """Return the random numbers of the samples' pictures, [n, AugmentConfig.uniforms]."""
        return uniform_rows(self.seed, epochs, sample_ids, "augment", self.augment.uniforms)

    def picture(self, place: Place, uniforms: Uniforms) -> Image | Unreadable:
        """Return a sample's training picture. Its bytes are checked first, as `picture` does not notice all damage."""
        try:
            data = self._read(place)
        except OSError as error:
            return Unreadable("unopened", f"it cannot be read ({error})")
        if isinstance(data, Unreadable):
            return data
        try:
            return picture(data, uniforms, self.augment, self.image_size)
        except DataError as error:
            return Unreadable("undecodable", f"{error}, although its bytes are those that were written")

    def _read(self, place: Place) -> bytes | Unreadable:
        """Return the sample's bytes exactly as they were written, from a new copy if this node's was damaged."""
        _, key, size, sha256 = place.shard
        # ends: a copy is discarded at most once per damage, and a new one is used only after its SHA-256 has matched
        while True:
            descriptor = self.cache.open(key, sha256=sha256, bytes=size)
            try:
                data = _checked(descriptor, place)
                if not isinstance(data, Unreadable) or not self.cache.discard_if_damaged(
                    key, sha256=sha256, descriptor=descriptor
                ):
                    return data
            finally:
                os.close(descriptor)


def _checked(descriptor: int, place: Place) -> bytes | Unreadable:
    """Return a sample's bytes from an open shard, or what is wrong with them."""
    # pread: no seek, and it still works if the shard is evicted meanwhile, since the descriptor keeps the file alive
    data = os.pread(descriptor, place.length, place.offset)
    if len(data) != place.length:
        return Unreadable("truncated", f"the shard ends after {len(data)} of its bytes")
    if (found := zlib.crc32(data)) != place.crc32:
        return Unreadable("crc32", f"its CRC-32 is {found:08x}, the manifest says {place.crc32:08x}")
    return data
