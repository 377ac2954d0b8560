"""Images into WebDataset tars: the plan is pure, and writing one planned shard is a task that may run any number of times.

Plan: in every split the samples stand in the order of a keyed hash of their paths (random, and the same at every retry)
and are cut into runs of equal planned bytes. Only snapshot, seed and limits decide, never the number of tasks.
Shard: a plain USTAR tar, `<key>.jpg` and, when labelled, `<key>.cls`; key = sample id, 12 digits; times, owner and mode
are fixed, so that the same plan gives the same bytes anywhere. It lies at `shards/<2 hex>/<sha256>.tar`.
Row: `rows/<plan digest>.json`, put-if-absent and last: it exists, so the shard is done. A row with a reading error
(file vanished, permission) is kept under a name of its own, so that the next attempt reads again.
Units: bytes. Errors: StorageError when a store is down; DataError when too many images are bad."""

import hashlib
import json
import tarfile
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from webdataset import TarWriter

from pipeline.data.intake import INTAKE_VERSION, Refused, Taken, take_in
from pipeline.data.manifest import NO_LABEL, QUARANTINE, SAMPLES, ContentHash, json_digest
from pipeline.data.sources import keyed_hash
from pipeline.errors import ConfigError, DataError
from pipeline.storage import DeniedObject, MissingObject, Store, open_store

SHARD_VERSION = 1
"""Part of every plan's digest; bumped by hand when the tar's bytes or the row change."""
_MAX_SAMPLES = 10_000
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class IntakePolicy:
    """How images are taken in."""

    image_max_short_side: int = 512
    """Pixels; a longer short side is reduced to this."""
    image_max_pixels: int = 100_000_000
    """Images with more are refused before decoding."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name}={value} is not positive: write a number of pixels, such as {type(self)()}")


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: which samples, in which order."""

    shard: int
    split: str
    samples: Any
    """Table (sample_id, path, size, label, split): rows of the snapshot, in the order of the tar."""
    digest: str
    """Of all that decides the shard's content, save the images' own bytes."""


@dataclass(frozen=True)
class ShardRow:
    """What a task tells: the small part of a row; the samples are in the row object."""

    row_key: str
    shard: int
    split: str
    key: str
    """Of the tar; empty when every image was refused."""
    bytes: int
    sha256: str
    samples: int
    quarantine: tuple[Mapping[str, Any], ...]
    """Rows of quarantine.parquet."""
    reused: bool
    """An earlier attempt had written it."""


