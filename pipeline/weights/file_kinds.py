"""Tell what a weight file is by its content: its name can mislead, and a download can fail.

Weights come as safetensors, as the zip archive or the bare pickle of torch.save, or as the JSON index of several files. Whatever
else is found under the name of a weight file is refused by what it is: a git-lfs pointer, a web page, an archive, nothing at all.
Only the first bytes, and the table of contents of a zip archive, are read. Errors: DataError that names the file, what was found
and the way out."""

import zipfile
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError

FileKind = Literal["safetensors", "zip", "pickle", "index"]

_HEAD = 512
_HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses longer headers
_UNPACK = "unpack it and give the weight file in it"
_OTHER = "give the weights of the PyTorch model"
_SIGNATURES = (
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a rar archive", _UNPACK),
    (b"\x93NUMPY", "a NumPy array", "save the model's state_dict()"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them", _OTHER),
    (b"GGUF", "a GGUF file", _OTHER),
    (b"\x89PNG", "an image", _OTHER),
    (b"\xff\xd8\xff", "an image", _OTHER),
    (b"%PDF", "a PDF document", _OTHER),
)
"""First bytes of files that are no weights, what to call such a file, and the way out."""


def file_kind(path: Path) -> FileKind:
    """Return how to read a weight file.

    Raises:
        DataError: The file is not one of weights, or cannot be opened.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as cause:
        raise DataError(f"{path} cannot be read ({cause.strerror}): check its permissions") from cause
    if not head:
        raise DataError(f"{path} is empty (0 bytes): download it again")
    # the length of its header comes first, and may well begin with the byte of a pickle
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _HEADER_LIMIT:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path, size)
        return "zip"
    if head.startswith(b"\x80"):  # pickle's PROTO opcode, from protocol 2 on
        return "pickle"
    if path.name.endswith(".index.json") and head.lstrip()[:1] in (b"{", b"["):
        return "index"
    raise DataError(f"{path} ({size} bytes) is {_describe(head)}")


def _describe(head: bytes) -> str:
    """Return what a file that is no weight file is, and what to do."""
    # A tar archive begins with its first member's name; the signature comes after it.
    if head[257:262] == b"ustar":
        return f"a tar archive, not weights: {_UNPACK}"
    for signature, name, way_out in _SIGNATURES:
        if head.startswith(signature):
            return f"{name}, not weights: {way_out}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte order mark
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the weights: run `git lfs pull` in its repository, or download the file itself"
    if text[:1] == b"<":
        return (
            "a web page (HTML or XML), not weights: the link led to a page or needs a login. Download the file itself, "
            "from a link to the raw file"
        )
    if _is_text(head):
        line = " ".join(text.decode(errors="replace").split())[:60]
        return f"text, not weights, and begins with {line!r}: download the weight file itself"
    return (
        f"not a weight file: it begins with the bytes {head[:8].hex(' ')}. Give a file of torch.save or safetensors, or "
        f"download it again"
    )


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and b"\x7f" not in head


def _check_archive(path: Path, size: int) -> None:
    """Refuse a zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as cause:
        raise DataError(f"{path} ({size} bytes) is damaged or truncated ({cause}): download it again") from cause
    names = [member.filename for member in members]
    if any(name.endswith("constants.pkl") for name in names):
        raise DataError(f"{path} is a TorchScript program, not weights: save its state_dict() as .safetensors")
    # An .npz is a zip archive too.
    if names and all(name.endswith(".npy") for name in names):
        raise DataError(f"{path} is a NumPy archive ({names[0]}, ...), not weights: {_OTHER}")
    if not any(name.split("/")[-1] == "data.pkl" for name in names):
        raise DataError(
            f"{path} is a zip archive of other files ({', '.join(names[:3]) or 'none'}), not weights: {_UNPACK}"
        )
    # torch.save stores its records as they are, so the file's size bounds what they take in memory
    if squeezed := next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None):
        raise DataError(
            f"{path} was compressed after torch.save wrote it ({squeezed.filename}): give the file as it was written"
        )
