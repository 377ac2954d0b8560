"""Join: one manifest over the parts of a dataset, each of which has its own shards. No image is written; those that may be near
duplicates are read.

Shards are numbered consecutively, part by part; a sample's id is offset by the number of images that earlier parts list;
classes are united and labels follow. Of exact duplicates in one split the lowest id is served, which is the older part's. Keys
are relative to the store's root, where all steps are (`<step>/shards/...`); the fact `keys_from` says so.
Memory: 110 bytes per sample, for the duplicates. Errors: DataError when a part is damaged or counts do not add up."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.dataset.address import is_indexed
from pipeline.data.dataset.dataset_writer import StoredShard, publish, relabel, with_columns
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.dataset.manifest import MANIFEST_FILES, Manifest
from pipeline.data.dataset.schema import QuarantineTable, SampleTable, ShardRow
from pipeline.data.sharding.shard_record import others_together
from pipeline.data.sources.splits import class_order
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.storage import open_store

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which parts are joined."""

    source: str
    """Folder or s3:// prefix that the parts list."""
    snapshots: tuple[str, ...]
    """Names of the parts, oldest first."""


@dataclass(frozen=True)
class DatasetPart:
    """One part, with the offsets of its ids, shards and labels in the whole dataset."""

    manifest: Manifest
    directory: str
    """Its step's directory in the store."""
    first_id: int
    first_shard: int
    labels: Sequence[int]
    """The new label of each of its classes."""

    def samples(self, shard: int) -> SampleTable:
        """Return a shard's samples, numbered for the whole; `served` is still the part's own."""
        table = self.manifest.stored_samples(shard)
        return with_columns(
            table,
            {
                "sample_id": pc.add(table.column("sample_id"), self.first_id),
                "shard": pa.array([self.first_shard + shard] * table.num_rows, pa.int32()),
                "label": relabel(table.column("label"), self.labels),
            },
        )

    def shards(self) -> Iterator[StoredShard]:
        """Yield its shards, numbered for the whole."""
        rows: list[ShardRow] = self.manifest.all_shards().to_pylist()
        for row in rows:
            key = row["key"] if is_indexed(row["key"]) else f"{self.directory}/{row['key']}"
            moved: ShardRow = {**row, "shard": self.first_shard + row["shard"], "key": key}
            yield StoredShard(moved, partial(self.samples, row["shard"]))

    def quarantine(self) -> QuarantineTable:
        """Return its rows of quarantine.parquet, with labels of the whole."""
        table = self.manifest.quarantine()
        return with_columns(table, {"label": relabel(table.column("label"), self.labels)})


def join(config: JoinConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Write one manifest over all parts. The facts are those of a shard step, and the fields of DatasetFacts for joins."""
    # by name, which is oldest first: part0001, part0002, ...
    manifests = [Manifest.open(part.store, part.root) for _, part in sorted(inputs.items())]
    parts = arrange(manifests, [part.root_uri.rpartition("/")[2] for _, part in sorted(inputs.items())])
    quarantine = pa.concat_tables([part.quarantine() for part in parts])
    listed: Counter[str] = Counter()
    for manifest in manifests:
        listed.update({split: count.listed for split, count in manifest.counts.splits.items()})
    facts = publish(
        attempt.store,
        [shard for part in parts for shard in part.shards()],
        root=open_store(attempt.root_uri.rpartition("/")[0]),
        quarantine=quarantine.sort_by([("split", "ascending"), ("source", "ascending")]),
        listed=listed,
        classes=unite([manifest.classes for manifest in manifests]),
        # one run has one policy, so any part will do
        policy=manifests[0].policy,
    )
    # each part has already counted the duplicates among its own images
    before = sum(manifest.counts.total.duplicates for manifest in manifests)
    made = [DatasetFacts.read(part.facts) for part in inputs.values()]
    others = others_together(made) if any(part.other_members is not None for part in made) else {}
    facts = replace(
        facts,
        duplicates_across_parts=facts.counts.total.duplicates - before,
        parts={name: manifest.counts.total for name, manifest in zip(config.snapshots, manifests, strict=True)},
        keys_from="store",
        **others,
    )
    return StageResult(facts.as_json(), MANIFEST_FILES)


def arrange(manifests: Sequence[Manifest], directories: Sequence[str]) -> list[DatasetPart]:
    """Return the parts, each numbered after those before it."""
    label_of = {name: label for label, name in enumerate(unite([manifest.classes for manifest in manifests]))}
    parts: list[DatasetPart] = []
    first_id = first_shard = 0
    for manifest, directory in zip(manifests, directories, strict=True):
        labels = [label_of[name] for name in manifest.classes]
        parts.append(DatasetPart(manifest, directory, first_id, first_shard, labels))
        # listed and not stored: quarantined images keep their numbers
        first_id += manifest.counts.total.listed
        # numbers and not a count: a shard whose images were all refused has a number but no row
        first_shard += max(manifest.shard_numbers, default=-1) + 1
    return parts


def unite(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the classes of all parts in the order that one listing of everything would give them."""
    return class_order({name for names in classes for name in names})