def plan_shards(
    snapshot: Any, *, seed: int, shard_max_bytes: int, min_shards: int, policy: IntakePolicy
) -> list[ShardPlan]:
    """Every sample of the snapshot (its table) in exactly one shard; `train` in `min_shards` or more, if it has the samples.

    A shard's planned bytes exceed `shard_max_bytes` only when it holds a single sample.
    """
    paths = snapshot.column("path").to_pylist()
    hashes = np.fromiter((keyed_hash(seed, path, purpose="shard") for path in paths), np.uint64, len(paths))
    splits = np.asarray(snapshot.column("split").to_pylist(), dtype=object)
    sizes = snapshot.column("size").to_numpy()
    labelled = snapshot.column("label").to_numpy() != NO_LABEL
    planned = _BLOCK + -(-sizes // _BLOCK) * _BLOCK + np.where(labelled, 2 * _BLOCK, 0)
    plans: list[ShardPlan] = []
    for split in sorted(set(splits)):
        rows = np.flatnonzero(splits == split)
        rows = rows[np.argsort(hashes[rows], kind="stable")]
        least = min_shards if split == "train" else 1
        edges = cut_evenly(planned[rows], max_bytes=shard_max_bytes, min_parts=least)
        for start, end in pairwise(edges):
            samples = snapshot.take(pa.array(rows[start:end]))
            digest = _plan_digest(len(plans), split, samples, policy)
            plans.append(ShardPlan(len(plans), split, samples, digest))
    return plans


def cut_evenly(sizes: NDArray[np.int64], *, max_bytes: int, min_parts: int) -> list[int]:
    """Edges 0 = e0 < e1 < ... = len(sizes) of runs of about equal bytes; no run but a single item exceeds `max_bytes`."""
    count, total = len(sizes), int(sizes.sum())
    middles = np.cumsum(sizes) - sizes / 2
    parts = min(count, max(min_parts, -(-total // max_bytes), -(-count // _MAX_SAMPLES)))
    while True:
        steps = np.arange(parts - 1)
        edges = np.searchsorted(middles, total * (steps + 1) / parts)
        edges = np.maximum.accumulate(np.maximum(edges, steps + 1) - steps) + steps  # each run has an item
        edges = np.minimum(edges, count - parts + 1 + steps)
        edges = np.concatenate([[0], edges, [count]])
        runs = np.diff(edges)
        too_big = (np.add.reduceat(sizes, edges[:-1]) > max_bytes) & (runs > 1)
        if parts == count or not (too_big.any() or (runs > _MAX_SAMPLES).any()):
            return [int(edge) for edge in edges]
        parts = min(count, parts + max(1, parts // 50))


def write_shard(plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy) -> ShardRow:
    """Writes the shard and, last, its row; returns at once when the row exists."""
    root = open_store(root_uri)
    row_key = f"rows/{plan.digest}.json"
    if root.exists(row_key):
        return _shard_row(root, row_key, reused=True)
    images = open_store(source)
    samples: list[dict[str, Any]] = []
    quarantine: list[dict[str, Any]] = []
    unread = 0
    key = sha256 = ""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with path.open("wb") as file, TarWriter(file, "root", "root", 0o444, encoder=False, mtime=0) as tar:
            for planned in plan.samples.to_pylist():
                taken, was_read = _fetch(images, planned, policy)
                if isinstance(taken, Refused):
                    unread += not was_read
                    quarantine.append(_quarantine_row(planned, taken))
                    continue
                member = {"__key__": f"{planned['sample_id']:012d}", "jpg": taken.data}
                if planned["label"] != NO_LABEL:
                    member["cls"] = str(planned["label"]).encode()
                tar.write(member)
                samples.append(_sample_row(plan, planned, taken))
        if samples:
            for row, offset in zip(samples, payload_offsets(path), strict=True):
                row["offset"] = offset
            with path.open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            key, size = f"shards/{sha256[:2]}/{sha256}.tar", path.stat().st_size
            if not root.exists(key):
                root.upload(key, path)
    document = {
        "shard": plan.shard,
        "split": plan.split,
        "key": key,
        "bytes": size,
        "sha256": sha256,
        "samples": {name: [row[name] for row in samples] for name in SAMPLES.names},
        "quarantine": quarantine,
    }
    if unread:
        row_key = f"rows/{plan.digest}-{json_digest(document)[:16]}.json"
    root.create(row_key, json.dumps(document, sort_keys=True).encode())
    return _shard_row(root, row_key, reused=False)  # as stored: another task may have been first


def read_samples(root: Store, row: ShardRow) -> Any:
    """The samples of a written shard (SAMPLES), all marked served."""
    return pa.table(json.loads(root.read(row.row_key))["samples"], schema=SAMPLES)


def payload_offsets(path: Path) -> list[int]:
    """Where the image of each sample starts in a tar, by walking its headers."""
    with tarfile.open(path) as tar:
        return [member.offset_data for member in tar if member.name.endswith(".jpg")]


def check_bad_share(listed: int, bad: Sequence[Mapping[str, Any]], *, bad_share_stop: float) -> None:
    """DataError when more than this share of the listed images was refused."""
    share = len(bad) / max(1, listed)
    if share > bad_share_stop:
        first = "; ".join(f"{row['source']} ({row['reason']}: {row['detail']})" for row in bad[:3])
        raise DataError(
            f"{len(bad)} of {listed} images are bad ({share:.1%}), more than data.bad_share_stop={bad_share_stop} allows. "
            f"First: {first}. Repair or remove them and name a new data.snapshot, or raise data.bad_share_stop; shards "
            "already written are kept"
        )


def _fetch(images: Store, planned: Mapping[str, Any], policy: IntakePolicy) -> tuple[Taken | Refused, bool]:
    """The image taken in or refused, and whether it could be read at all. A store that is down raises."""
    limit = 2**20 + 8 * policy.image_max_pixels  # no bitmap of allowed size is larger: 16 bit RGBA
    if planned["size"] > limit:
        return Refused("too_many_bytes", f"{planned['size']} bytes, allowed are {limit} (from image_max_pixels)"), True
    try:
        data = images.read(planned["path"])
    except (MissingObject, DeniedObject) as error:
        return Refused("missing" if isinstance(error, MissingObject) else "denied", str(error)), False
    return take_in(data, max_side=policy.image_max_short_side, max_pixels=policy.image_max_pixels), True


def _sample_row(plan: ShardPlan, planned: Mapping[str, Any], taken: Taken) -> dict[str, Any]:
    return {
        "sample_id": planned["sample_id"],
        "shard": plan.shard,
        "length": len(taken.data),
        "crc32": zlib.crc32(taken.data),
        "sha256": hashlib.sha256(taken.data).hexdigest(),
        "dhash64": taken.dhash64,
        "width": taken.width,
        "height": taken.height,
        "original_width": taken.original_width,
        "original_height": taken.original_height,
        "label": planned["label"],
        "key": f"{planned['sample_id']:012d}",
        "source": planned["path"],
        "split": plan.split,
        "served": True,
        "policy": taken.policy,
    }


def _quarantine_row(planned: Mapping[str, Any], refused: Refused) -> dict[str, Any]:
    row = {"source": planned["path"], "split": planned["split"], "label": planned["label"], "bytes": planned["size"]}
    row |= {"reason": refused.reason, "detail": refused.detail}
    return {name: row[name] for name in QUARANTINE.names}


def _shard_row(root: Store, row_key: str, *, reused: bool) -> ShardRow:
    row = json.loads(root.read(row_key))
    small = {name: row[name] for name in ("shard", "split", "key", "bytes", "sha256")}
    return ShardRow(
        row_key, **small, samples=len(row["samples"]["sample_id"]), quarantine=tuple(row["quarantine"]), reused=reused
    )


def _plan_digest(shard: int, split: str, samples: Any, policy: IntakePolicy) -> str:
    content = ContentHash(samples.column_names)
    content.update(samples)
    versions = [SHARD_VERSION, INTAKE_VERSION]
    identity = {"shard": shard, "split": split, "samples": content.hexdigest(), "policy": asdict(policy)}
    return json_digest(identity | {"versions": versions})
