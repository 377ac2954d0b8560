"""A source or a snapshot read again by this version: whether its splits can be read, and whether they are read as before."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.dataset.schema import NO_LABEL
from pipeline.data.dataset.understanding import SplitTally
from pipeline.data.snapshots.config import SnapshotConfig
from pipeline.data.snapshots.parts import BATCH_ROWS, SNAPSHOT_FILE
from pipeline.data.snapshots.writer import Batch, Resolver, read_batches
from pipeline.data.sources.listing import SourceKind, list_source
from pipeline.data.sources.splits import FolderEvidence, find_layout, named_splits, split_and_label
from pipeline.data.sources.tables import split_row_name
from pipeline.errors import DataError
from pipeline.graph.step import StageInput
from pipeline.storage.files import local_copy


def check_layout(config: SnapshotConfig, *, files: int) -> None:
    """Raise DataError or ConfigError if the splits of a source of at most so many files cannot be read from its names.

    A larger source is not checked: it is listed once only."""
    # one more than allowed tells that there are more
    items = list(islice(list_source(config.source, besides=config.labels), files + 1))
    found = [item for item in items if item.role != "ignored"]
    if (
        len(items) > files
        or config.labels is not None
        or config.split_from == "column"
        or config.split_column is not None
    ):
        return
    paths = [item.path for item in found]
    # not empty: a source without any usable file has raised in list_source
    if found[0].role == "image":
        find_layout(FolderEvidence().add_all(paths), config.split_from)
    else:
        named_splits(paths, config.split_from)


def not_compared(config: SnapshotConfig, kind: SourceKind) -> str:
    """Return why a listing of an older version cannot be compared with its paths alone, or an empty string if it can.

    The files that decided it may have changed since: what they say today would say nothing about the reading of then."""
    by_column = kind == "Parquet tables" and config.split_column is not None
    came_from = config.labels or (f"column {config.split_column!r}" if by_column else "")
    return (
        f"they came from {came_from}, which may have changed. A new data.snapshot reads it again" if came_from else ""
    )


def reread(config: SnapshotConfig, parts: Sequence[StageInput]) -> tuple[str, str]:
    """Compare the last of the parts, which an older version listed, with how this version reads the same paths.

    Returns both readings in words; the second is empty if they agree. Not for listings that `not_compared` names."""
    facts = SnapshotFacts.read(parts[-1].facts)
    with tempfile.TemporaryDirectory() as scratch:
        tables = [
            local_copy(part.store, SNAPSHOT_FILE, Path(scratch) / str(number)) for number, part in enumerate(parts)
        ]
        paths = (path for table in tables for path in _paths_of(table))
        then, now = SplitTally(), SplitTally()
        names: dict[str | None, int] = {}
        same, pairs = True, set[tuple[int, int]]()
        try:
            read = _reader(config, facts.kind, paths)
            for batch in read_batches(tables[-1]):
                old: dict[str, Any] = dict(batch)  # of a written snapshot, where labels are numbers
                labels, splits = read(batch)
                # numbered as they appear: only which old label meets which new one counts
                numbers = [NO_LABEL if name is None else names.setdefault(name, len(names)) for name in labels]
                then.add(old["split"], old["label"])
                now.add(splits, numbers)
                same = same and splits == old["split"]
                pairs.update(zip(old["label"], numbers, strict=True))
        except DataError as error:
            return _in_words(facts.splits, facts.classes), f"a layout that it refuses: {error}"
    # a class may have another name (`label=cat` is now `cat`), but no class may be cut or merged
    one_to_one = len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
    if same and (one_to_one or facts.kind != "images"):
        return "", ""
    return _in_words(facts.splits, facts.classes), _in_words(now.counts, sorted(name for name in names if name))


def _reader(config: SnapshotConfig, kind: SourceKind, paths: Iterable[str]) -> Resolver:
    """Return how this version reads rows of a listing of these paths. For tars and tables only splits are read."""
    if kind == "images":
        layout = find_layout(FolderEvidence().add_all(paths), config.split_from)

        def by_folders(batch: Batch) -> tuple[list[str | None], list[str]]:
            found = [split_and_label(p, layout, test_share=config.test_share, seed=config.seed) for p in batch["path"]]
            return [label for _, label in found], [split for split, _ in found]

        return by_folders
    files = list(dict.fromkeys(_file_of(path, kind) for path in paths))
    named = named_splits(files, config.split_from)
    split_of = dict(zip(files, named, strict=True)) if named else {}

    def by_files(batch: Batch) -> tuple[list[str | None], list[str]]:
        given: Any = batch["split"]  # of a pool, whose draw has not changed
        splits = [split_of.get(_file_of(p, kind), s) for p, s in zip(batch["path"], given, strict=True)]
        return [None] * len(given), splits

    return by_files


def _file_of(path: str, kind: SourceKind) -> str:
    return split_row_name(path)[0] if kind == "Parquet tables" else path


def _paths_of(table: Path) -> Iterator[str]:
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=["path"]):
            yield from batch.column(0).to_pylist()


def _in_words(splits: Mapping[str, int], classes: Sequence[str]) -> str:
    counts = ", ".join(f"{split} {images}" for split, images in splits.items())
    shown = ", ".join(classes[:6]) + (f" and {len(classes) - 6} more" if len(classes) > 6 else "")
    return f"{counts}; {f'classes {shown}' if classes else 'no classes in the listing'}"
