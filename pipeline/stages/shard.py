"""Shard: write the images of a snapshot into tars, one task per shard, and the manifest over them.

Output: shards/ and rows/ under the step's root (content-addressed, shared by all generations), and the manifest's files in
the generation. The images of Parquet tables are written in the same way; tars of other authors stay where they are and are
indexed, one task per tar.
Exact duplicates (equal stored bytes, no other label) within a split are stored but not served, except the one with the lowest
sample id; across splits they are only counted.
Memory of the coordinating process for 10 million images: see docs/data.md.
Errors: DataError when more than `bad_share_stop` of the images are bad, or counts do not add up."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.tasks import map_tasks
from pipeline.data.dataset.dataset_writer import StoredShard, publish, relabel, with_columns
from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.dataset.manifest import MANIFEST_FILES
from pipeline.data.dataset.schema import NO_LABEL, QUARANTINE, QuarantineRow, SampleTable, ShardRow, SnapshotTable
from pipeline.data.images.intake import IntakePolicy
from pipeline.data.sharding.shard_plan import ShardPlan, ShardPlans, open_snapshot, plan_shards, plan_tars
from pipeline.data.sharding.shard_record import ShardResult, others_together, read_samples
from pipeline.data.sharding.shard_writer import check_bad_share, write_shard
from pipeline.data.sharding.tar_index import index_tar
from pipeline.data.sources.labels import CLASSES_MAX
from pipeline.data.sources.listing import MOVED
from pipeline.data.sources.splits import class_order
from pipeline.errors import ConfigError, DataError
from pipeline.graph.step import ADDED_LATER, Attempt, StageInput, StageResult
from pipeline.storage import Store

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardStageConfig(IntakePolicy):
    """Everything that decides the shards' bytes, including the intake policy."""

    source: str
    """Folder or s3:// prefix that the snapshot lists."""
    seed: int
    """Key of the random assignment of samples to shards."""
    shard_max_bytes: int
    """Largest planned size of a shard; 134217728 is customary."""
    min_shards: int = 16
    """Smallest number of shards of the train split, if it has that many samples."""
    image_column: str = field(default="image", metadata=ADDED_LATER)
    """Parquet tables only."""
    label_column: str | None = field(default="label", metadata=ADDED_LATER)
    """Tars only: the field of a sample's .json that holds its label, if it has no .cls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shard_max_bytes", "min_shards"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not positive: write a whole number from 1")


def shard(config: ShardStageConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Plan the shards, write or index those that are missing, mark duplicates, and write the manifest."""
    listing = inputs["snapshot"]
    moved = attempt.options.get(MOVED)
    # no fingerprint changes: the files are the same ones at another address
    config = replace(config, source=moved["source"]) if moved else config
    policy = IntakePolicy.of(config)
    listed_facts = SnapshotFacts.read(listing.facts)
    indexes = listed_facts.kind == "tars"
    with open_snapshot(listing.store) as snapshot:
        results = _write_all(config, listed_facts.kind, snapshot, policy, attempt)
    classes = _classes(results) if indexes else listed_facts.classes
    shards = _number(results, classes)
    listed = _listed(results) if indexes else listed_facts.splits
    # sorted: tasks end in any order, and the table is part of the digest
    bad = sorted((row for one in shards for row in one.quarantine), key=lambda row: (row["split"], row["source"]))
    # again, although tasks were checked as they ended: only now is the total of tars known
    check_bad_share(sum(listed.values()), bad, bad_share_stop=attempt.options["bad_share_stop"])
    facts = publish(
        attempt.store,
        # a shard whose images were all refused has a record but no tar
        [StoredShard(one.row, partial(one.samples, attempt.root)) for one in shards if one.result.samples],
        root=attempt.root,
        quarantine=pa.Table.from_pylist(bad, schema=QUARANTINE),
        listed=listed,
        classes=classes,
        policy=asdict(policy),
    )
    if indexes:
        facts = replace(facts, **others_together(results))
    reused = sum(result.reused for result in results)
    return StageResult(facts.as_json(), MANIFEST_FILES, notes={"reused_shards": reused})


