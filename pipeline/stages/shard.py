"""Shard: the images of a snapshot into tars, by one task a shard, and the manifest over them.

Output: shards/ and rows/ under the step's root (content-addressed, shared by all generations), the manifest's files in
the generation. Images of Parquet tables likewise; tars of others stay where they are and are indexed, by one task a tar.
Exact duplicates (equal stored bytes) within a split are stored and not served, save the one with the lowest sample id;
across splits they are counted in the facts only.
Memory of the coordinating process: 10 million images, see docs/data.md.
Errors: DataError when more than `bad_share_stop` of the images are bad, or counts do not add up."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.tasks import map_tasks
from pipeline.data.dataset.dataset_writer import StoredShard, publish, relabelled
from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.dataset.manifest import MANIFEST_FILES, NO_LABEL, QUARANTINE, SHARDS
from pipeline.data.dataset.shard_plan import IntakePolicy, ShardPlan, ShardPlans, opened_snapshot, plan_shards
from pipeline.data.dataset.shard_writer import ShardRow, check_bad_share, read_samples, write_shard
from pipeline.data.dataset.tar_index import index_tar, plan_tars
from pipeline.data.sources.labels import CLASSES_MAX
from pipeline.data.sources.splits import class_order
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import ADDED_LATER, Attempt, StageInput, StageResult
from pipeline.storage import Store

VERSION = 1


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
    image_column: str = field(default="image", metadata=ADDED_LATER)
    """Of Parquet tables."""
    label_column: str | None = field(default="label", metadata=ADDED_LATER)
    """Of tars: the field of a sample's .json that holds its label, where it has no .cls."""

    def __post_init__(self) -> None:
        for name in ("shard_max_bytes", "min_shards", "image_max_short_side", "image_max_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive: write a whole number from 1")


def shard(config: ShardStageConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Plans, writes or indexes what is missing, marks duplicates, writes the manifest."""
    listing = inputs["snapshot"]
    policy = IntakePolicy(image_max_short_side=config.image_max_short_side, image_max_pixels=config.image_max_pixels)
    listed_facts = SnapshotFacts.read(listing.facts)
    indexes = listed_facts.kind == "tars"
    with opened_snapshot(listing.store, "snapshot.parquet") as snapshot:
        rows = _write_all(config, listing, snapshot, policy, attempt)
    classes = _classes(rows) if indexes else listed_facts.classes
    parts = _parts(rows, classes)
    listed = _listed(rows) if indexes else listed_facts.splits
    bad = sorted((line for part in parts for line in part.quarantine), key=lambda line: (line["split"], line["source"]))
    check_bad_share(sum(listed.values()), bad, bad_share_stop=attempt.options["bad_share_stop"])
    facts = publish(
        attempt.store,
        [StoredShard(_shard_line(part.row), partial(part.samples, attempt.root)) for part in parts if part.row.samples],
        quarantine=pa.Table.from_pylist(bad, schema=QUARANTINE),
        listed=listed,
        classes=classes,
        policy=asdict(policy),
    )
    if indexes:
        facts["other_members"] = sum(row.other_members for row in rows)
    return StageResult(facts, MANIFEST_FILES, notes={"reused_shards": sum(row.reused for row in rows)})


@dataclass(frozen=True)
class _NumberedShard:
    """A shard, with its samples' ids and labels in terms of the whole dataset."""

    row: ShardRow
    first_id: int
    labels: tuple[int, ...] | None
    """Of each class of the tar, its label; None: labels are the dataset's already."""

    @property
    def quarantine(self) -> Iterator[Mapping[str, Any]]:
        """Rows of quarantine.parquet."""
        for line in self.row.quarantine:
            if self.labels is None or line["label"] == NO_LABEL:
                yield line
            else:
                yield dict(line) | {"label": self.labels[line["label"]]}

    def samples(self, root: Store) -> Any:
        """Rows of samples.parquet (SAMPLES)."""
        table = read_samples(root, self.row)
        if self.labels is None:
            return table
        labels = relabelled(table.column("label"), self.labels)
        ids = pc.add(table.column("sample_id"), self.first_id)
        table = table.set_column(table.column_names.index("sample_id"), "sample_id", ids)
        return table.set_column(table.column_names.index("label"), "label", labels)


def _parts(rows: Sequence[ShardRow], classes: Sequence[str]) -> list[_NumberedShard]:
    """Samples of tars are numbered through, tar by tar; quarantined ones have a number too, so that no other's moves."""
    label_of = {name: label for label, name in enumerate(classes)}
    parts, first = [], 0
    for row in rows:
        labels = None if row.classes is None else tuple(label_of[name] for name in row.classes)
        parts.append(_NumberedShard(row, first, labels))
        first += row.samples + len(row.quarantine)
    return parts


def _classes(rows: Sequence[ShardRow]) -> tuple[str, ...]:
    names = {name for row in rows for name in row.classes or ()}
    if len(names) > CLASSES_MAX:
        raise DataError(
            f"the tars have {len(names)} distinct labels, which are no classes. Name another data.label_column, or null for none"
        )
    return class_order(names)


def _listed(rows: Sequence[ShardRow]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row.split] += row.samples + len(row.quarantine)
    return dict(counts)


def _write_all(
    config: ShardStageConfig, listing: StageInput, snapshot: Any, policy: IntakePolicy, attempt: Attempt
) -> list[ShardRow]:
    """The one line of Ray; stops as soon as too many images are bad for any rest to mend it."""
    plans, write, unit = _work(config, SnapshotFacts.read(listing.facts).kind, snapshot, policy, attempt.root_uri)
    listed = snapshot.num_rows
    done = 0
    bad: list[Mapping[str, Any]] = []

    def on_done(index: int, row: ShardRow) -> None:
        nonlocal done
        done += plans.samples(index)
        bad.extend(row.quarantine)
        attempt.progress.update(done, listed, unit=unit, quarantined=len(bad))
        if row.classes is None:  # how many samples the other tars hold is not known yet
            check_bad_share(listed, bad, bad_share_stop=attempt.options["bad_share_stop"])

    return map_tasks(write, plans, executor=attempt.executor, on_done=on_done)


def _work(
    config: ShardStageConfig, kind: str, snapshot: Any, policy: IntakePolicy, root_uri: str
) -> tuple[ShardPlans, Callable[[ShardPlan], ShardRow], str]:
    """The plans, what a task does with one, and what they count."""
    where: dict[str, Any] = {"source": config.source, "root_uri": root_uri, "policy": policy}
    if kind == "tars":
        plans = plan_tars(snapshot, policy=policy, label_field=config.label_column)
        return plans, partial(index_tar, **where, label_field=config.label_column), "tars"
    column = config.image_column if kind == "Parquet tables" else ""
    plans = plan_shards(
        snapshot,
        seed=config.seed,
        shard_max_bytes=config.shard_max_bytes,
        min_shards=config.min_shards,
        policy=policy,
        image_column=column,
    )
    return plans, partial(write_shard, **where, image_column=column), "images"


def _shard_line(row: ShardRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in SHARDS.names if name != "served"}
