"""The files of `data.source`: a folder or bucket prefix of images, of WebDataset tars, or of Parquet tables.

One source holds one kind. Other files, and hidden ones, are listed as ignored so that they can be counted. How folders and
names become labels and splits: `splits.py`.
Units: sizes in bytes; paths relative to the source, in key order, so that row numbers are stable.
Errors: ConfigError for a source that is not a folder; DataError for one that holds nothing usable or two kinds, and for a
path that is not UTF-8."""

import stat
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pipeline.errors import ConfigError, DataError
from pipeline.storage import FileStore, Store, open_store

OPTIONAL_SUFFIXES = (".heic", ".heif", ".avif")
"""Of images that can be read only where a decoder is installed."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *OPTIONAL_SUFFIXES)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")
Role = Literal["image", "tar", "table", "ignored"]
SourceKind = Literal["images", "tars", "Parquet tables"]
KINDS: dict[Role, SourceKind] = {"image": "images", "tar": "tars", "table": "Parquet tables"}
"""What a source can hold, for messages."""
MOVED = "moved"
"""Option of snapshot and shard steps: where `source` and `labels` are now, if the config holds where they were listed."""
_CONTAINERS: dict[str, Role] = {".tar": "tar", ".parquet": "table"}


class SourceItem(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    role: Role


def list_source(uri: str, *, besides: str | None = None) -> Iterator[SourceItem]:
    """Yield every file of the source, in key order. `besides`: address of a file to list as ignored (the labels file)."""
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
                f"data.source={uri!r}: the name {key!r} is not UTF-8. Rename the file (convmv renames many at once)"
            )
        # an image that is no regular file goes to quarantine with its reason; the others would be read whole, here and now
        if role != "image" and size == 0 and (special := special_file(store, key)):
            raise DataError(
                f"data.source={uri!r}: {key} is a {special}, not a regular file. Remove it, or put the file there"
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
    """Return a file's address in the form `<store's uri>/<key>`, in which addresses can be compared."""
    folder, _, name = address.rpartition("/")
    return f"{open_store(folder or '/').uri}/{name}"


def role_of(key: str) -> Role:
    """Return what a file is, judging by its name."""
    if is_hidden(key):
        return "ignored"
    stem, dot, suffix = key.rpartition("/")[2].rpartition(".")
    suffix = (dot + suffix).lower()  # plain text, because pathlib would intern every name
    if suffix in IMAGE_SUFFIXES and stem:
        return "image"
    return _CONTAINERS.get(suffix, "ignored")


def special_file(store: Store, key: str) -> str:
    """Return what a file of a folder is if it is a FIFO, a socket or a device, or an empty string.

    Reading from one may block forever. They are listed with size 0, so other files need not be asked.
    """
    path = store.local_path(key)
    try:
        mode = path.stat().st_mode if path else stat.S_IFREG
    except OSError:  # a dangling link, or a file that has vanished: whoever reads it finds out
        return ""
    kinds = {stat.S_ISFIFO: "FIFO", stat.S_ISSOCK: "socket", stat.S_ISCHR: "device", stat.S_ISBLK: "device"}
    return next((name for is_kind, name in kinds.items() if is_kind(mode)), "")


def is_hidden(path: str) -> bool:
    """Return whether the path, of a folder or of a tar, is a hidden file or in a folder of files that a system keeps for itself.

    AppleDouble files of macOS (`._x.jpg`, `__MACOSX/`) and Synology's thumbnails (`@eaDir/`) are named like images.
    """
    # two substring tests first: this is asked about every file of a source
    if (path.startswith(".") or "/." in path) and any(part[:1] == "." and part.strip(".") for part in path.split("/")):
        return True
    return any(f"{folder}/" in path and folder in path.split("/") for folder in _SYSTEM_FOLDERS)


def encodable(text: str) -> bool:
    """Return whether a table can hold the text: a file's name may be bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
