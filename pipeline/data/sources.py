"""What a person points `data.source` at, listed: a folder or bucket prefix of images, of WebDataset tars, or of Parquet tables.

Images: `x.jpg` (no labels), `cat/x.jpg` (the first folder is the label), `train/cat/x.jpg` and `train/x.jpg`. Folders
`train`, `val` (or `validation`) and `test` are splits when they are the only first-level folders that hold images;
otherwise all images are one pool, of which a keyed hash of the path puts `test_share` into `test`, the rest into `train`.
Tars and tables: the same folders, or names that begin with these words (`train-0001.tar`), are splits when every file
has one; otherwise they are a pool: of tars whole ones are chosen (`choose_tars`), of tables rows.
One source holds one kind. Other files, and hidden ones, are listed as ignored, so that they can be counted.
Units: sizes in bytes; paths relative to the source, in key order, so that row numbers are stable.
Errors: ConfigError for a source that is no folder; DataError for one that holds nothing of use or two kinds, and for a path
that no table can hold."""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore, open_store

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


Role = Literal["image", "tar", "table", "ignored"]
KINDS: dict[Role, str] = {"image": "images", "tar": "tars", "table": "Parquet tables"}
"""What a source can hold, in words."""


class SourceItem(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    role: Role


@dataclass(frozen=True)
class Layout:
    """How the folders of a source are read."""

    splits: Literal["folders", "pool"]
    classes: tuple[str, ...]
    """Label names, sorted; empty when nothing is in a class folder."""


def list_source(uri: str, *, besides: str | None = None) -> Iterator[SourceItem]:
    """Every file of the source, in key order. `besides`: address of a file that is none of the images (the labels)."""
    store = open_store(uri)
    expected = (
        f"a folder or s3:// prefix with images ({' '.join(IMAGE_SUFFIXES)}), flat or in class folders, with WebDataset "
        "tars (.tar) or with Parquet tables (.parquet), with or without train/, val/, test/ above"
    )
    if isinstance(store, FileStore) and not store.root.is_dir():
        found = "is a file" if store.root.exists() else "does not exist"
        raise ConfigError(f"data.source={uri!r}: {store.root} {found}. Point it at {expected}")
    first: SourceItem | None = None
    ignored = compressed = 0
    labels = None if besides is None else file_address(besides)
    for key, size in store.list():
        role = role_of(key)
        if role != "ignored" and labels and f"{store.uri}/{key}" == labels:
            role = "ignored"
        if role == "ignored":
            ignored += 1
            compressed += key.lower().endswith(COMPRESSED_TARS)
            yield SourceItem(key, size, role)
            continue
        if not encodable(key):
            raise DataError(
                f"data.source={uri!r}: the name {key!r} is not UTF-8. Rename the file (convmv does many at once)"
            )
        item = SourceItem(key, size, role)
        first = first or item
        if role != first.role:
            raise DataError(
                f"data.source={uri!r} holds {KINDS[first.role]} ({first.path}) and {KINDS[role]} ({key}). Move one kind "
                "out of it, or point data.source at a folder that holds one"
            )
        yield item
    if first is None:
        hint = " Compressed tars cannot be read by offset: unpack them to .tar." if compressed else ""
        raise DataError(f"data.source={uri!r} holds no images ({ignored} other files).{hint} Point it at {expected}")


def file_address(address: str) -> str:
    """A file's address in the form in which a store's `uri` and a key make it."""
    folder, _, name = address.rpartition("/")
    return f"{open_store(folder or '/').uri}/{name}"


def role_of(key: str) -> Role:
    """What a file is, by its name."""
    if key.startswith(".") or "/." in key:  # hidden
        return "ignored"
    stem, dot, suffix = key.rpartition("/")[2].rpartition(".")
    suffix = (dot + suffix).lower()  # text alone: pathlib keeps every name it has seen
    if suffix in IMAGE_SUFFIXES and stem:
        return "image"
    return {".tar": "tar", ".parquet": "table"}.get(suffix, "ignored")  # type: ignore[return-value]


def folders_of(path: str) -> tuple[str, ...]:
    """The first two folders of a path: all that a layout depends on."""
    return tuple(path.split("/", 2)[:2] if path.count("/") > 1 else path.split("/")[:-1])


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
    return pool_split(path, test_share=test_share, seed=seed), folders[0] if folders else None


def named_splits(paths: Sequence[str]) -> list[str] | None:
    """Splits of tars or tables by their first folder or the word their name begins with; None: they are one pool."""
    words = [_split_word(path) for path in paths]
    if not any(words):
        return None
    if not all(words):
        named, other = paths[[bool(word) for word in words].index(True)], paths[words.index(None)]
        raise DataError(
            f"data.source: {named} names its split and {other} does not. Put every file into train/, val/ or test/, or "
            "begin its name with one of these words; or none of them"
        )
    return [SPLIT_FOLDERS[word] for word in words if word]


def choose_tars(paths: Sequence[str], *, test_share: float, seed: int) -> list[str]:
    """Splits of a pool of tars: the `test_share` of them with the lowest keyed hash is `test`, at least one of several."""
    count = max(1, round(test_share * len(paths))) if test_share and len(paths) > 1 else 0
    chosen = set(sorted(paths, key=lambda path: (keyed_hash(seed, path, purpose="split"), path))[:count])
    return ["test" if path in chosen else "train" for path in paths]


def pool_split(path: str, *, test_share: float, seed: int) -> str:
    """Split of one member of a pool."""
    return "test" if keyed_hash(seed, path, purpose="split") < test_share * 2.0**64 else "train"


def class_order(names: Collection[str]) -> tuple[str, ...]:
    """The classes in the order of their labels: whole numbers by value, other names by text."""
    numbers = all(name.isdecimal() and str(int(name)) == name for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def keyed_hash(seed: int, path: str, *, purpose: Literal["split", "shard", "row_group"]) -> int:
    """64 random bits that belong to this path, the same everywhere and at every retry."""
    data = f"{purpose}:{seed}:{path}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def split_named(text: str) -> str | None:
    """The split that a word means, as written in a column; None: none that is known."""
    return SPLIT_FOLDERS.get(text)


def _split_word(path: str) -> str | None:
    folders = folders_of(path)
    if folders and folders[0] in SPLIT_FOLDERS:
        return folders[0]
    begins = re.match(r"[a-z]+(?![A-Za-z])", path.rpartition("/")[2])
    return begins[0] if begins and begins[0] in SPLIT_FOLDERS else None


def encodable(text: str) -> bool:
    """Whether a table can hold it: a file's name need not be text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
