"""WebDataset tars, read with offsets: their members, the samples that they form, and where a tar is damaged.

Adjacent members with one key are a sample, as in webdataset (key = path up to the first dot of the base name). webdataset
and Python's tarfile take a damaged header, or a cut between two members, for the end of the archive, and return fewer
samples without a word. Here the walk must reach the end marker, with nothing but zeros after it.
webdataset also skips hard and symbolic links, and reads AppleDouble files of macOS (`cat/._1.jpg`) as members of a sample
`cat/`, which tears apart the samples between which they lie. Here a link has the bytes of the file it names, and hidden files
belong to no sample, as in a folder (`contents_of`).
Units: bytes, from the start of the tar. Errors: DataError naming the tar; DamagedTar for damage."""

import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.sources.listing import encodable, is_hidden
from pipeline.errors import DataError

_END_MARKER = 2 * tarfile.BLOCKSIZE
_CHUNK = 2**20
_REMEDY = "Fetch it again from its origin, or remove it and name a new data.snapshot"


class Member(NamedTuple):
    """A regular file of a tar, or a link to one, which has the target's offset and size."""

    name: str
    offset: int  # to the first byte of its content
    size: int


class Link(NamedTuple):
    """A link in a tar."""

    name: str
    kind: Literal["hard link", "symbolic link"]
    target: str
    """Path within the tar, as `posixpath.normpath` writes it."""


class OtherMember(NamedTuple):
    """A file of a tar that belongs to no sample."""

    name: str
    reason: str
    """no sample, hidden, hard link, symbolic link, FIFO, character device, block device or unknown type."""


Entry: TypeAlias = Member | Link | OtherMember
_SPECIAL = {tarfile.FIFOTYPE: "FIFO", tarfile.CHRTYPE: "character device", tarfile.BLKTYPE: "block device"}


@dataclass(frozen=True)
class Contents:
    """The entries of a tar, divided into those that may form samples and the others."""

    members: tuple[Member, ...]
    others: tuple[OtherMember, ...]


@dataclass(frozen=True)
class TarSample:
    """Adjacent members with one key."""

    key: str
    members: Mapping[str, Member]
    """By suffix in lower case: what follows the first dot."""


class DamagedTar(DataError):
    """A tar that readers would silently cut short, or cannot read. `what`: the damage, without address and remedy."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(f"{address}: {what}. {_REMEDY}")
        self.what = what


def iter_entries(path: Path, address: str) -> Iterator[Entry]:
    """Yield everything in a tar but its folders, up to its end or to the damage, where it raises DamagedTar."""
    last = ""
    try:
        # `r:`: without compression, since offsets must be those of the file
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.issparse():
                    raise DamagedTar(
                        address, f"{member.name} is a sparse file, whose content is not contiguous in the tar"
                    )
                if not member.isdir():
                    last = member.name
                    yield _entry(member, address)
            # tarfile takes a damaged header for the end of the archive, so the end is checked here
            _check_end(file, tar.offset, address, after=last or "its beginning")
    except tarfile.TarError as error:
        raise DamagedTar(address, f"it is not a complete tar{f' after {last}' if last else ''}: {error}") from error


def regular_members(entries: Sequence[Entry]) -> list[Member]:
    """Return the regular files, which are all that webdataset reads."""
    return [entry for entry in entries if isinstance(entry, Member)]


def contents_of(entries: Sequence[Entry]) -> Contents:
    """Give each link the bytes of the file that it names, and set aside what belongs to no sample.

    A symbolic link may name any file of the tar, a hard link one that comes before it, as when the tar is unpacked.
    """
    # names may begin with `./`, and a link may spell its target in another way
    files = {posixpath.normpath(entry.name): entry for entry in regular_members(entries)}
    links = {posixpath.normpath(entry.name): entry for entry in entries if isinstance(entry, Link)}
    before: dict[str, Member] = {}
    members: list[Member] = []
    others: list[OtherMember] = []
    for entry in entries:
        name = posixpath.normpath(entry.name)
        if isinstance(entry, Member):
            before[name] = entry
        if isinstance(entry, OtherMember):
            others.append(entry)
        elif is_hidden(name):
            others.append(OtherMember(entry.name, "hidden"))
        elif isinstance(entry, Member):
            members.append(entry)
        elif target := _target(entry, before if entry.kind == "hard link" else files, links):
            members.append(target._replace(name=entry.name))
        else:
            others.append(OtherMember(entry.name, entry.kind))
    return Contents(tuple(members), tuple(others))


def group_members(members: Sequence[Member], address: str) -> list[TarSample]:
    """Return the samples that webdataset's grouping makes of the members."""
    # webdataset's tar reader drops these members before it groups; group_by_keys alone would not
    files = ({"fname": member.name, "data": member, "__url__": ""} for member in members if not _is_meta(member.name))
    try:
        found = list(group_by_keys(files))
    except ValueError as error:
        raise DataError(
            f"{address}: {error.args[0]}. webdataset cannot read it. Give every member its own name, without dots in keys"
        ) from error
    return [
        TarSample(sample["__key__"], {name: member for name, member in sample.items() if not name.startswith("__")})
        for sample in found
    ]


