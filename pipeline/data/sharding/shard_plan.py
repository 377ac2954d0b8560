"""Which sample goes into which shard: a pure plan over the snapshot, made before any image is read.

In every split the samples are put in the order of a keyed hash of their paths (random, and the same at every retry) and cut
into runs of equal planned bytes. Snapshot, seed and limits alone decide, never the number of tasks.
Parquet tables: row groups are in random order and rows are shuffled within a shard, so that a task reads few row groups; where
row groups are small compared with a shard, none is cut.
Units: bytes. Memory: row numbers and hashes, about 100 bytes per sample; the snapshot is mapped from a scratch file."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.dataset.digests import content_digest, json_digest
from pipeline.data.dataset.schema import NO_LABEL, SnapshotTable
from pipeline.data.images.intake import INTAKE_VERSION, IntakePolicy
from pipeline.data.snapshots.parts import SNAPSHOT_FILE
from pipeline.data.sources.splits import keyed_hash
from pipeline.data.sources.tables import split_row_name
from pipeline.storage import Store
from pipeline.storage.files import local_copy

SHARD_VERSION = 1
"""Part of every plan's digest. Raise it by hand when the tar's bytes or the record change."""
_MAX_SAMPLES = 10_000  # of a shard; small images would fill one by the hundred thousand, and its record is read whole
_BLOCK = 512  # of a tar
_SNAPSHOT_ROWS = 65_536
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written, or one tar to be indexed."""

    shard: int
    split: str
    samples: SnapshotTable
    """Rows of the snapshot, in the order in which the tar will have them."""
    digest: str
    """Of everything that decides the shard's content, except the images' own bytes."""


