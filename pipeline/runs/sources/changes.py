"""Has a source changed since it was listed? One line per source, at the start of every run.

A listing is pinned, so a run with a changed source would otherwise go on with the old one without a word. The question must cost
little: up to FULL files, all names and sizes are compared; above that a keyed sample, and the line says so. In a folder the sample
is the sizes of some files and the times of the folders above many; in a bucket, where nothing has a time that tells of an
addition, it is one page of the listing of some folders.
Nothing here fails a run: a source that is gone or does not answer is a line, too."""

import hashlib
import heapq
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.data.snapshots.parts import EarlierListing, listed_files
from pipeline.data.sources.labels import sha256_of_labels
from pipeline.data.sources.listing import MOVED, list_source, role_of
from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.receipts import read_receipt
from pipeline.graph.step import StageInput, Step
from pipeline.runs.workflow import COMPARED_AT, parts_of_sources
from pipeline.storage import FileStore, Store, open_store

FULL = 20_000
"""Files up to which a source is compared completely: 20 requests for a bucket, a fraction of a second for a folder."""
LIMIT_S = 20.0
_GROUPS, _FILES, _PAGES, _PAGE, _FOLDERS = 3, 64, 8, 1_000, 1_000
"""Size of a sample: row groups of the listing to choose from, files, pages, keys per page, folders."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class SourceChanges:
    """How a source differs from its snapshots."""

    new: int = 0
    changed: int = 0
    """Files of another size."""
    gone: int = 0
    folders: tuple[str, ...] = ()
    """Samples only: folders in which something was added, removed or renamed since the source was listed."""
    sample: str = ""
    """What was compared; empty for everything."""

    @property
    def text(self) -> str:
        """What has changed; empty if nothing has."""
        found = [(self.new, "new"), (self.changed, "of another size"), (self.gone, "gone")]
        texts = [f"{count} {'file' if count == 1 else 'files'} {what}" for count, what in found if count]
        if self.folders:
            count = len(self.folders)
            texts.append(f"{count} {'folder' if count == 1 else 'folders'} changed (such as {self.folders[0]})")
        return ", ".join(texts)


def source_changes(config: RunConfig, store: Store) -> list[str]:
    """Return a line for each source that has changed since its snapshots, was only sampled, or could not be compared."""
    lines = []
    for section, shards in parts_of_sources(config).items():
        steps = [step.inputs["snapshot"] for step in shards]
        found = [(store.at(step.directory), read_receipt(store.at(step.directory))) for step in steps]
        parts = [receipt.as_input(root.uri) for root, receipt in found if receipt]
        if len(parts) == len(steps):
            lines += _lines(section, steps, parts)
    return lines


def compare_source(
    source: str, labels: str | None, parts: Sequence[StageInput], *, compared_at: float = 0.0
) -> SourceChanges:
    """Compare a source with the snapshots that list it, completely if they list at most FULL files.

    `compared_at`: when this was last done completely, other than by the listing. Seconds since the epoch."""
    with tempfile.TemporaryDirectory() as scratch:
        tables = [listed_files(part, Path(scratch) / str(number)) for number, part in enumerate(parts)]
        # footers only: the tables of a large source take seconds to read
        listed = sum(pq.read_metadata(table).num_rows for table in tables)
        if listed <= FULL:
            return _compare_all(source, labels, tables, listed, gone_before=_gone(parts))
        store, sample = open_store(source), _sample(tables)
        if isinstance(store, FileStore):
            # the last part is the newest: its listing looked at every folder
            return _compare_folder(store, sample, listed, since=max(compared_at, _began(parts[-1])))
        return _compare_pages(store, sample, tables, listed)


def _lines(section: str, steps: Sequence[Step], parts: Sequence[StageInput]) -> list[str]:
    config: SnapshotConfig = steps[0].config
    where = steps[0].options.get(MOVED, {"source": config.source, "labels": config.labels})
    name = f"{section}.source {where['source']}"
    names = ", ".join(step.config.snapshot for step in steps)
    compared_at = steps[0].options.get(COMPARED_AT, 0.0)
    lines = []
    try:
        found = within(
            LIMIT_S, lambda: compare_source(where["source"], where["labels"], parts, compared_at=compared_at)
        )
        lines += _files_line(name, names, found, is_own=section == "data")
        lines += [
            f"{table} has changed since snapshot {names}, whose labels this run uses: --refresh "
            "gives the new ones only to new images; a new data.snapshot labels all of them again"
            for table in within(LIMIT_S, lambda: _changed_labels(section, where, parts))
        ]
    except (PipelineError, ConfigError, OSError, pa.ArrowException) as error:
        reason = str(error) or f"it did not answer within {LIMIT_S:g} s"
        lines.append(f"{name} could not be compared with snapshot {names}, which this run reads: {reason}")
    return lines


def _changed_labels(section: str, where: Mapping[str, str], parts: Sequence[StageInput]) -> list[str]:
    """The files with labels that are not what they were."""
    facts = [SnapshotFacts.read(part.facts) for part in parts]
    tables = {path: table for one in facts for path, table in (one.label_tables or {}).items()}
    changed = [
        f"{section}.source {where['source']}: {path}"
        for path, table in tables.items()
        if table.sha256 != sha256_of_labels(f"{where['source']}/{path}")
    ]
    if facts[-1].labels_sha256 and facts[-1].labels_sha256 != sha256_of_labels(where["labels"]):
        changed.append(f"{section}.labels {where['labels']}")
    return changed


def _files_line(name: str, names: str, found: SourceChanges, *, is_own: bool) -> list[str]:
    if not found.text:
        return [f"{name}: no change since snapshot {names} in {found.sample}"] if found.sample else []
    what = f"{name} has changed since snapshot {names}, which this run reads: {found.text}"
    what += f", in {found.sample}" if found.sample else ""
    if not is_own:
        return [f"{what}. Datasets to evaluate on stay as they were listed; a new data.snapshot lists them again"]
    if found.new or found.changed or found.folders:
        kept = "; samples of changed and removed files stay" if found.changed or found.gone else ""
        return [f"{what}. --refresh takes in new and changed files as a new part{kept}"]
    return [
        f"{what}. --refresh would change nothing, since their samples stay; a new data.snapshot lists the source again"
    ]


def _compare_all(
    source: str, labels: str | None, tables: Sequence[Path], listed: int, *, gone_before: int
) -> SourceChanges:
    earlier, new = EarlierListing(tables), 0
    limit = listed + FULL  # the source may have grown without bounds
    files = (item for item in list_source(source, besides=labels) if item.role != "ignored")
    seen = 0
    for item in islice(files, limit):
        new += earlier.is_new(item.path, item.size)
        seen += 1
    if seen == limit:
        return SourceChanges(new=new - earlier.changed, changed=earlier.changed, sample=f"its first {limit} files")
    counts = earlier.counts()
    # EarlierListing calls a file of another size new as well
    return SourceChanges(
        new=new - counts["changed"], changed=counts["changed"], gone=max(0, counts["gone"] - gone_before)
    )


def _gone(parts: Sequence[StageInput]) -> int:
    """Files that were gone already when the last part was listed."""
    return SnapshotFacts.read(parts[-1].facts).gone or 0


def _began(part: StageInput) -> float:
    """When the listing began, in seconds since the epoch."""
    return float(part.made["time"]) - float(part.made["seconds"])


def _sample(tables: Sequence[Path]) -> dict[str, int]:
    """Sizes by path of the files in some row groups of the listings."""
    counts = [pq.read_metadata(table).num_row_groups for table in tables]
    groups = [(number, group) for number, count in enumerate(counts) for group in range(count)]
    sample: dict[str, int] = {}
    for number, group in first_by_key(groups, _GROUPS):
        with pq.ParquetFile(tables[number]) as file:
            rows = file.read_row_group(group, columns=["path", "size"])
        sample.update(zip(rows.column("path").to_pylist(), rows.column("size").to_pylist(), strict=True))
    return sample


def _compare_folder(store: FileStore, sample: Mapping[str, int], listed: int, *, since: float) -> SourceChanges:
    changed = gone = 0
    files = first_by_key(sample, _FILES)
    for path in files:
        local = store.local_path(path)
        size = local.stat().st_size if local and local.exists() else None
        gone += size is None
        changed += size not in (None, sample[path])
    above = {folder for path in sample for folder in _folders(path)}
    folders = sorted(first_by_key(above, _FOLDERS))
    later = tuple(folder for folder in folders if _changed_at(store.root / folder) > since)
    what = f"a sample of {len(files)} of {listed} files and the times of {len(folders)} folders"
    return SourceChanges(changed=changed, gone=gone, folders=later, sample=what)


def _compare_pages(store: Store, sample: Mapping[str, int], tables: Sequence[Path], listed: int) -> SourceChanges:
    new = changed = gone = 0
    role = role_of(next(iter(sample)))
    folders = first_by_key({path.rpartition("/")[0] for path in sample}, _PAGES)
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        listing = list(islice(store.list(prefix), _PAGE))
        page = {key: size for key, size in listing if role_of(key) == role}
        # a full page ends somewhere in the folder, and any other one with the folder: `0` is the character after `/`
        last = listing[-1].key if len(listing) == _PAGE else f"{folder}0" if folder else "\U0010ffff"
        known: dict[str, set[int]] = {}
        for table in tables:
            bounds = [("path", ">=", prefix), ("path", "<=", last)]
            rows = pq.read_table(table, columns=["path", "size"], filters=bounds)
            for path, size in zip(rows.column("path").to_pylist(), rows.column("size").to_pylist(), strict=True):
                known.setdefault(path, set()).add(size)
        new += len(page.keys() - known.keys())
        gone += len(known.keys() - page.keys())
        changed += sum(page[path] not in known[path] for path in page.keys() & known.keys())
    what = f"a sample of {len(folders)} of its folders ({listed} files are listed)"
    return SourceChanges(new=new, changed=changed, gone=gone, sample=what)


def _folders(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[:depth]) for depth in range(len(parts) + 1))


def _changed_at(folder: Path) -> float:
    return folder.stat().st_mtime if folder.exists() else 0.0


def first_by_key(items: Iterable[Result], count: int) -> list[Result]:
    """Return the `count` items whose hash is lowest: a choice that is the same in every run."""
    return heapq.nsmallest(count, items, key=lambda item: hashlib.sha256(str(item).encode()).digest())


def within(limit_s: float, call: Callable[[], Result]) -> Result:
    """Return what the call returns, or raise TimeoutError after `limit_s` seconds. The caller hears signals meanwhile."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append(error)

    # a daemon: a file system that hangs must not keep the process from ending
    thread = threading.Thread(target=work, daemon=True, name="compare source")
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
