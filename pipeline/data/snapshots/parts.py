"""The parts of a dataset that are listed already: their tables, and whether they know a file.

Memory: the parts are read in batches, side by side."""

import heapq
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.data.dataset.facts import SnapshotFacts
from pipeline.data.sources.listing import list_source
from pipeline.graph.step import StageInput
from pipeline.storage.files import local_copy

SNAPSHOT_FILE = "snapshot.parquet"
FILES_FILE = "files.parquet"
BATCH_ROWS = 50_000


class EarlierListing:
    """What earlier parts list: asked about every file of a listing, in path order."""

    def __init__(self, parts: Sequence[Path]) -> None:
        """`parts`: their tables (`listed_files`)."""
        self._entries = heapq.merge(*map(_entries, parts))  # streams: no part is held in memory
        self._head = next(self._entries, None)
        self.known = self.changed = self.gone = 0

    def is_new(self, path: str, size: int) -> bool:
        """Return whether no part lists the file with this size."""
        self._skip_to(path)
        # a set: a file that has changed is listed by a later part as well, with another size
        sizes = set()
        while self._head is not None and self._head[0] == path:
            sizes.add(self._head[1])
            self._head = next(self._entries, None)
        self.known += size in sizes
        self.changed += bool(sizes) and size not in sizes
        return size not in sizes

    def counts(self) -> dict[str, int]:
        """Return how many files were listed before, with another size, and no longer exist. Call it after the last file."""
        self._skip_to(None)
        return {"known": self.known, "changed": self.changed, "gone": self.gone}

    def _skip_to(self, path: str | None) -> None:
        """Advance to `path`, or to the end. The source no longer holds the files in between."""
        while self._head is not None and (path is None or self._head[0] < path):
            skipped = self._head[0]
            self.gone += 1
            while self._head is not None and self._head[0] == skipped:
                self._head = next(self._entries, None)


def has_new_files(source: str, labels: str | None, parts: Sequence[StageInput]) -> bool:
    """Return whether the source holds a file that no part lists. It is read only up to the first such file."""
    with tempfile.TemporaryDirectory() as scratch:
        earlier = EarlierListing([listed_files(part, Path(scratch) / str(n)) for n, part in enumerate(parts)])
        # ignored files are in no snapshot, so they would always count as new
        items = (item for item in list_source(source, besides=labels) if item.role != "ignored")
        return any(earlier.is_new(item.path, item.size) for item in items)


def listed_files(part: StageInput, scratch: Path) -> Path:
    """Return the table, with columns path and size in path order, of the files that a part lists. `scratch`: for a download."""
    name = FILES_FILE if SnapshotFacts.read(part.facts).kind == "Parquet tables" else SNAPSHOT_FILE
    return local_copy(part.store, name, scratch)


def _entries(table_path: Path) -> Iterator[tuple[str, int]]:
    """Yield (path, size) of the files that a part lists, in path order."""
    with pq.ParquetFile(table_path) as table:
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=["path", "size"]):
            yield from zip(batch.column("path").to_pylist(), batch.column("size").to_pylist(), strict=True)
