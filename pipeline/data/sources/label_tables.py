"""Labels from a table that lies beside the images, as `val/val_annotations.txt` of Tiny-ImageNet.

A file whose name ends in `annotations.txt`, the only one of its folder, may label the images of this folder and of a folder
`images` in it: each line holds an image's name, a tab, its class and, after another tab, whatever else there is. It is asked only
about images that no folder gives a label, and only a class that has a folder counts, so that a table of boxes labels nothing. Two
classes for one name are none.
Memory: about 150 bytes per line, of tables that are asked; one path per folder that has a table."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.data.sources.listing import is_hidden
from pipeline.data.sources.words import is_image_folder
from pipeline.storage import Store

_ENDING = "annotations.txt"


class TablePaths:
    """Where a source has such tables."""

    def __init__(self) -> None:
        self._by_folder: dict[str, str | None] = {}

    def add_all(self, paths: Iterable[str]) -> None:
        """Take in the paths of files that are no images."""
        for path in paths:
            if path.lower().endswith(_ENDING) and not is_hidden(path):
                folder = path.rpartition("/")[0]
                # two tables in one folder would be two answers to one question
                self._by_folder[folder] = None if folder in self._by_folder else path

    def beside(self, image: str) -> str | None:
        """Return the path of the table that may label the image, or None."""
        folder = image.rpartition("/")[0]
        above = folder.rpartition("/")[0] if is_image_folder(folder) else folder
        return self._by_folder.get(folder) or self._by_folder.get(above)


@dataclass(frozen=True, kw_only=True)
class TableUse:
    """What a table gave."""

    images: int
    """Those that it labels."""
    sha256: str


@dataclass
class _Table:
    sha256: str
    labels: Mapping[str, str | None]
    """Name of an image -> class; None where no line or several name one."""
    labelled: int = 0
    unlabelled: int = 0


class LabelTables:
    """The tables of a source, each read when it is first asked."""

    def __init__(self, store: Store, paths: TablePaths, classes: Iterable[str]) -> None:
        """`classes`: those that have a folder."""
        self._store, self._paths, self._classes = store, paths, frozenset(classes)
        self._tables: dict[str, _Table] = {}

    def label_of(self, image: str) -> str | None:
        """Return the class of an image that no folder gives one, or None."""
        path = self._paths.beside(image)
        if path is None or not self._classes:
            return None
        if path not in self._tables:
            self._tables[path] = _read(self._store, path, self._classes)
        table = self._tables[path]
        label = table.labels.get(image.rpartition("/")[2])
        table.labelled += label is not None
        table.unlabelled += label is None
        return label

    @property
    def used(self) -> dict[str, TableUse]:
        """Return what each table gave, by its path; tables that gave no label are left out."""
        return {
            path: TableUse(images=one.labelled, sha256=one.sha256) for path, one in self._tables.items() if one.labelled
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a note on each table that leaves images without a label."""
        return tuple(
            f"{path} labels {one.labelled} of the {one.labelled + one.unlabelled} images beside it: a line is an image's name, a "
            "tab and the name of a class folder. Complete it, or give all labels in data.labels"
            for path, one in self._tables.items()
            if one.unlabelled
        )


def _read(store: Store, path: str, classes: frozenset[str]) -> _Table:
    data = store.read(path)
    labels: dict[str, str | None] = {}
    for line in data.decode("utf-8-sig", errors="replace").splitlines():
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        known = label if label in classes else None
        labels[name] = known if labels.get(name, known) == known else None
    return _Table(hashlib.sha256(data).hexdigest(), labels)