class ShardPlans(Sequence[ShardPlan]):
    """The plan of a whole dataset. Each shard's plan is made on demand, so memory holds only row numbers."""

    def __init__(
        self,
        snapshot: SnapshotTable,
        runs: Sequence[tuple[str, Int64s]],
        policy: IntakePolicy,
        **reading: str | None,
    ) -> None:
        """`runs`: split and snapshot rows of each shard; `reading`: what else decides how its samples are read."""
        self._snapshot, self._runs, self._policy, self._reading = snapshot, runs, policy, reading
        chunks = snapshot.column("path").chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._batches = snapshot.to_batches()

    def __len__(self) -> int:
        return len(self._runs)

    def samples(self, shard: int) -> int:
        """Return the number of snapshot rows in a shard."""
        return len(self._runs[shard][1])

    @overload
    def __getitem__(self, shard: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, shard: slice) -> list[ShardPlan]: ...
    def __getitem__(self, shard: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(shard, slice):
            return [self[index] for index in range(*shard.indices(len(self)))]
        # through range(): negative numbers work, and IndexError ends an iteration over this Sequence
        shard = range(len(self))[shard]
        split, rows = self._runs[shard]
        samples = self._take(rows)
        content = content_digest(samples, samples.column_names)
        identity = {"shard": shard, "split": split, "samples": content, "policy": asdict(self._policy)}
        digest = json_digest(identity | self._reading | {"versions": [SHARD_VERSION, INTAKE_VERSION]})
        return ShardPlan(shard, split, samples, digest)

    def _take(self, rows: Int64s) -> SnapshotTable:
        """Return rows of the snapshot in this order."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        pieces = []
        # batch by batch, because Table.take would concatenate all batches of the snapshot at every call
        for number in np.unique(np.searchsorted(self._starts, ascending, side="right") - 1):
            first, last = np.searchsorted(ascending, self._starts[number : number + 2])
            pieces.append(self._batches[number].take(pa.array(ascending[first:last] - self._starts[number])))
        # taken in ascending order; the tar has an order of its own
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return pa.Table.from_batches(pieces, schema=self._snapshot.schema).combine_chunks().take(pa.array(inverse))


@contextmanager
def open_snapshot(store: Store) -> Iterator[SnapshotTable]:
    """Open a snapshot as an uncompressed scratch file that is mapped, so the system can reclaim the memory it fills."""
    with tempfile.TemporaryDirectory() as folder:
        path, rows = local_copy(store, SNAPSHOT_FILE, Path(folder) / SNAPSHOT_FILE), Path(folder) / "snapshot.arrow"
        with pq.ParquetFile(path) as table, pa.OSFile(str(rows), "wb") as file:
            schema = table.schema_arrow.remove_metadata()
            with pa.ipc.new_file(file, schema) as writer:
                for batch in table.iter_batches(batch_size=_SNAPSHOT_ROWS):
                    writer.write_batch(batch)
        with pa.memory_map(str(rows)) as mapped:
            yield pa.ipc.open_file(mapped).read_all()


def plan_shards(
    snapshot: SnapshotTable,
    *,
    seed: int,
    shard_max_bytes: int,
    min_shards: int,
    policy: IntakePolicy,
    image_column: str = "",
) -> ShardPlans:
    """Put every sample of the snapshot into exactly one shard; `train` into at least `min_shards`, if it has that many samples.

    A shard's planned bytes exceed `shard_max_bytes` only if it holds a single sample. `image_column`: for Parquet tables.
    """
    hashes, group_hashes = _hashes(snapshot, seed)
    names, splits = _codes(snapshot.column("split"))
    sizes = snapshot.column("size").to_numpy()
    # one block for a member's header, and its data filled up to whole blocks
    planned = _BLOCK + -(-sizes // _BLOCK) * _BLOCK
    # a label is a second member (.cls): a header and a block
    planned += np.where(snapshot.column("label").to_numpy() != NO_LABEL, 2 * _BLOCK, 0)
    runs: list[tuple[str, Int64s]] = []
    for split in sorted(names):
        rows = np.flatnonzero(splits == names.index(split))
        least = min_shards if split == "train" else 1
        if group_hashes is None:
            # stable: rows with equal hashes stay in the order of their paths, on any machine
            rows = rows[np.argsort(hashes[rows], kind="stable")]
            edges = cut_evenly(planned[rows], max_bytes=shard_max_bytes, min_parts=least)
            runs += [(split, rows[start:end]) for start, end in pairwise(edges)]
        else:
            rows = rows[np.lexsort((hashes[rows], group_hashes[rows]))]
            edges = _cut_groups(planned[rows], group_hashes[rows], max_bytes=shard_max_bytes, min_parts=least)
            cut = [rows[start:end] for start, end in pairwise(edges)]
            runs += [(split, run[np.argsort(hashes[run], kind="stable")]) for run in cut]
    # the column enters the digest only where there is one: shards of images keep the digests of older versions
    return ShardPlans(snapshot, runs, policy, **({"image_column": image_column} if image_column else {}))


def plan_tars(snapshot: SnapshotTable, *, policy: IntakePolicy, label_field: str | None) -> ShardPlans:
    """Return one plan per tar (a row of the snapshot), split by split, in path order."""
    splits = snapshot.column("split").to_pylist()
    runs = [(splits[row], np.array([row])) for row in sorted(range(len(splits)), key=lambda row: (splits[row], row))]
    return ShardPlans(snapshot, runs, policy, tar_label_field=label_field)


def cut_evenly(sizes: Int64s, *, max_bytes: int, min_parts: int, samples: Int64s | None = None) -> list[int]:
    """Return edges 0 = e0 < e1 < ... = len(sizes) of runs of about equal bytes; only a run of one item may exceed `max_bytes`.

    `samples`: number of samples per item, 1 if left out; a run of several items has at most 10,000 samples.
    """
    if samples is None:
        samples = np.ones(len(sizes), dtype=np.int64)
    count, total = len(sizes), int(sizes.sum())
    # an item belongs to the part that its middle falls into, so a cut is off by half an item at most
    middles = np.cumsum(sizes) - sizes / 2
    parts = min(count, max(min_parts, -(-total // max_bytes), -(-int(samples.sum()) // _MAX_SAMPLES)))
    # equal cuts of unequal items may overshoot: try with 2 % more parts until none does
    while True:
        steps = np.arange(parts - 1)
        edges = np.searchsorted(middles, total * (steps + 1) / parts)
        edges = np.maximum.accumulate(np.maximum(edges, steps + 1) - steps) + steps  # each run has an item
        edges = np.minimum(edges, count - parts + 1 + steps)  # and leaves one for each run behind
        edges = np.concatenate([[0], edges, [count]])
        too_big = np.add.reduceat(sizes, edges[:-1]) > max_bytes
        too_many = np.add.reduceat(samples, edges[:-1]) > _MAX_SAMPLES
        if parts == count or not ((too_big | too_many) & (np.diff(edges) > 1)).any():
            return [int(edge) for edge in edges]
        parts = min(count, parts + max(1, parts // 50))


def _cut_groups(planned: Int64s, groups: NDArray[np.uint64], *, max_bytes: int, min_parts: int) -> list[int]:
    """Return edges between rows sorted by row group: between groups where these are small and many, else anywhere."""
    # ~: differs from the first group in any case, so that row 0 starts one
    starts = np.flatnonzero(np.diff(groups, prepend=~groups[:1]))
    sizes = np.add.reduceat(planned, starts)
    # large groups cannot be packed evenly, and few of them cannot be spread over enough shards
    if 4 * sizes.max() > max_bytes or len(starts) < 4 * min_parts:
        return cut_evenly(planned, max_bytes=max_bytes, min_parts=min_parts)
    samples = np.diff([*starts, len(planned)])
    edges = cut_evenly(sizes, max_bytes=max_bytes, min_parts=min_parts, samples=samples)
    return [int(edge) for edge in np.append(starts, len(planned))[edges]]


def _hashes(snapshot: SnapshotTable, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64] | None]:
    """Return the keyed hash of every row and, for Parquet tables, of its row group."""
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
            # rows of one group follow each other, so only a few names are in use at a time
            known = lru_cache(maxsize=64)(partial(keyed_hash, seed, purpose="row_group"))
            groups[here] = np.fromiter((known(name) for name in names), np.uint64, len(paths))
        at = here.stop
    return hashes, groups


def _codes(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int8]]:
    """Return the distinct texts of a column, and each row's index into them."""
    names: list[str] = pc.unique(column).to_pylist()
    codes = [pc.index_in(chunk, value_set=pa.array(names, column.type)).to_numpy() for chunk in column.chunks]
    return names, np.concatenate([np.empty(0, np.int8), *codes]).astype(np.int8)
