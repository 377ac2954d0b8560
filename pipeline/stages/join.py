"""Join: the parts of a dataset, each sharded by itself, under one manifest. No image is read or written.

Shards are numbered through, part by part; a sample's id is moved by what the parts before it list; classes are united and
labels follow. Of exact duplicates in one split the lowest id is served, so the older part's. Keys are relative to the
store's root, where all steps lie (`<step>/shards/...`); the fact `keys_from` says so.
Memory: 90 bytes a sample, for the duplicates. Errors: DataError when a part is damaged or counts do not add up."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.dataset.dataset_writer import StoredShard, publish, relabelled
from pipeline.data.dataset.manifest import MANIFEST_FILES, Manifest
from pipeline.data.sources.splits import class_order
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """What is joined."""

    source: str
    """Where the images came from."""
    snapshots: tuple[str, ...]
    """Names of the parts, oldest first."""


@dataclass(frozen=True)
class DatasetPart:
    """One part, and what becomes of its numbers in the whole."""

    manifest: Manifest
    directory: str
    """Of its step, in the store."""
    first_id: int
    first_shard: int
    labels: Sequence[int]
    """New label of each of its classes."""

    def samples(self, shard: int) -> Any:
        """A shard's samples (SAMPLES), numbered for the whole; `served` is the part's own."""
        table = self.manifest.stored_samples(shard)
        changed = {
            "sample_id": pc.add(table.column("sample_id"), self.first_id),
            "shard": pa.array([self.first_shard + shard] * table.num_rows, pa.int32()),
            "label": relabelled(table.column("label"), self.labels),
        }
        for name, column in changed.items():
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    def shards(self) -> Iterator[StoredShard]:
        """Its shards, in terms of the whole."""
        for line in self.manifest.all_shards().drop_columns(["served"]).to_pylist():
            key = line["key"] if "://" in line["key"] else f"{self.directory}/{line['key']}"
            changed = {"shard": self.first_shard + line["shard"], "key": key}
            yield StoredShard(line | changed, partial(self.samples, line["shard"]))

    def quarantine(self) -> Any:
        """Rows of quarantine.parquet (QUARANTINE)."""
        table = self.manifest.quarantine()
        labels = relabelled(table.column("label"), self.labels)
        return table.set_column(table.column_names.index("label"), "label", labels)


def join(config: JoinConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Writes one manifest over all parts; facts as a shard step's, and `parts`, `keys_from`, `duplicates_across_parts`."""
    manifests = [Manifest.open(part.store, part.root) for _, part in sorted(inputs.items())]
    parts = arrange(manifests, [part.root_uri.rpartition("/")[2] for _, part in sorted(inputs.items())])
    classes = united([manifest.classes for manifest in manifests])
    quarantine = pa.concat_tables([part.quarantine() for part in parts])
    listed: Counter[str] = Counter()
    for manifest in manifests:
        listed.update({split: count["listed"] for split, count in manifest.counts["splits"].items()})
    facts = publish(
        attempt.store,
        [shard for part in parts for shard in part.shards()],
        quarantine=quarantine.sort_by([("split", "ascending"), ("source", "ascending")]),
        listed=listed,
        classes=classes,
        policy=manifests[0].policy,
    )
    before = sum(manifest.counts["total"]["duplicates"] for manifest in manifests)
    facts |= {
        "duplicates_across_parts": facts["counts"]["total"]["duplicates"] - before,
        "parts": {name: dict(m.counts["total"]) for name, m in zip(config.snapshots, manifests, strict=True)},
        "keys_from": "store",
    }
    return StageResult(facts, MANIFEST_FILES)


def arrange(manifests: Sequence[Manifest], directories: Sequence[str]) -> list[DatasetPart]:
    """The parts, each numbered after those before it."""
    classes = united([manifest.classes for manifest in manifests])
    label_of = {name: label for label, name in enumerate(classes)}
    parts: list[DatasetPart] = []
    first_id = first_shard = 0
    for manifest, directory in zip(manifests, directories, strict=True):
        labels = [label_of[name] for name in manifest.classes]
        parts.append(DatasetPart(manifest, directory, first_id, first_shard, labels))
        first_id += manifest.counts["total"]["listed"]
        first_shard += max(manifest.shard_numbers, default=-1) + 1
    return parts


def united(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The classes of all parts in the order that one listing of everything would give them."""
    return class_order({name for names in classes for name in names})
