"""Data that moved: the same files under another address are the same data, so nothing that was made from them is repeated.

An address is part of the fingerprints. If the store has no snapshot of a source, the finished snapshots of other addresses are
compared with it: the same paths and sizes, all of them, and the checksums of a keyed sample of images, taken through the intake as
they were then. If one agrees, the run keeps its address in the configuration, and with it all fingerprints, and reads what it still
has to read from the new one. A copy with one file more or less is other data.
Tars are the exception: training reads them where they lie, so tars that moved are indexed again.
`moved/<snapshot step's directory>.json` remembers the answer, so that only the first run after the move compares everything.
Errors: those of the store. A source that cannot be read is no match, and the checks before the run report it."""

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import Moved, RunConfig
from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.images.intake import Accepted, IntakePolicy, Refused, accept_image
from pipeline.data.snapshots.parts import SNAPSHOT_FILE, EarlierListing, listed_files
from pipeline.data.sources.labels import sha256_of_labels
from pipeline.data.sources.listing import list_source
from pipeline.data.sources.tables import read_images
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.graph.plan import HISTORY
from pipeline.graph.receipts import read_receipt
from pipeline.graph.step import StageInput, Step, canonical
from pipeline.runs.sources.changes import FULL, first_by_key
from pipeline.runs.sources.refresh import newest
from pipeline.runs.workflow import parts_of_sources
from pipeline.storage import Store, open_store
from pipeline.storage.files import local_copy

RECORDS = "moved/"
CHECKSUMS = 16
"""Images per part whose bytes are compared."""
_ROW_GROUPS = 4
"""Shards to which they belong."""


def recorded_addresses(config: RunConfig, store: Store, *, say: Callable[[str], None], record: bool) -> RunConfig:
    """Return the configuration with the recorded addresses of sources that moved. `record`: remember what was found."""
    for section, shards in parts_of_sources(config).items():
        first = shards[0].inputs["snapshot"]
        if read_receipt(store.at(first.directory)) is not None:
            continue
        key = f"{RECORDS}{first.directory}.json"
        known = _read_record(store, key)
        # taken before the comparison: what changes while it runs must count as later
        here = Moved(first.config.source, first.config.labels, known["compared_at"] if known else time.time())
        for source, labels in [(known["source"], known["labels"])] if known else _candidates(first, store):
            candidate = newest(_replaced(config, here, source, labels), store)
            parts = _finished(parts_of_sources(candidate).get(section, []), store)
            if not parts or not (known or _is_same(here, parts, say)):
                continue
            config = candidate
            files = sum(SnapshotFacts.read(listing.facts).listed for _, listing, _ in parts)
            say(
                f"{section}.source {here.source} holds the data that were listed at {source} ({files} images): the run goes on "
                "under that address's fingerprints and repeats nothing"
            )
            if record and not known:
                with contextlib.suppress(StorageError):  # only the next run pays, with another comparison
                    body = {"source": source, "labels": labels, "compared_at": here.compared_at}
                    store.create(key, json.dumps(body).encode())
            break
    return config


def _read_record(store: Store, key: str) -> dict[str, Any] | None:
    return dict(json.loads(store.read(key))) if store.exists(key) else None


def _candidates(first: Step, store: Store) -> Iterator[tuple[str, str | None]]:
    """Yield source and labels of finished snapshots that differ from this one only in where they were listed."""
    wanted = canonical(first.config)
    for info in store.list(f"{HISTORY}{first.name}/"):
        identity = json.loads(store.read(info.key))
        found = identity["config"]
        # no inputs: only a first part decides an address, and later ones follow it
        if identity["version"] == first.version and not identity["inputs"] and _placeless(found) == _placeless(wanted):
            yield found["source"], found.get("labels")


