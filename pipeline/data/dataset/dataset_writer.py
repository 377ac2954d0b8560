"""A dataset's shards under one manifest: exact duplicates marked, near duplicates counted, facts for the receipt.

Memory: see duplicates.py and near_duplicates.py. Errors: those of the manifest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.data.dataset.duplicates import find_duplicates
from pipeline.data.dataset.manifest import NO_LABEL, SHARDS, write_manifest
from pipeline.data.dataset.near_duplicates import NearDuplicateSearch, near_duplicate_facts
from pipeline.storage import Store

_EXAMPLES = 10


@dataclass(frozen=True)
class StoredShard:
    """A shard that lies somewhere, in terms of the whole dataset."""

    line: Mapping[str, Any]
    """Its row of shards.parquet, but for `served`."""
    samples: Callable[[], Any]
    """Reads its samples (SAMPLES); `served` is found here."""


def publish(
    store: Store,
    shards: Sequence[StoredShard],
    *,
    quarantine: Any,
    listed: Mapping[str, int],
    classes: Sequence[str],
    policy: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the manifest; facts of `write_manifest` and what was found in the images. Samples are read twice.

    `quarantine`: rows (QUARANTINE), sorted by split and source; `listed`: images of each split.
    """
    copies = find_duplicates((one.line["shard"], one.line["split"], one.samples()) for one in shards)
    near = NearDuplicateSearch()
    samples_of = {one.line["shard"]: one.samples for one in shards}
    lines = [
        {**one.line, "served": one.line["samples"] - len(copies.within.get(one.line["shard"], ()))} for one in shards
    ]
    facts = write_manifest(
        store,
        samples=(
            near.shown(line["shard"], line["split"], copies.mark(line["shard"], samples_of[line["shard"]]()))
            for line in lines
        ),
        shards=pa.Table.from_pylist(lines, schema=SHARDS),
        quarantine=quarantine,
        listed=listed,
        classes=classes,
        policy=policy,
    )
    examples = quarantine.slice(0, _EXAMPLES).select(["source", "reason"]).to_pylist()
    return facts | {
        "quarantined": quarantine.num_rows,
        "bad_share": quarantine.num_rows / max(1, sum(listed.values())),
        "quarantine_examples": examples,
        "duplicates_across_splits": copies.across,
        "near_duplicates_across_splits": near_duplicate_facts(near.find(), lambda number: samples_of[number]()),
    }


def relabelled(column: Any, labels: Sequence[int]) -> Any:
    """Labels of a part (an Arrow column) as labels of the whole; `labels`: the new one of each of its classes."""
    new = [NO_LABEL if label == NO_LABEL else labels[label] for label in column.to_pylist()]
    return pa.array(new, pa.int32())
