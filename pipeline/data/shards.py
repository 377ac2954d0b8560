"""Images into WebDataset tars: the plan is pure, and writing one planned shard is a task that may run any number of times.

Plan: in every split the samples stand in the order of a keyed hash of their paths (random, and the same at every retry)
and are cut into runs of equal planned bytes. Only snapshot, seed and limits decide, never the number of tasks.
Shard: a plain USTAR tar, `<key>.jpg` and, when labelled, `<key>.cls`; key = sample id, 12 digits; times, owner and mode
are fixed, so that the same plan gives the same bytes anywhere. It lies at `shards/<2 hex>/<sha256>.tar`.
Row: `rows/<plan digest>.json`, put-if-absent and last: it exists, so the shard is done. A row with a reading error
(file vanished, permission) is kept under a name of its own, so that the next attempt reads again.
Parquet tables: the same, with rows for paths; a task reads the row groups that hold its rows. Tars of others are not
written anew but indexed (`pipeline/data/tars.py`).
Units: bytes. Errors: StorageError when a store is down; DataError when too many images are bad."""

import hashlib
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from webdataset import TarWriter

from pipeline.data.intake import INTAKE_VERSION, Refused, Taken, take_in
from pipeline.data.manifest import NO_LABEL, QUARANTINE, SAMPLES, ContentHash, json_digest, local_copy
from pipeline.data.sources import keyed_hash
from pipeline.data.tables import read_images, split_row_name
from pipeline.errors import ConfigError, DataError
from pipeline.storage import DeniedObject, MissingObject, Store, open_store

SHARD_VERSION = 1
"""Part of every plan's digest; bumped by hand when the tar's bytes or the row change."""
_MAX_SAMPLES = 10_000
_BLOCK = 512
_SNAPSHOT_ROWS = 65_536
Int64s = NDArray[np.int64]


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
    """One shard to be written, or one tar to be indexed."""

    shard: int
    split: str
    samples: Any
    """Table (sample_id, path, size, label, split[, row_group]): rows of the snapshot, in the order of the tar."""
    digest: str
    """Of all that decides the shard's content, save the images' own bytes."""