def _placeless(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a snapshot's config without its addresses; only whether there is a labels file counts."""
    return {name: value for name, value in config.items() if name not in ("source", "labels")} | {
        "has labels": config.get("labels") is not None
    }


def _replaced(config: RunConfig, here: Moved, source: str, labels: str | None) -> RunConfig:
    """Put the recorded addresses into every section that names the present ones."""
    data, evaluation = config.data, config.evaluation
    if (data.source, data.labels) == here[:2]:
        data = data.recorded_at(source, labels, now=here)
    datasets = tuple(
        one.recorded_at(source, labels, now=here) if (one.source, one.labels) == here[:2] else one
        for one in evaluation.datasets
    )
    return config.model_copy(update={"data": data, "evaluation": evaluation.model_copy(update={"datasets": datasets})})


_Part = tuple[Step, StageInput, StageInput]
"""A shard step, its snapshot's output and its own."""


def _finished(shards: Sequence[Step], store: Store) -> list[_Part]:
    """The parts, if all of them are listed and sharded; otherwise nothing, since there is little to repeat."""
    parts = []
    for step in shards:
        pair = [(root := store.at(one.directory), read_receipt(root)) for one in (step.inputs["snapshot"], step)]
        made = [receipt.as_input(root.uri) for root, receipt in pair if receipt]
        if len(made) < len(pair):
            return []
        parts.append((step, made[0], made[1]))
    return parts


def _is_same(here: Moved, parts: Sequence[_Part], say: Callable[[str], None]) -> bool:
    """Compare labels, then paths and sizes, then checksums: the cheapest first."""
    facts = [SnapshotFacts.read(listing.facts) for _, listing, _ in parts]
    try:
        if here.labels and sha256_of_labels(here.labels) != facts[-1].labels_sha256:
            return False
        tables = [(path, table.sha256) for one in facts for path, table in (one.label_tables or {}).items()]
        if any(sha256_of_labels(f"{here.source}/{path}") != sha256 for path, sha256 in tables):
            return False
        listed = sum(one.listed for one in facts)
        if listed > FULL:
            say(f"comparing {here.source} with the {listed} files that were listed at {facts[0].source}")
        if not _same_files(here, [listing for _, listing, _ in parts], gone_before=facts[-1].gone or 0):
            return False
        if facts[0].kind == "tars":
            say(
                f"{here.source} holds the tars that were listed at {facts[0].source}. Training reads tars where they lie, so these "
                "are indexed again, and what was trained on the others is trained again"
            )
            return False
        return all(_same_images(here.source, part) for part in parts)
    except (PipelineError, ConfigError, OSError):
        return False


def _same_files(here: Moved, parts: Sequence[StageInput], *, gone_before: int) -> bool:
    """Whether the source holds exactly the listed files; those that were gone already at the last listing may be missing."""
    with tempfile.TemporaryDirectory() as scratch:
        earlier = EarlierListing([listed_files(part, Path(scratch) / str(n)) for n, part in enumerate(parts)])
        files = (item for item in list_source(here.source, besides=here.labels) if item.role != "ignored")
        return (
            # any() reads to the end where nothing is new, and only then may counts() be asked
            not any(earlier.is_new(item.path, item.size) for item in files) and earlier.counts()["gone"] == gone_before
        )


def _same_images(source: str, part: _Part) -> bool:
    """Whether a keyed sample of images gives the stored bytes. A decoder of another version may not: then it is no match."""
    step, listing, shards = part
    stored = _sample_checksums(shards.store)
    policy = IntakePolicy.of(step.config)
    if SnapshotFacts.read(listing.facts).kind == "Parquet tables":
        with tempfile.TemporaryDirectory() as scratch:
            table = local_copy(listing.store, SNAPSHOT_FILE, Path(scratch) / SNAPSHOT_FILE)
            rows = pq.read_table(table, columns=["path", "row_group"], filters=[("path", "in", list(stored))])
        images: Iterator[tuple[str, bytes | Refused]] = read_images(source, rows, step.config.image_column)
    else:
        files = open_store(source)
        images = ((path, files.read(path)) for path in stored)
    sha256 = {path: _stored_sha256(data, policy) for path, data in images}
    # without a single image nothing would be proven
    return bool(stored) and sha256 == stored


def _sample_checksums(manifest: Store) -> dict[str, str]:
    """SHA-256 of the stored bytes of some images, by path in the source."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        pq.ParquetFile(local_copy(manifest, "samples.parquet", Path(scratch) / "samples.parquet")) as table,
    ):
        groups = first_by_key(range(table.num_row_groups), _ROW_GROUPS)
        rows = table.read_row_groups(groups, columns=["source", "sha256"])
    pairs = zip(rows.column("source").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
    return dict(first_by_key(pairs, CHECKSUMS))


def _stored_sha256(data: bytes | Refused, policy: IntakePolicy) -> str:
    image = data if isinstance(data, Refused) else accept_image(data, policy)
    return hashlib.sha256(image.data).hexdigest() if isinstance(image, Accepted) else ""
