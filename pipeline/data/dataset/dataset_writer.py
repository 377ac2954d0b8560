"""Put a dataset's shards under one manifest: mark exact duplicates, count near duplicates, and return the facts.

Memory: that of both searches, see duplicates.py and near_duplicates.py. Errors: those of the manifest."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.dataset.duplicates import Contradictions, Copies, Sample, find_duplicates
from pipeline.data.dataset.facts import ContradictionFacts, CopyFacts, DatasetFacts, LabelledImage, QuarantinedImage
from pipeline.data.dataset.manifest import write_manifest
from pipeline.data.dataset.near_duplicates import NearDuplicateSearch, near_duplicate_facts
from pipeline.data.dataset.schema import NO_LABEL, SHARDS, QuarantineTable, SampleRow, SampleTable, ShardRow
from pipeline.data.dataset.thumbnails import StoredImages
from pipeline.data.images.intake import REENCODED, REPAIRED
from pipeline.storage import Store

_EXAMPLES = 10


@dataclass(frozen=True)
class StoredShard:
    """A shard that is stored somewhere, with ids, labels and number as in the whole dataset."""

    row: ShardRow
    """Its row of shards.parquet; `served` is not known yet and ignored."""
    samples: Callable[[], SampleTable]
    """Reads its samples; `served` is ignored here too."""


def publish(
    store: Store,
    shards: Sequence[StoredShard],
    *,
    root: Store,
    quarantine: QuarantineTable,
    listed: Mapping[str, int],
    classes: Sequence[str],
    policy: Mapping[str, int],
) -> DatasetFacts:
    """Write the manifest and return the dataset's facts. Samples are read several times rather than kept in memory.

    `root`: what the shards' keys are relative to; images that may be near duplicates are read from there again.
    `quarantine` is sorted by split and source; `listed` has the images of each split.
    """
    # a pass of its own: which copy is served is known only when every shard has been seen
    copies = find_duplicates((one.row["shard"], one.row["split"], one.samples()) for one in shards)
    near = NearDuplicateSearch()
    samples_of = {one.row["shard"]: one.samples for one in shards}
    policies: Counter[str] = Counter()

    def marked(row: ShardRow) -> SampleTable:
        samples = copies.mark(row["shard"], samples_of[row["shard"]]())
        policies.update(samples.column("policy").to_pylist())
        return samples

    # known before the second pass, because shards.parquet is passed as a whole while the samples are a stream
    rows: list[ShardRow] = [
        {**one.row, "served": one.row["samples"] - len(copies.within.get(one.row["shard"], ()))} for one in shards
    ]
    facts = write_manifest(
        store,
        # the search for near duplicates collects its hashes on the way, which saves a third pass over the samples
        samples=(near.add(row["shard"], row["split"], marked(row)) for row in rows),
        shards=pa.Table.from_pylist(rows, schema=SHARDS),
        quarantine=quarantine,
        listed=listed,
        classes=classes,
        policy=policy,
    )

    def samples(shard: int) -> SampleTable:
        return samples_of[shard]()

    images = StoredImages(root, {row["shard"]: row["key"] for row in rows}, samples)
    examples = quarantine.slice(0, _EXAMPLES).select(["source", "reason"]).to_pylist()
    return replace(
        facts,
        quarantined=quarantine.num_rows,
        bad_share=quarantine.num_rows / max(1, sum(listed.values())),
        quarantine_reasons=dict(Counter(quarantine.column("reason").to_pylist()).most_common()),
        quarantine_examples=tuple(QuarantinedImage(**example) for example in examples),
        duplicates_across_splits=copies.copies.across,
        copies=copy_facts(copies.copies, samples, classes=classes),
        repaired=repaired_images(policies),
        contradicting_labels=contradiction_facts(copies.contradictions, samples, classes=classes),
        near_duplicates_across_splits=near_duplicate_facts(near.find(images), samples, classes=classes),
    )


def repaired_images(policies: Mapping[str, int]) -> int:
    """Return how many images were repaired. `policies`: policy -> samples."""
    return sum(
        count for policy, count in policies.items() if policy.startswith(REENCODED) and policy.endswith(REPAIRED)
    )


def contradiction_facts(
    found: Contradictions, samples_of: Callable[[int], SampleTable], *, classes: Sequence[str]
) -> ContradictionFacts:
    """Name the examples of images with several labels."""

    examples = _named(found.examples, samples_of, classes=classes)
    return ContradictionFacts(images=found.images, copies=found.copies, examples=examples)


def copy_facts(found: Copies, samples_of: Callable[[int], SampleTable], *, classes: Sequence[str]) -> CopyFacts:
    """Name the examples of images that are in several splits."""
    examples = _named(found.examples, samples_of, classes=classes)
    return CopyFacts(images=found.images, across=found.across, conflicting=found.conflicting, examples=examples)


def _named(
    pairs: Sequence[tuple[Sample, Sample]], samples_of: Callable[[int], SampleTable], *, classes: Sequence[str]
) -> tuple[tuple[LabelledImage, LabelledImage], ...]:
    def named(sample: Sample) -> LabelledImage:
        samples = samples_of(sample.shard)
        rows: list[SampleRow] = samples.filter(pc.equal(samples.column("sample_id"), sample.sample_id)).to_pylist()
        label = rows[0]["label"]
        return LabelledImage(source=rows[0]["source"], label="" if label == NO_LABEL else classes[label])

    return tuple((named(one), named(other)) for one, other in pairs)


def relabel(column: pa.ChunkedArray, labels: Sequence[int]) -> pa.Array:
    """Translate the labels of a part into labels of the whole. `labels`: the new label of each of the part's classes."""
    # NO_LABEL is -1, which as an index would be the last class
    new = [NO_LABEL if label == NO_LABEL else labels[label] for label in column.to_pylist()]
    return pa.array(new, pa.int32())


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Return the table with these columns replaced."""
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table
