"""Verify a finished dataset as a whole: every byte of every shard is read, as tasks, and nothing is written.

Each finding names the objects to delete, after which the same `mae run` makes these and only these again. A shard that its row
still names is not written again, and a step that has its receipt does not run, so shard, row and receipt go together.
`pipeline.data.dataset.integrity` has the checks of a single shard.
Errors: DataError when there is no finished dataset; StorageError when a store is down."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.cluster.progress import Progress
from pipeline.cluster.tasks import Executor, map_tasks
from pipeline.data.dataset.address import DatasetAddress, is_indexed
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.dataset.integrity import (
    Finding,
    Labels,
    ShardReport,
    Verification,
    check_shard,
    check_totals,
    name_swapped,
)
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.dataset.schema import SampleRow, ShardRow
from pipeline.data.sharding.shard_record import find_records
from pipeline.errors import DataError
from pipeline.graph.receipts import RECEIPT
from pipeline.runs.finished.datasets import FinishedDataset
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.files import file_sha256, local_copy

SHARDS_FOLDER = "shards/"


def verify(dataset: FinishedDataset, *, executor: Executor, progress: Progress) -> Verification:
    """Read everything. If tables are damaged, report only these: shards cannot be judged by them."""
    digest = DatasetFacts.read(dataset.receipt.facts).digest
    result = partial(Verification, dataset.receipt.step, dataset.step_uri, digest)
    if findings := list(_table_findings(dataset)):
        return result(0, 0, 0, tuple(findings))
    try:
        manifest = dataset.address.open()
    except DataError as error:
        return result(0, 0, 0, (_table_finding(dataset, dataset.address.manifest_uri, str(error)),))
    shards: list[ShardRow] = manifest.all_shards().to_pylist()
    labels: Labels = "other" if dataset.joined else "numbers"
    reports = _check_all(dataset.address, shards, labels, executor=executor, progress=progress)
    reports = name_swapped(shards, reports)
    step = open_store(dataset.step_uri)
    findings = [finding for report in reports for finding in report.findings]
    findings = _with_repairs(manifest.root, shards, findings)
    where = f"{dataset.address.manifest_uri}/manifest.json"
    findings += [
        _repaired_by_manifest(finding, step) for finding in check_totals(shards, reports, manifest.counts, where)
    ]
    findings += _orphans(manifest.root, [shard["key"] for shard in shards])
    samples, read = sum(report.samples for report in reports), sum(report.bytes for report in reports)
    return result(len(shards), samples, read, tuple(findings))


def _check_all(
    address: DatasetAddress, shards: Sequence[ShardRow], labels: Labels, *, executor: Executor, progress: Progress
) -> list[ShardReport]:
    total = sum(shard["samples"] for shard in shards)
    done = damages = 0

    def on_done(index: int, report: ShardReport) -> None:
        nonlocal done, damages
        done += report.samples
        damages += len(report.findings)
        progress.update(done, total, unit="images", damages=damages)

    return map_tasks(partial(_check, address, labels), shards, executor=executor, on_done=on_done)


def _check(address: DatasetAddress, labels: Labels, shard: ShardRow) -> ShardReport:
    manifest = _opened(address)
    samples: list[SampleRow] = manifest.stored_samples(shard["shard"]).to_pylist()
    return check_shard(manifest.root, shard, samples, labels="other" if is_indexed(shard["key"]) else labels)


@lru_cache(maxsize=1)
def _opened(address: DatasetAddress) -> Manifest:
    """Open the manifest once per process: a process checks many shards of one dataset."""
    return address.open()


def _table_findings(dataset: FinishedDataset) -> Iterator[Finding]:
    """Compare the manifest's files with the receipt."""
    store = open_store(dataset.address.manifest_uri)
    for file in dataset.receipt.files:
        where = f"{store.uri}/{file.key}"
        with TemporaryDirectory() as folder:
            try:
                path = local_copy(store, file.key, Path(folder) / "table")
                size, sha256 = path.stat().st_size, file_sha256(path)
            except (MissingObject, FileNotFoundError):
                yield _table_finding(dataset, where, "there is no such object")
                continue
        if (size, sha256) != (file.bytes, file.sha256):
            what = (
                f"it has {size} bytes with SHA-256 {sha256[:12]}, the receipt says {file.bytes} with {file.sha256[:12]}: it is "
                "damaged, or of another run. The shards were not read"
            )
            yield _table_finding(dataset, where, what)