class ShardPlans(Sequence[ShardPlan]):
    """The plan of a whole dataset; each shard's is made when it is asked for, so that memory holds row numbers only."""

    def __init__(
        self, snapshot: Any, runs: Sequence[tuple[str, Int64s]], policy: IntakePolicy, **reading: str | None
    ) -> None:
        """`runs`: split and rows of the snapshot of each shard; `reading`: what decides its content beside images and policy."""
        self._snapshot, self._runs, self._policy, self._reading = snapshot, runs, policy, reading
        chunks = snapshot.column("path").chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._batches = snapshot.to_batches()

    def __len__(self) -> int:
        return len(self._runs)

    def samples(self, shard: int) -> int:
        """How many rows of the snapshot a shard takes."""
        return len(self._runs[shard][1])

    @overload
    def __getitem__(self, shard: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, shard: slice) -> list[ShardPlan]: ...
    def __getitem__(self, shard: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(shard, slice):
            return [self[index] for index in range(*shard.indices(len(self)))]
        shard = range(len(self))[shard]
        split, rows = self._runs[shard]
        samples = self._take(rows)
        content = ContentHash(samples.column_names)
        content.update(samples)
        identity = {"shard": shard, "split": split, "samples": content.hexdigest(), "policy": asdict(self._policy)}
        digest = json_digest(identity | self._reading | {"versions": [SHARD_VERSION, INTAKE_VERSION]})
        return ShardPlan(shard, split, samples, digest)

    def _take(self, rows: Int64s) -> Any:
        """Rows of the snapshot in this order. Batch by batch: Arrow's own would join all batches at every call."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        parts = []
        for number in np.unique(np.searchsorted(self._starts, ascending, side="right") - 1):
            first, last = np.searchsorted(ascending, self._starts[number : number + 2])
            parts.append(self._batches[number].take(pa.array(ascending[first:last] - self._starts[number])))
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        schema = self._snapshot.schema
        return pa.Table.from_batches(parts, schema=schema).combine_chunks().take(pa.array(places))


@dataclass(frozen=True)
class ShardRow:
    """What a task tells: the small part of a row; the samples are in the row object."""

    row_key: str
    shard: int
    split: str
    key: str
    """Of the tar (`pipeline.data.manifest.locate`); empty when every image was refused."""
    bytes: int
    sha256: str
    samples: int
    quarantine: tuple[Mapping[str, Any], ...]
    """Rows of quarantine.parquet."""
    reused: bool
    """An earlier attempt had written it."""
    classes: tuple[str, ...] | None = None
    """Of an indexed tar: what its labels index; its samples count from 0. None: labels and ids are the snapshot's."""
    other_members: int = 0
    """Files of an indexed tar that belong to no sample."""


@contextmanager
def opened_snapshot(store: Store, key: str) -> Iterator[Any]:
    """The table of a snapshot, on disk and mapped: memory that it fills can be taken away from it."""
    with tempfile.TemporaryDirectory() as folder:
        path, rows = local_copy(store, key, Path(folder) / "snapshot.parquet"), Path(folder) / "snapshot.arrow"
        with pq.ParquetFile(path) as table, pa.OSFile(str(rows), "wb") as file:
            schema = table.schema_arrow.remove_metadata()
            with pa.ipc.new_file(file, schema) as writer:
                for batch in table.iter_batches(batch_size=_SNAPSHOT_ROWS):
                    writer.write_batch(batch)
        with pa.memory_map(str(rows)) as mapped:
            yield pa.ipc.open_file(mapped).read_all()


def plan_shards(
    snapshot: Any,
    *,
    seed: int,
    shard_max_bytes: int,
    min_shards: int,
    policy: IntakePolicy,
    image_column: str = "",
) -> ShardPlans:
    """Every sample of the snapshot (its table) in exactly one shard; `train` in `min_shards` or more, if it has the samples.

    A shard's planned bytes exceed `shard_max_bytes` only when it holds a single sample. Of Parquet tables (`image_column`),
    row groups stand in random order and rows are shuffled within a shard; where row groups are small beside a shard, none
    is cut. Memory: about 100 bytes a sample beside the table.
    """
    hashes, group_hashes = _hashes(snapshot, seed)
    names, splits = _codes(snapshot.column("split"))
    sizes = snapshot.column("size").to_numpy()
    planned = _BLOCK + -(-sizes // _BLOCK) * _BLOCK
    planned += np.where(snapshot.column("label").to_numpy() != NO_LABEL, 2 * _BLOCK, 0)
    runs: list[tuple[str, Int64s]] = []
    for split in sorted(names):
        rows = np.flatnonzero(splits == names.index(split))
        least = min_shards if split == "train" else 1
        if group_hashes is None:
            rows = rows[np.argsort(hashes[rows], kind="stable")]
            edges = cut_evenly(planned[rows], max_bytes=shard_max_bytes, min_parts=least)
            runs += [(split, rows[start:end]) for start, end in pairwise(edges)]
        else:
            rows = rows[np.lexsort((hashes[rows], group_hashes[rows]))]
            edges = _cut_groups(planned[rows], group_hashes[rows], max_bytes=shard_max_bytes, min_parts=least)
            cut = [rows[start:end] for start, end in pairwise(edges)]
            runs += [(split, run[np.argsort(hashes[run], kind="stable")]) for run in cut]
    return ShardPlans(snapshot, runs, policy, **({"image_column": image_column} if image_column else {}))


def cut_evenly(sizes: Int64s, *, max_bytes: int, min_parts: int, samples: Int64s | None = None) -> list[int]:
    """Edges 0 = e0 < e1 < ... = len(sizes) of runs of about equal bytes; no run but a single item exceeds `max_bytes`.

    `samples`: of each item, one if left out; a run of several items has at most 10,000.
    """
    if samples is None:
        samples = np.ones(len(sizes), dtype=np.int64)
    count, total = len(sizes), int(sizes.sum())
    middles = np.cumsum(sizes) - sizes / 2
    parts = min(count, max(min_parts, -(-total // max_bytes), -(-int(samples.sum()) // _MAX_SAMPLES)))
    while True:
        steps = np.arange(parts - 1)
        edges = np.searchsorted(middles, total * (steps + 1) / parts)
        edges = np.maximum.accumulate(np.maximum(edges, steps + 1) - steps) + steps  # each run has an item
        edges = np.minimum(edges, count - parts + 1 + steps)
        edges = np.concatenate([[0], edges, [count]])
        too_big = np.add.reduceat(sizes, edges[:-1]) > max_bytes
        too_many = np.add.reduceat(samples, edges[:-1]) > _MAX_SAMPLES
        if parts == count or not ((too_big | too_many) & (np.diff(edges) > 1)).any():
            return [int(edge) for edge in edges]
        parts = min(count, parts + max(1, parts // 50))


def write_shard(
    plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy, image_column: str = ""
) -> ShardRow:
    """Writes the shard and, last, its row; returns at once when the row exists. `image_column`: of Parquet tables."""
    root = open_store(root_uri)
    row_key = f"rows/{plan.digest}.json"
    if root.exists(row_key):
        return stored_row(root, row_key, reused=True)
    fetch = _fetcher(plan, source, policy, image_column)
    samples: list[dict[str, Any]] = []
    quarantine: list[dict[str, Any]] = []
    unread = 0
    key = sha256 = ""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with path.open("wb") as file, TarWriter(file, "root", "root", 0o444, encoder=False, mtime=0) as tar:
            for planned in plan.samples.to_pylist():
                taken, was_read = fetch(planned)
                if isinstance(taken, Refused):
                    unread += not was_read
                    quarantine.append(quarantine_row(planned, taken))
                    continue
                name = f"{planned['sample_id']:012d}"
                member = {"__key__": name, "jpg": taken.data}
                if planned["label"] != NO_LABEL:
                    member["cls"] = str(planned["label"]).encode()
                tar.write(member)
                samples.append(sample_row(plan, planned, taken, key=name))
        if samples:
            for row, offset in zip(samples, payload_offsets(path), strict=True):
                row["offset"] = offset
            sha256 = file_sha256(path)
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
    return stored_row(root, row_key, reused=False)  # as stored: another task may have been first


def read_samples(root: Store, row: ShardRow) -> Any:
    """The samples of a written shard or indexed tar (SAMPLES), all marked served."""
    return pa.table(json.loads(root.read(row.row_key))["samples"], schema=SAMPLES)


def file_sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def sample_row(plan: ShardPlan, planned: Mapping[str, Any], taken: Taken, *, key: str) -> dict[str, Any]:
    """A row of samples.parquet, but for the offset."""
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
        "key": key,
        "source": planned["path"],
        "split": plan.split,
        "served": True,
        "policy": taken.policy,
    }


def quarantine_row(planned: Mapping[str, Any], refused: Refused) -> dict[str, Any]:
    """A row of quarantine.parquet."""
    row = {"source": planned["path"], "split": planned["split"], "label": planned["label"], "bytes": planned["size"]}
    row |= {"reason": refused.reason, "detail": refused.detail}
    return {name: row[name] for name in QUARANTINE.names}


def stored_row(root: Store, row_key: str, *, reused: bool) -> ShardRow:
    """A row as it is in the store."""
    row = json.loads(root.read(row_key))
    small = {name: row[name] for name in ("shard", "split", "key", "bytes", "sha256")}
    classes = row.get("classes")
    return ShardRow(
        row_key,
        **small,
        samples=len(row["samples"]["sample_id"]),
        quarantine=tuple(row["quarantine"]),
        reused=reused,
        classes=None if classes is None else tuple(classes),
        other_members=row.get("other_members", 0),
    )


def _fetcher(
    plan: ShardPlan, source: str, policy: IntakePolicy, image_column: str
) -> Callable[[Mapping[str, Any]], tuple[Taken | Refused, bool]]:
    """What gives the image of a planned row, taken in or refused, and whether it could be read at all."""
    if not image_column:
        return partial(_fetch, open_store(source), policy=policy)
    images = dict(_taken_rows(plan, source, policy, image_column))
    return lambda planned: (images.pop(planned["path"]), True)


def rows_of(root: Store, keys: Collection[str]) -> dict[str, str]:
    """The key of the row that names each of these tars (`shards/...`), where there is one."""
    wanted, found = set(keys), dict[str, str]()
    for info in root.list("rows/"):
        if len(found) == len(wanted):
            break
        # keys are sorted in a row, so that the tar's comes before the samples
        start = root.read_range(info.key, 0, min(info.size, 512)).decode(errors="replace")
        found |= {key: info.key for key in wanted if f'"{key}"' in start}
    return found


def _fetch(images: Store, planned: Mapping[str, Any], policy: IntakePolicy) -> tuple[Taken | Refused, bool]:
    """The image taken in or refused, and whether it could be read at all. A store that is down raises."""
    if refused := too_many_bytes(planned["size"], policy):
        return refused, True
    try:
        data = images.read(planned["path"])
    except (MissingObject, DeniedObject) as error:
        return Refused("missing" if isinstance(error, MissingObject) else "denied", str(error)), False
    return take_in(data, max_side=policy.image_max_short_side, max_pixels=policy.image_max_pixels), True


def _taken_rows(
    plan: ShardPlan, source: str, policy: IntakePolicy, image_column: str
) -> Iterator[tuple[str, Taken | Refused]]:
    """The images of a plan over Parquet tables, in the order of the files; what is taken in is held until the tar is written."""
    for name, data in read_images(source, plan.samples, image_column):
        refused = data if isinstance(data, Refused) else too_many_bytes(len(data), policy)
        if refused is None and isinstance(data, bytes):
            yield name, take_in(data, max_side=policy.image_max_short_side, max_pixels=policy.image_max_pixels)
        elif refused is not None:
            yield name, refused


def too_many_bytes(size: int, policy: IntakePolicy) -> Refused | None:
    """A refusal of what is too large to be an image of allowed size; it is not even read."""
    limit = 2**20 + 8 * policy.image_max_pixels  # no bitmap of allowed size is larger: 16 bit RGBA
    if size <= limit:
        return None
    return Refused("too_many_bytes", f"{size} bytes, allowed are {limit} (from image_max_pixels)")


def _hashes(snapshot: Any, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64] | None]:
    """The keyed hash of every row and, of Parquet tables, of its row group."""
    hashes = np.empty(snapshot.num_rows, np.uint64)
    groups = np.empty(snapshot.num_rows, np.uint64) if "row_group" in snapshot.column_names else None
    at = 0
    for batch in snapshot.to_batches():
        paths = batch.column("path").to_pylist()
        here = slice(at, at + len(paths))
        hashes[here] = np.fromiter((keyed_hash(seed, path, purpose="shard") for path in paths), np.uint64, len(paths))
        if groups is not None:
            names = (
                f"{split_row_name(path)[0]}#{group}"
                for path, group in zip(paths, batch.column("row_group").to_pylist(), strict=True)
            )
            known = lru_cache(maxsize=64)(partial(keyed_hash, seed, purpose="row_group"))
            groups[here] = np.fromiter((known(name) for name in names), np.uint64, len(paths))
        at = here.stop
    return hashes, groups


def _codes(column: Any) -> tuple[list[str], NDArray[np.int8]]:
    """The distinct texts of a column, and each row's index into them."""
    names: list[str] = pc.unique(column).to_pylist()
    codes = [pc.index_in(chunk, value_set=pa.array(names, column.type)).to_numpy() for chunk in column.chunks]
    return names, np.concatenate([np.empty(0, np.int8), *codes]).astype(np.int8)


def _cut_groups(planned: Int64s, groups: NDArray[np.uint64], *, max_bytes: int, min_parts: int) -> list[int]:
    """Edges between rows that stand row group by row group: between groups where these are small and many, else anywhere."""
    starts = np.flatnonzero(np.diff(groups, prepend=~groups[:1]))
    sizes = np.add.reduceat(planned, starts)
    if 4 * sizes.max() > max_bytes or len(starts) < 4 * min_parts:
        return cut_evenly(planned, max_bytes=max_bytes, min_parts=min_parts)
    samples = np.diff([*starts, len(planned)])
    edges = cut_evenly(sizes, max_bytes=max_bytes, min_parts=min_parts, samples=samples)
    return [int(edge) for edge in np.append(starts, len(planned))[edges]]
