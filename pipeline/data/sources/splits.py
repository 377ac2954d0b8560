"""Splits and labels from the names of folders and files, or by a keyed hash where the names say nothing.

Images: `x.jpg` (no label), `cat/x.jpg` (the first folder is the label), `train/cat/x.jpg` and `train/x.jpg`. Folders
`train`, `val` (or `validation`) and `test` are splits if they are the only first-level folders that hold images. Otherwise all
images form one pool, of which a keyed hash of the path puts `test_share` into `test` and the rest into `train`.
Tars and tables: the same folders, or file names that begin with these words (`train-0001.tar`), are splits if every file has
one. Otherwise they form a pool: whole tars are held out (`choose_tars`), or rows of tables (`pool_split`).
Errors: DataError if some files have a split and others do not."""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DataError

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Word in a folder, file name or column -> split."""


@dataclass(frozen=True)
class FolderLayout:
    """How the folders of a source are read."""

    splits: Literal["folders", "pool"]
    classes: tuple[str, ...]
    """Label names, sorted; empty if no image is in a class folder."""


def folders_of(path: str) -> tuple[str, ...]:
    """Return the first two folders of a path; a layout depends on no others."""
    return tuple(path.split("/", 2)[:2] if path.count("/") > 1 else path.split("/")[:-1])


def find_layout(folders: Collection[tuple[str, ...]]) -> FolderLayout:
    """Return the layout of a source. `folders`: the distinct `folders_of` of all its images."""
    tops = {parts[0] for parts in folders if parts}
    if tops and tops <= SPLIT_FOLDERS.keys():
        if () in folders:
            raise DataError(
                f"data.source: there are images next to the split folders {', '.join(sorted(tops))}, so their split is unknown. "
                "Move them into one of these folders, or out of the source"
            )
        # train/cat and test/cat are one class, so classes are united over the splits
        return FolderLayout("folders", tuple(sorted({parts[1] for parts in folders if len(parts) > 1})))
    return FolderLayout("pool", tuple(sorted(tops)))


def split_and_label(path: str, layout: FolderLayout, *, test_share: float, seed: int) -> tuple[str, str | None]:
    """Return split and label name of an image: by its folders, or its split by a keyed hash of its path."""
    folders = folders_of(path)
    if layout.splits == "folders":
        return SPLIT_FOLDERS[folders[0]], folders[1] if len(folders) > 1 else None
    return pool_split(path, test_share=test_share, seed=seed), folders[0] if folders else None


def named_splits(paths: Sequence[str]) -> list[str] | None:
    """Return the split of each tar or table by its first folder or first word, or None if no path names a split."""
    words = [_split_word(path) for path in paths]
    if not any(words):
        return None
    if not all(words):
        named, other = paths[[bool(word) for word in words].index(True)], paths[words.index(None)]
        raise DataError(
            f"data.source: {named} names its split and {other} does not. Put every file into train/, val/ or test/, or "
            "begin every name with one of these words, or no name"
        )
    return [SPLIT_FOLDERS[word] for word in words if word]


def choose_tars(paths: Sequence[str], *, test_share: float, seed: int) -> list[str]:
    """Return the split of each tar of a pool: the `test_share` of them with the lowest keyed hash is `test`.

    Of several tars at least one is held out; a single tar is `train`.
    """
    count = max(1, round(test_share * len(paths))) if test_share and len(paths) > 1 else 0
    chosen = set(sorted(paths, key=lambda path: (keyed_hash(seed, path, purpose="split"), path))[:count])
    return ["test" if path in chosen else "train" for path in paths]


def pool_split(path: str, *, test_share: float, seed: int) -> str:
    """Return the split of one member of a pool."""
    return "test" if keyed_hash(seed, path, purpose="split") < test_share * 2.0**64 else "train"


def split_named(text: str) -> str | None:
    """Return the split that a word in a column stands for, or None if it is unknown."""
    return SPLIT_FOLDERS.get(text)


def class_order(names: Collection[str]) -> tuple[str, ...]:
    """Return the classes in the order of their labels: by value if all are whole numbers, else by text."""
    numbers = all(name.isdecimal() and str(int(name)) == name for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def keyed_hash(seed: int, path: str, *, purpose: Literal["split", "shard", "row_group"]) -> int:
    """Return 64 random bits that belong to this path, the same on every machine and at every retry."""
    # a hash rather than a shuffle: a file that is added later moves no other file to another split
    data = f"{purpose}:{seed}:{path}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _split_word(path: str) -> str | None:
    folders = folders_of(path)
    if folders and folders[0] in SPLIT_FOLDERS:
        return folders[0]
    begins = re.match(r"[a-z]+(?![A-Za-z])", path.rpartition("/")[2])
    return begins[0] if begins and begins[0] in SPLIT_FOLDERS else None
