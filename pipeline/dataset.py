"""A finished dataset as people ask about it: found by a configuration or a directory, and verified as a whole.

`verify` reads every byte of every shard, as tasks; nothing is written. What is damaged is named with the objects to delete,
after which the same `mae run` makes these, and only these, anew: a shard that its row still names is not written
again, nor is a step that has its receipt run, so shard, row and receipt go together.
Errors: DataError when there is no finished dataset; StorageError when a store is down."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.cluster import Executor, Progress, map_tasks
from pipeline.config import RunConfig
from pipeline.data.manifest import Manifest, local_copy
from pipeline.data.shards import file_sha256, rows_of
from pipeline.data.verify import Finding, ShardReport, Verification, check_shard, check_totals, name_swapped
from pipeline.errors import DataError
from pipeline.graph.receipts import RECEIPT, Receipt, read_receipt
from pipeline.graph.runner import Hooks, Outcome, Run
from pipeline.stages.join import join
from pipeline.stages.shard import shard
from pipeline.stages.snapshot import snapshot
from pipeline.storage import MissingObject, Store, open_store, probe
from pipeline.training.spec import DatasetAddress, dataset_address
from pipeline.workflow import build

SHARDS_FOLDER = "shards/"


@dataclass(frozen=True)
class FinishedDataset:
    """A shard or join step that has its receipt."""

    step_uri: str
    receipt: Receipt

    @property
    def address(self) -> DatasetAddress:
        """Where manifest and shards lie."""
        return dataset_address(self.receipt.as_input(self.step_uri))

    @property
    def joined(self) -> bool:
        """Whether its shards lie in the steps of its parts."""
        return self.address.root_uri != self.step_uri


def datasets_of(config: RunConfig) -> list[FinishedDataset]:
    """The datasets of a run, that of pretraining first; those that are not made yet are left out."""
    steps = build(config)
    parts = {part.name for step in steps if step.function is join for part in step.inputs.values()}
    store = open_store(config.store)
    made = []
    for step in steps:
        if step.function in {shard, join} and step.name not in parts:
            root = store.at(step.directory)
            receipt = read_receipt(root)
            made += [FinishedDataset(root.uri, receipt)] if receipt else []
    if not made:
        raise DataError(f"{store.uri}: this configuration's shards are not made yet. `mae run` makes them")
    return sorted(made, key=lambda dataset: dataset.receipt.step not in {"shard", "join"})


def dataset_in(uri: str) -> FinishedDataset:
    """The dataset of the step whose directory this is."""
    root = open_store(uri)
    receipt = read_receipt(root)
    if receipt is None or "digest" not in receipt.facts:
        found = f"the receipt of {receipt.step}" if receipt else "no receipt"
        raise DataError(
            f"{root.uri}: {found}, so this is no finished shard or join step. Give the directory of one (`mae plan CONFIG --json` "
            "names it), or the configuration"
        )
    return FinishedDataset(root.uri, receipt)


def make_datasets(config: RunConfig, *, executor: Executor, hooks: Hooks) -> list[Outcome]:
    """Runs the steps up to the datasets, as `mae run` would, and no other."""
    steps = [step for step in build(config) if step.function in {snapshot, shard, join}]
    store = open_store(config.store)
    probe(store)
    return Run(steps, store=store, executor=executor, hooks=hooks, parallel=config.resources.parallel_steps).walk()


def verify(dataset: FinishedDataset, *, executor: Executor, progress: Progress) -> Verification:
    """Reads everything; damaged tables are told alone, for shards cannot be judged by them."""
    said = partial(Verification, dataset.receipt.step, dataset.step_uri, str(dataset.receipt.facts["digest"]))
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