def read_by_webdataset(path: Path, address: str) -> Iterator[dict[str, Any]]:
    """Yield samples as webdataset's own reader returns them, including its own fields such as `__key__`."""
    try:
        with path.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTar(address, f"webdataset cannot read it ({error.args[0]})") from error


def check_agreement(samples: Sequence[TarSample], path: Path, address: str) -> None:
    """Raise DamagedTar unless webdataset's own reader finds these samples, in this order, with contents of these lengths."""
    count = 0
    for count, theirs in enumerate(read_by_webdataset(path, address), 1):
        ours = samples[count - 1] if count <= len(samples) else None
        lengths = {name: len(data) for name, data in theirs.items() if not name.startswith("__")}
        if ours is None or ours.key != theirs["__key__"] or lengths != {n: m.size for n, m in ours.members.items()}:
            raise DamagedTar(
                address,
                f"sample {count} is {theirs['__key__']!r} to webdataset and {ours.key if ours else None!r} by the tar's headers",
            )
    if count != len(samples):
        raise DamagedTar(address, f"webdataset reads {count} samples, the headers list {len(samples)}")


def content_of(member: Member, file: BinaryIO) -> bytes:
    """Return a member's bytes from the open tar."""
    file.seek(member.offset)
    return file.read(member.size)


def _entry(member: tarfile.TarInfo, address: str) -> Entry:
    if not encodable(member.name):
        raise DataError(f"{address}: the name {member.name!r} is not UTF-8. Rename the file and write the tar again")
    if member.isreg():
        return Member(member.name, member.offset_data, member.size)
    if member.islnk():
        return Link(member.name, "hard link", posixpath.normpath(member.linkname))
    if member.issym():
        target = posixpath.join(posixpath.dirname(member.name), member.linkname)
        return Link(member.name, "symbolic link", posixpath.normpath(target))
    return OtherMember(member.name, _SPECIAL.get(member.type, "unknown type"))


def _target(link: Link, files: Mapping[str, Member], links: Mapping[str, Link]) -> Member | None:
    """Return the file that a link leads to, or None if that is no file of the tar, or a link to itself."""
    # GNU tar stores a file that is named twice on the command line as a link to itself: nothing that is not there already
    # also stops a chain of links that leads round in a circle
    passed = {posixpath.normpath(link.name)}
    following: Link | None = link
    while following and following.target not in passed:
        if following.target in files:
            return files[following.target]
        passed.add(following.target)
        following = links.get(following.target)
    return None


def _check_end(file: BinaryIO, end: int, address: str, *, after: str) -> None:
    """Check that the archive ends in two blocks of zeros, and that nothing but zeros follows."""
    # read on from where tarfile stopped: it does not look behind what it takes for the end
    file.seek(end)
    length = 0
    while data := file.read(_CHUNK):
        if data.strip(b"\0"):
            at = end + length + len(data) - len(data.lstrip(b"\0"))
            raise DamagedTar(
                address,
                f"the header after {after} is damaged, or something follows the end of the archive (byte {at}), and readers would "
                "silently stop here",
            )
        length += len(data)
    if length < _END_MARKER:
        raise DamagedTar(address, f"it ends after {after} without an end marker, so it was cut off")


def _is_meta(name: str) -> bool:
    """Return whether webdataset ignores the member: `__name__`, and everything below a folder of that form."""
    first = name.partition("/")[0]
    return len(first) >= 4 and first.startswith("__") and first.endswith("__")
