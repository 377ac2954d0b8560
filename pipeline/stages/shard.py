"""Shard: the images of a snapshot into tars, by one task a shard, and the manifest over them.

Output: shards/ and rows/ under the step's root (content-addressed, shared by all generations), the manifest's files in
the generation. Exact duplicates (equal stored bytes) within a split are stored and not served, save the one with the
lowest sample id; across splits they are counted in the facts only.
Errors: DataError when more than `bad_share_stop` of the images are bad, or counts do not add up."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cluster import map_tasks
from pipeline.data.manifest import MANIFEST_FILES, QUARANTINE, SHARDS, write_manifest
from pipeline.data.shards import (
    IntakePolicy,
    ShardPlan,
    ShardRow,
    check_bad_share,
    plan_shards,
    read_samples,
    write_shard,
)
from pipeline.errors import ConfigError
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.storage import Store

VERSION = 1
_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class ShardStageConfig:
    """What decides the shards' bytes."""

    source: str
    """Folder or s3:// prefix that the snapshot listed."""
    seed: int
    """Key of the random order of samples over shards."""
    shard_max_bytes: int
    """Planned size of a shard at most; 134217728 is customary."""
    min_shards: int = 16
    """Of the train split, if it has so many samples."""
    image_max_short_side: int = 512
    """Pixels; a longer short side is reduced to this."""
    image_max_pixels: int = 100_000_000
    """Images with more are refused before decoding."""

    def __post_init__(self) -> None:
        for name in ("shard_max_bytes", "min_shards", "image_max_short_side", "image_max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive: write a whole number from 1")


def shard(config: ShardStageConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Plans, writes what is missing, marks duplicates, writes the manifest."""
    listing = inputs["snapshot"]
    snapshot = pq.read_table(io.BytesIO(listing.store.read("snapshot.parquet")))
    policy = IntakePolicy(image_max_short_side=config.image_max_short_side, image_max_pixels=config.image_max_pixels)
    limits = {"shard_max_bytes": config.shard_max_bytes, "min_shards": config.min_shards}
    plans = plan_shards(snapshot, seed=config.seed, **limits, policy=policy)
    rows = _write_all(plans, config.source, policy, attempt, listed=snapshot.num_rows)
    bad = sorted((line for row in rows for line in row.quarantine), key=lambda line: (line["split"], line["source"]))
    check_bad_share(snapshot.num_rows, bad, bad_share_stop=attempt.resources["bad_share_stop"])

    filled = [row for row in rows if row.samples]
    copies = find_duplicates(attempt.root, filled)
    shards = [_shard_line(row, copies.within) for row in filled]
    facts = write_manifest(
        attempt.store,
        samples=_with_served(attempt.root, filled, copies.within),
        shards=pa.Table.from_pylist(shards, schema=SHARDS),
        quarantine=pa.Table.from_pylist(bad, schema=QUARANTINE),
        listed=listing.facts["splits"],
        classes=listing.facts["classes"],
        policy=asdict(policy),
    )
    facts |= {
        "quarantined": len(bad),
        "bad_share": len(bad) / max(1, snapshot.num_rows),
        "quarantine_examples": [{"source": line["source"], "reason": line["reason"]} for line in bad[:_EXAMPLES]],
        "duplicates_across_splits": copies.across,
    }
    return StageResult(facts, MANIFEST_FILES, notes={"reused_shards": sum(row.reused for row in rows)})


@dataclass(frozen=True)
class Duplicates:
    """Samples whose stored bytes another sample has too."""

    within: Mapping[int, frozenset[int]]
    """Shard -> ids of samples not to be served: a lower id of the same split has the same bytes."""
    across: int
    """Distinct images that stand in more than one split."""


def find_duplicates(root: Store, rows: Sequence[ShardRow]) -> Duplicates:
    """Exact duplicates over all shards; holds about 100 bytes a sample."""
    if not rows:
        return Duplicates(within={}, across=0)
    columns = ["sample_id", "shard", "split", "sha256"]
    table = pa.concat_tables([read_samples(root, row).select(columns) for row in rows])
    first = table.group_by(["split", "sha256"]).aggregate([("sample_id", "min")])
    copies = table.filter(pc.invert(pc.is_in(table.column("sample_id"), value_set=first.column("sample_id_min"))))
    within: dict[int, set[int]] = {}
    for shard_number, sample_id in zip(
        *(copies.column(name).to_pylist() for name in ("shard", "sample_id")), strict=True
    ):
        within.setdefault(shard_number, set()).add(sample_id)
    splits = first.group_by("sha256").aggregate([("split", "count")]).column("split_count")
    return Duplicates(
        within={number: frozenset(ids) for number, ids in within.items()},
        across=pc.sum(pc.greater(splits, 1)).as_py(),
    )


def _write_all(
    plans: Sequence[ShardPlan], source: str, policy: IntakePolicy, attempt: Attempt, *, listed: int
) -> list[ShardRow]:
    """The one line of Ray; stops as soon as too many images are bad for any rest to mend it."""
    root_uri = attempt.root_uri
    done = 0
    bad: list[Mapping[str, Any]] = []

    def write(plan: ShardPlan) -> ShardRow:
        return write_shard(plan, source=source, root_uri=root_uri, policy=policy)

    def on_done(index: int, row: ShardRow) -> None:
        nonlocal done
        done += plans[index].samples.num_rows
        bad.extend(row.quarantine)
        attempt.progress.update(done, listed, unit="images", quarantined=len(bad))
        check_bad_share(listed, bad, bad_share_stop=attempt.resources["bad_share_stop"])

    return map_tasks(write, plans, executor=attempt.executor, on_done=on_done)


def _shard_line(row: ShardRow, copies: Mapping[int, frozenset[int]]) -> dict[str, Any]:
    line = {name: getattr(row, name) for name in SHARDS.names if name != "served"}
    return line | {"served": row.samples - len(copies.get(row.shard, ()))}


def _with_served(root: Store, rows: Sequence[ShardRow], copies: Mapping[int, frozenset[int]]) -> Iterator[Any]:
    """The samples of each shard, duplicates marked."""
    for row in rows:
        table = read_samples(root, row)
        unserved = pa.array(copies.get(row.shard, ()), pa.int64())
        served = pc.invert(pc.is_in(table.column("sample_id"), value_set=unserved))
        yield table.set_column(table.column_names.index("served"), "served", served)
