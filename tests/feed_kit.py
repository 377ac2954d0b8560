"""Datasets of a few shards, loaders over them, and damage to their samples."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.data.dataset.manifest import Manifest, write_manifest
from pipeline.data.feed.cache import ShardCache
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Selection
from pipeline.data.images.intake import IntakePolicy
from pipeline.data.images.pictures import AugmentConfig
from pipeline.data.sharding.shard_plan import plan_shards
from pipeline.data.sharding.shard_record import read_samples
from pipeline.data.sharding.shard_writer import write_shard
from pipeline.storage import FileStore

SIZE = (24, 24)
CLASSES = 3


@dataclass(frozen=True)
class DistantStore(FileStore):
    """A folder that acts as a bucket."""

    def local_path(self, key):
        return None


def make_dataset(folder: Path, *, label=lambda i: i % CLASSES, train=40, shards=5) -> Manifest:
    """Write `train` training images in `shards` shards, and 7 test images; image i is noise of seed i."""
    source, root = FileStore(folder / "source"), FileStore(folder / "root")
    rows: dict[str, list[Any]] = {name: [] for name in ("sample_id", "path", "size", "label", "split")}
    for i in range(train + 7):
        pixels = np.random.default_rng(i).integers(0, 255, (5, 7, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((40 + i % 5, 36), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        source.write(f"{i:03d}.jpg", buffer.getvalue())
        split = "train" if i < train else "test"
        for name, value in zip(rows, (i, f"{i:03d}.jpg", len(buffer.getvalue()), label(i), split), strict=True):
            rows[name].append(value)
    types = {
        "sample_id": pa.int64(),
        "path": pa.string(),
        "size": pa.int64(),
        "label": pa.int32(),
        "split": pa.string(),
    }
    snapshot = pa.table(rows, schema=pa.schema(types.items()))
    policy = IntakePolicy()
    plans = plan_shards(snapshot, seed=0, shard_max_bytes=10**6, min_shards=shards, policy=policy)
    written = [write_shard(plan, source=source.uri, root_uri=root.uri, policy=policy) for plan in plans]
    rows_of_shards = [
        {
            "shard": w.shard,
            "key": w.key,
            "bytes": w.bytes,
            "samples": w.samples,
            "served": w.samples,
            "sha256": w.sha256,
            "split": w.split,
        }
        for w in written
    ]
    none = pa.table({"source": [], "split": [], "label": [], "reason": [], "detail": [], "bytes": []})
    write_manifest(
        root.at("g0001"),
        samples=(read_samples(root, row) for row in written),
        shards=pa.Table.from_pylist(rows_of_shards),
        quarantine=none,
        listed={"train": train, "test": 7},
        classes=["a", "b", "c"],
        policy={},
    )
    return Manifest.open(root.at("g0001"), root)


def loader(manifest, selection=None, *, store=None, directory=Path("/nonexistent"), seed=5, **options):
    selection = selection or Selection.all(manifest, "train")
    settings: dict[str, Any] = {
        "global_batch": 12,
        "rank": 0,
        "world_size": 1,
        "augment": AugmentConfig(),
        "image_size": SIZE,
    }
    return Loader(
        selection,
        SampleOrder(selection.counts, OrderConfig(seed=seed, lanes=4, window_shards=2)),
        seed=seed,
        cache=ShardCache(store or manifest.root, directory, max_bytes=10**9),
        **settings | options,
    )


def joined(batches):
    return tuple(torch.cat(tensors).numpy() for tensors in zip(*(batch[:4] for batch in batches), strict=True))


def assert_equal_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            assert torch.equal(x, y)
        assert a.substitutions == b.substitutions


def damage(manifest, change):
    """Change bytes in the last sample of a shard, and return that sample's row and the shard's key."""
    selection = Selection.all(manifest, "train")
    shard = selection.shards[2]
    row = manifest.samples(shard.shard).to_pylist()[-1]
    path = manifest.root.local_path(shard.key)
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    path.write_bytes(change(data, row))
    return row, shard.key


def flip_bit(data, row):
    data[row["offset"] + row["length"] // 2] ^= 1
    return data


def cut_short(data, row):
    return data[: row["offset"] + row["length"] - 1]


def not_a_picture(data, row):
    data[row["offset"] : row["offset"] + row["length"]] = bytes(row["length"])
    return data
