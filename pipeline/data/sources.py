"""What a person points `data.source` at, listed: a folder or bucket prefix of images, flat, in class folders, or split.

Layouts: `x.jpg` (no labels), `cat/x.jpg` (the first folder is the label), `train/cat/x.jpg` and `train/x.jpg`. Folders
`train`, `val` (or `validation`) and `test` are splits when they are the only first-level folders that hold images;
otherwise all images are one pool, of which a keyed hash of the path puts `test_share` into `test`, the rest into `train`.
Files that are no images by suffix, or hidden, are listed as ignored, so that they can be counted.
Units: sizes in bytes; paths relative to the source, in key order, so that row numbers are stable.
Errors: ConfigError for a source that is no folder; DataError for one without images, or with a path no table can hold."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore, open_store

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class SourceItem(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    role: Literal["image", "ignored"]


@dataclass(frozen=True)
class Layout:
    """How the folders of a source are read."""

    splits: Literal["folders", "pool"]
    classes: tuple[str, ...]
    """Label names, sorted; empty when nothing is in a class folder."""


def list_source(uri: str) -> Iterator[SourceItem]:
    """Every file of the source, in key order."""
    store = open_store(uri)
    expected = (
        f"a folder or s3:// prefix with images ({' '.join(IMAGE_SUFFIXES)}), flat or in class folders, "
        "with or without train/, val/, test/ above"
    )
    if isinstance(store, FileStore) and not store.root.is_dir():
        found = "is a file" if store.root.exists() else "does not exist"
        raise ConfigError(f"data.source={uri!r}: {store.root} {found}. Point it at {expected}")
    images = ignored = 0
    for key, size in store.list():
        path = PurePosixPath(key)
        hidden = any(part.startswith(".") for part in path.parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES:
            ignored += 1
            yield SourceItem(key, size, "ignored")
            continue
        if not _encodable(key):
            raise DataError(
                f"data.source={uri!r}: the name {key!r} is not UTF-8. Rename the file (convmv does many at once)"
            )
        images += 1
        yield SourceItem(key, size, "image")
    if not images:
        raise DataError(f"data.source={uri!r} holds no images ({ignored} other files). Point it at {expected}")


def folders_of(path: str) -> tuple[str, ...]:
    """The first two folders of a path: all that a layout depends on."""
    return PurePosixPath(path).parts[:-1][:2]


def find_layout(folders: Collection[tuple[str, ...]]) -> Layout:
    """The layout of a source whose images lie in these folders (the distinct `folders_of` of all images)."""
    tops = {parts[0] for parts in folders if parts}
    if tops and tops <= SPLIT_FOLDERS.keys():
        if () in folders:
            raise DataError(
                f"data.source: images lie beside the split folders {', '.join(sorted(tops))}, so their split is unknown. "
                "Move them into one of these folders, or out of the source"
            )
        return Layout("folders", tuple(sorted({parts[1] for parts in folders if len(parts) > 1})))
    return Layout("pool", tuple(sorted(tops)))


def place(path: str, layout: Layout, *, test_share: float, seed: int) -> tuple[str, str | None]:
    """Split and label name of an image: by its folders, or by a keyed hash of its path."""
    folders = folders_of(path)
    if layout.splits == "folders":
        return SPLIT_FOLDERS[folders[0]], folders[1] if len(folders) > 1 else None
    split = "test" if keyed_hash(seed, path, purpose="split") < test_share * 2.0**64 else "train"
    return split, folders[0] if folders else None


def keyed_hash(seed: int, path: str, *, purpose: Literal["split", "shard"]) -> int:
    """64 random bits that belong to this path, the same everywhere and at every retry."""
    data = f"{purpose}:{seed}:{path}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