def _table_finding(dataset: FinishedDataset, where: str, what: str) -> Finding:
    return _repaired_by_manifest(Finding("manifest", where, what), open_store(dataset.step_uri))


def _repaired_by_manifest(finding: Finding, step: Store) -> Finding:
    receipt = f"{step.uri}/{RECEIPT}"
    repair = "delete the receipt; the same `mae run` then rewrites the manifest from the existing shards, and writes no shard"
    return replace(finding, repair=repair, delete=(receipt,))


def _with_repairs(root: Store, shards: Sequence[ShardRow], findings: Sequence[Finding]) -> list[Finding]:
    """Add to the finding of each damaged shard what to do about it."""
    key_of = {shard["shard"]: shard["key"] for shard in shards}
    damaged = {key_of[finding.shard] for finding in findings if finding.shard is not None}
    # an indexed tar is another author's: it has no record of a written shard to delete
    written = {key for key in damaged if not is_indexed(key)}
    records: dict[str, str] = {}
    for step in {_step_of(key) for key in written}:
        records |= _records(root, step, {key for key in written if _step_of(key) == step})
    return [
        _repaired(finding, root, key_of[finding.shard], records) for finding in findings if finding.shard is not None
    ]


def _repaired(finding: Finding, root: Store, key: str, records: Mapping[str, str]) -> Finding:
    if is_indexed(key):
        repair = (
            "restore the tar from its origin, as it was when it was indexed; if it has changed for good, name a new "
            "data.snapshot"
        )
        return replace(finding, repair=repair)
    step = root.at(_step_of(key)) if _step_of(key) else root
    shard_uri = [] if finding.damage == "missing" else [f"{root.uri}/{key}"]
    delete = (f"{step.uri}/{RECEIPT}", *([records[key]] if key in records else []), *shard_uri)
    repair = (
        "delete receipt, row and shard; the same `mae run` then writes only this shard again, with the same bytes if the images "
        "are the same"
    )
    return replace(finding, repair=repair, delete=delete)


def _orphans(root: Store, keys: Sequence[str]) -> list[Finding]:
    """Return the tars next to the dataset's own that it does not name: they do no harm but take space."""
    own = {key for key in keys if not is_indexed(key)}
    found = []
    for step in sorted({_step_of(key) for key in own} | {""}):
        folder = f"{step}/{SHARDS_FOLDER}" if step else SHARDS_FOLDER
        stray = [info for info in root.list(folder) if info.key not in own]
        records = _records(root, step, {info.key for info in stray}) if stray else {}
        for info in stray:
            record = records.get(info.key)
            where = f"{root.uri}/{info.key}"
            named = "a row of an earlier attempt names it" if record else "no row names it"
            what = f"{info.size} bytes that are not part of this dataset ({named}); readers do not see them"
            delete = (*([record] if record else []), where)
            found.append(Finding("orphan", where, what, repair="delete it to free the space", delete=delete))
    return found


def _records(root: Store, step: str, keys: set[str]) -> dict[str, str]:
    """Return, by key relative to the root, the address of the record of each of a step's shards that has one."""
    store = root.at(step) if step else root
    key_of = {key.removeprefix(f"{step}/"): key for key in keys}  # a record names its shard relative to its step
    return {key_of[key]: f"{store.uri}/{record}" for key, record in find_records(store, key_of).items()}


def _step_of(key: str) -> str:
    """Return the directory of the step that wrote a shard, relative to the manifest's root; empty if it is the root itself."""
    return key.rpartition(SHARDS_FOLDER)[0].rstrip("/")
