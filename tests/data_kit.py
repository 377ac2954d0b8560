"""Small real sources of every kind, taken through the real snapshot and shard stages."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import locate_shard
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.graph.step import Attempt, StageInput
from pipeline.stages.shard import ShardStageConfig, shard
from pipeline.stages.snapshot import snapshot
from pipeline.storage import open_store

OPTIONS = {"bad_share_stop": 0.05, "bad_share_warn": 0.01}


class Bar:
    """Progress that records its updates."""

    def __init__(self):
        self.seen = []

    def update(self, done, total, *, unit, **fields):
        self.seen.append((done, total, unit, fields))


def picture(
    number: int, kind: str = "JPEG", *, size: tuple[int, int] = (32, 24), mode: str = "RGB", **options
) -> bytes:
    """Return noise that depends on the number; `size` is (width, height)."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def tar_bytes(members: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """Return a tar of these members, written by Python's tarfile."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def labelled(numbers: Iterable[int], *, classes: int = 3) -> list[tuple[str, bytes]]:
    """Return the members of samples, each with a .cls."""
    return [
        member
        for number in numbers
        for member in ((f"{number:05d}.jpg", picture(number)), (f"{number:05d}.cls", b"%d" % (number % classes)))
    ]


def write_tars(source: Path, tars: Mapping[str, list[tuple[str, bytes]]]) -> str:
    for name, members in tars.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(tar_bytes(members))
    return str(source)


def write_table(path: Path, columns: Mapping[str, Any], *, rows_per_group: int = 10) -> str:
    """Write a Parquet table and return its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=rows_per_group)
    return str(path.parent)


def attempt(root: Path | str, *, generation: int = 1, executor: Any = "in_process", **options: float) -> Attempt:
    given = OPTIONS | options
    return Attempt(str(root), generation, "", "step", "f", Resources(), executor, Bar(), options=given)


def listed(source: str, root: Path | str, *earlier: StageInput, **options: Any) -> StageInput:
    """Return the snapshot of a source, as the shard stage sees it. `earlier`: the earlier parts."""
    handed = attempt(root)
    config = SnapshotConfig(source=source, **{"test_share": 0.0, "seed": 0} | options)
    result = snapshot(config, {f"part{number}": part for number, part in enumerate(earlier)}, handed)
    return StageInput(handed.root_uri, handed.generation, "f", result.facts)


def sharded(
    source: str,
    listing: StageInput,
    root: Path | str,
    *,
    executor: Any = "in_process",
    generation: int = 1,
    **options: Any,
) -> StageInput:
    """Return the shards of a snapshot, as later stages see them."""
    stop = options.pop("bad_share_stop", OPTIONS["bad_share_stop"])
    handed = attempt(root, executor=executor, generation=generation, bad_share_stop=stop)
    config = ShardStageConfig(source=source, **{"seed": 0, "shard_max_bytes": 20_000, "min_shards": 4} | options)
    result = shard(config, {"snapshot": listing}, handed)
    return StageInput(handed.root_uri, handed.generation, "f", result.facts, {"notes": result.notes})


def manifest_of(shards: StageInput) -> Manifest:
    return Manifest.open(shards.store, shards.root)


def stored(shards: StageInput, root: Any = None) -> dict[str, dict[str, Any]]:
    """Return source -> row, with the bytes in the tar as `data` and the class's name as `class`."""
    manifest = Manifest.open(shards.store, root or shards.root)
    found = {}
    for split in manifest.splits:
        for one in manifest.shards(split).to_pylist():
            store, key = locate_shard(manifest.root, one["key"])
            for row in manifest.stored_samples(one["shard"]).to_pylist():
                row["data"] = store.read_range(key, row["offset"], row["length"])
                row["class"] = None if row["label"] < 0 else manifest.classes[row["label"]]
                found[row["source"]] = row
    return found


def quarantined(shards: StageInput) -> dict[str, str]:
    """Return source -> reason."""
    rows = pq.read_table(io.BytesIO(shards.store.read("quarantine.parquet"))).to_pylist()
    return {row["source"]: row["reason"] for row in rows}


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def all_objects(root: Path | str, prefix: str = "") -> dict[str, bytes]:
    store = open_store(str(root))
    return {item.key: store.read(item.key) for item in store.list(prefix)}
