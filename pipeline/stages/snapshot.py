"""Snapshot: a pinned listing of a source. For images and tars only names and sizes are read, for Parquet tables only the
footers and the columns of labels and splits.

Output: snapshot.parquet, one row per image in path order (SnapshotRow; sample_id = row number, label = index into the fact
`classes`). For tars, one row per tar: labels and samples are found when it is indexed. For tables, one row per table row
(TableSnapshotRow); files.parquet lists the tables themselves.
A snapshot with inputs is a later part of a dataset: it lists what no input lists, by path and size. A file whose size has
changed is listed as new while its older sample stays; the sample of a file that no longer exists stays too. Both are counted.
For memory and 10 million images see docs/data.md.
Errors: those of the source (`sources/listing.py`, `sources/splits.py`), the labels and the tables (`sources/tables.py`)."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipeline.data.snapshots.config import SnapshotConfig, where_it_is
from pipeline.data.snapshots.parts import FILES_FILE, SNAPSHOT_FILE, EarlierListing, listed_files
from pipeline.data.snapshots.writer import take_snapshot
from pipeline.data.sources.labels import sha256_of_labels
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1


def snapshot(config: SnapshotConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """List the source. `inputs`: earlier parts of the dataset, if any."""
    recorded = config.source
    config = where_it_is(config, attempt.options)
    # before the labels are read: if the file changes in between, the next run says so
    labels_sha256 = sha256_of_labels(config.labels) if config.labels else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        earlier = EarlierListing([listed_files(part, folder / name) for name, part in sorted(inputs.items())])
        facts, listing = take_snapshot(config, earlier, folder, attempt.progress)
        files: tuple[str, ...] = (SNAPSHOT_FILE,)
        if facts.kind == "Parquet tables":
            attempt.store.upload(FILES_FILE, listing)
            files = (*files, FILES_FILE)
        attempt.store.upload(SNAPSHOT_FILE, folder / SNAPSHOT_FILE)
    # the recorded address: facts must not depend on where the files are today
    facts = replace(facts, source=recorded, labels_sha256=labels_sha256)
    if inputs:
        counts = earlier.counts()
        facts = replace(facts, known=counts["known"], changed=counts["changed"], gone=counts["gone"])
    return StageResult(facts=facts.as_json(), files=files)
