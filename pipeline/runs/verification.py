"""verification: split from pipeline.runs.datasets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.cluster.progress import Progress
from pipeline.cluster.tasks import Executor, map_tasks
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.dataset.manifest import Manifest
from pipeline.data.dataset.shard_writer import file_sha256, rows_of
from pipeline.data.dataset.verify import Finding, ShardReport, Verification, check_shard, check_totals, name_swapped
from pipeline.errors import DataError
from pipeline.graph.receipts import RECEIPT
from pipeline.runs.datasets import FinishedDataset
from pipeline.storage import MissingObject, Store, open_store
from pipeline.storage.files import local_copy

SHARDS_FOLDER = "shards/"


def verify(dataset: FinishedDataset, *, executor: Executor, progress: Progress) -> Verification:
    """Reads everything; damaged tables are told alone, for shards cannot be judged by them."""
    said = partial(
        Verification, dataset.receipt.step, dataset.step_uri, DatasetFacts.read(dataset.receipt.facts).digest
    )
    if findings := list(_table_findings(dataset)):
        return said(0, 0, 0, tuple(findings))
    try:
        manifest = dataset.address.open()
    except DataError as error:
        return said(0, 0, 0, (_table_finding(dataset, dataset.address.manifest_uri, str(error)),))
    lines = manifest.all_shards().to_pylist()
    labels = "other" if dataset.joined else "numbers"
    reports = _check_all(dataset.address, lines, labels, executor=executor, progress=progress)
    reports = name_swapped(lines, reports)
    step = open_store(dataset.step_uri)
    findings = [finding for report in reports for finding in report.findings]
    findings = _with_repairs(manifest.root, lines, findings)
    where = f"{dataset.address.manifest_uri}/manifest.json"
    findings += [
        _repaired_by_manifest(finding, step) for finding in check_totals(lines, reports, manifest.counts, where)
    ]
    findings += _orphans(manifest.root, [line["key"] for line in lines])
    samples, read = sum(report.samples for report in reports), sum(report.bytes for report in reports)
    return said(len(lines), samples, read, tuple(findings))


def _check_all(
    address: DatasetAddress, lines: Sequence[Mapping[str, Any]], labels: str, *, executor: Executor, progress: Progress
) -> list[ShardReport]:
    """The one line of Ray."""
    total = sum(line["samples"] for line in lines)
    done = damages = 0

    def on_done(index: int, report: ShardReport) -> None:
        nonlocal done, damages
        done += report.samples
        damages += len(report.findings)
        progress.update(done, total, unit="images", damages=damages)

    return map_tasks(partial(_check, address, labels), lines, executor=executor, on_done=on_done)


def _check(address: DatasetAddress, labels: Any, line: Mapping[str, Any]) -> ShardReport:
    manifest = _opened(address)
    rows = manifest.stored_samples(line["shard"]).to_pylist()
    return check_shard(manifest.root, line, rows, labels="other" if "://" in line["key"] else labels)


@lru_cache(maxsize=1)
def _opened(address: DatasetAddress) -> Manifest:
    """A process checks many shards of one dataset."""
    return address.open()


def _table_findings(dataset: FinishedDataset) -> Iterator[Finding]:
    """The manifest's files against the receipt."""
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
                f"{size} bytes of SHA-256 {sha256[:12]}, the receipt says {file.bytes} of {file.sha256[:12]}: it is damaged, or of "
                "another run; its shards were not read"
            )
            yield _table_finding(dataset, where, what)


def _table_finding(dataset: FinishedDataset, where: str, what: str) -> Finding:
    return _repaired_by_manifest(Finding("manifest", where, what), open_store(dataset.step_uri))


def _repaired_by_manifest(finding: Finding, step: Store) -> Finding:
    receipt = f"{step.uri}/{RECEIPT}"
    repair = "delete the receipt; the same `mae run` then writes the manifest anew, from what is there, and no shard"
    return replace(finding, repair=repair, delete=(receipt,))


def _with_repairs(root: Store, lines: Sequence[Mapping[str, Any]], findings: Sequence[Finding]) -> list[Finding]:
    """What to do about each damaged shard."""
    key_of = {line["shard"]: line["key"] for line in lines}
    damaged = {key_of[finding.shard] for finding in findings if finding.shard is not None}
    rows: dict[str, str] = {}
    for prefix in {_step_of(key) for key in damaged if "://" not in key}:
        store = root.at(prefix) if prefix else root
        here = {key.removeprefix(f"{prefix}/"): key for key in damaged if "://" not in key and _step_of(key) == prefix}
        rows |= {here[key]: f"{store.uri}/{row}" for key, row in rows_of(store, here).items()}
    return [_repaired(finding, root, key_of[finding.shard], rows) for finding in findings if finding.shard is not None]


def _repaired(finding: Finding, root: Store, key: str, rows: Mapping[str, str]) -> Finding:
    if "://" in key:
        repair = (
            "put the tar back as it was when it was indexed, from where it came; if it has changed for good, name a new "
            "data.snapshot"
        )
        return replace(finding, repair=repair)
    step = root.at(_step_of(key)) if _step_of(key) else root
    shard_uri = [] if finding.damage == "missing" else [f"{root.uri}/{key}"]
    delete = (f"{step.uri}/{RECEIPT}", *([rows[key]] if key in rows else []), *shard_uri)
    repair = "delete receipt, row and shard; the same `mae run` then writes this shard alone, the same bytes from the same images"
    return replace(finding, repair=repair, delete=delete)


def _orphans(root: Store, keys: Sequence[str]) -> list[Finding]:
    """Tars beside the dataset's own that it does not name: no harm, but space."""
    own = [key for key in keys if "://" not in key]
    found = []
    for prefix in sorted({_step_of(key) for key in own} | {""}):
        folder = f"{prefix}/{SHARDS_FOLDER}" if prefix else SHARDS_FOLDER
        stray = [info for info in root.list(folder) if info.key not in set(own)]
        rows = {}
        if stray:
            step = root.at(prefix) if prefix else root
            names = {info.key.removeprefix(f"{prefix}/") for info in stray}
            rows = {key: f"{step.uri}/{row}" for key, row in rows_of(step, names).items()}
        for info in stray:
            row = rows.get(info.key.removeprefix(f"{prefix}/"))
            where = f"{root.uri}/{info.key}"
            named = "an earlier attempt's row names it" if row else "no row names it"
            what = f"{info.size} bytes that are not of this dataset ({named}); readers do not see them"
            delete = (*([row] if row else []), where)
            found.append(Finding("orphan", where, what, repair="delete it, to free the space", delete=delete))
    return found


def _step_of(key: str) -> str:
    """The directory of the step that wrote a shard, relative to the manifest's root; empty: the root itself."""
    return key.rpartition(SHARDS_FOLDER)[0].rstrip("/")