@dataclass(frozen=True)
class _NumberedShard:
    """A finished shard, with the ids and labels that its samples have in the whole dataset."""

    result: ShardResult
    first_id: int
    labels: tuple[int, ...] | None
    """The label of each class of an indexed tar; None for a written shard, whose labels are the dataset's already."""

    @property
    def row(self) -> ShardRow:
        """Its row of shards.parquet, as if every sample were served."""
        result = self.result
        return {
            "shard": result.shard,
            "key": result.key,
            "bytes": result.bytes,
            "samples": result.samples,
            "served": result.samples,
            "sha256": result.sha256,
            "split": result.split,
        }

    @property
    def quarantine(self) -> Iterator[QuarantineRow]:
        """Its rows of quarantine.parquet."""
        for row in self.result.quarantine:
            if self.labels is None or row["label"] == NO_LABEL:
                yield row
            else:
                yield {**row, "label": self.labels[row["label"]]}

    def samples(self, root: Store) -> SampleTable:
        """Read its rows of samples.parquet."""
        table = read_samples(root, self.result)
        if self.labels is None:
            return table
        ids = pc.add(table.column("sample_id"), self.first_id)
        return with_columns(table, {"sample_id": ids, "label": relabel(table.column("label"), self.labels)})


def _number(results: Sequence[ShardResult], classes: Sequence[str]) -> list[_NumberedShard]:
    """Number the samples of tars consecutively, tar by tar.

    Quarantined samples have a number too, so that the ids of the others do not depend on what was refused.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    shards, first_id = [], 0
    for result in results:
        labels = None if result.classes is None else tuple(label_of[name] for name in result.classes)
        shards.append(_NumberedShard(result, first_id, labels))
        first_id += result.samples + len(result.quarantine)
    return shards


def _classes(results: Sequence[ShardResult]) -> tuple[str, ...]:
    names = {name for result in results for name in result.classes or ()}
    if len(names) > CLASSES_MAX:
        raise DataError(
            f"the tars have {len(names)} distinct labels, too many to be classes. Set data.label_column to another field, or to "
            "null for no labels"
        )
    return class_order(names)


def _listed(results: Sequence[ShardResult]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for result in results:
        counts[result.split] += result.samples + len(result.quarantine)
    return dict(counts)


def _write_all(
    config: ShardStageConfig, kind: str, snapshot: SnapshotTable, policy: IntakePolicy, attempt: Attempt
) -> list[ShardResult]:
    """Run the tasks, and stop as soon as there are too many bad images for the remaining ones to make up for."""
    plans, write, unit = _work(config, kind, snapshot, policy, attempt.root_uri)
    listed = snapshot.num_rows
    done = 0
    bad: list[QuarantineRow] = []

    def on_done(index: int, result: ShardResult) -> None:
        nonlocal done
        done += plans.samples(index)
        bad.extend(result.quarantine)
        attempt.progress.update(done, listed, unit=unit, quarantined=len(bad))
        if result.classes is None:  # of tars it is not known yet how many samples the others hold
            check_bad_share(listed, bad, bad_share_stop=attempt.options["bad_share_stop"])

    return map_tasks(write, plans, executor=attempt.executor, on_done=on_done)


def _work(
    config: ShardStageConfig, kind: str, snapshot: SnapshotTable, policy: IntakePolicy, root_uri: str
) -> tuple[ShardPlans, Callable[[ShardPlan], ShardResult], str]:
    """Return the plans, the function that a task calls with a plan, and the unit of a plan's rows."""
    if kind == "tars":
        index = partial(
            index_tar, source=config.source, root_uri=root_uri, policy=policy, label_field=config.label_column
        )
        return plan_tars(snapshot, policy=policy, label_field=config.label_column), index, "tars"
    # only with tables: an empty name keeps the column out of the shards' digests
    column = config.image_column if kind == "Parquet tables" else ""
    plans = plan_shards(
        snapshot,
        seed=config.seed,
        shard_max_bytes=config.shard_max_bytes,
        min_shards=config.min_shards,
        policy=policy,
        image_column=column,
    )
    write = partial(write_shard, source=config.source, root_uri=root_uri, policy=policy, image_column=column)
    return plans, write, "images"
