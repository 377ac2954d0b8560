"""Files that real people have, each stored as what it shows, or refused with a reason: no damage laundered, no value misread.

Every file is built here. `shows` is the picture that a viewer would show; None if the image must be refused."""

import io
import os
import socket
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from data_kit import listed, picture, quarantined, sharded, stored, tar_bytes
from PIL import Image, ImageCms

from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.images import optional_formats
from pipeline.data.images.intake import Accepted, IntakePolicy, Refused, accept_image, accept_unchanged
from pipeline.data.images.photos import synthetic
from pipeline.errors import DataError
from pipeline.runs.hooks import _remark_on_images

POLICY = IntakePolicy(image_max_short_side=256)
PHOTO = Image.open(io.BytesIO(synthetic(3))).convert("RGB").resize((240, 180))
GREY = PHOTO.convert("L")
LEVELS = np.tile(
    np.arange(32, dtype=np.int64) * 2114, (32, 1)
)  # [32, 32], 0 to 65534: black on the left, white on the right
RAMP = Image.fromarray((LEVELS >> 8).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hole(data: bytes, at: float = 0.5, length: int = 900) -> bytes:
    """Return the data with zeros in their middle, as of a bad sector."""
    start = int(len(data) * at)
    return data[:start] + bytes(length) + data[start + length :]


def before_end(data: bytes, strays: bytes) -> bytes:
    return data[:-2] + strays + data[-2:]


def in_header(data: bytes, strays: bytes = b"abc") -> bytes:
    tables = data.index(b"\xff\xc4")
    return data[:tables] + strays + data[tables:]


def without_adobe(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def tiff(values: np.ndarray, photometric: int, bits: tuple[int, ...] = (16,), **tags: int) -> bytes:
    """Return an uncompressed TIFF of one strip; `tags` are named t281 and so on."""
    height, width = values.shape[:2]
    body = values.tobytes()
    entries = [(256, 4, (width,)), (257, 4, (height,)), (258, 3, bits), (259, 3, (1,)), (262, 3, (photometric,))]
    entries += [(277, 3, (len(bits),)), (278, 4, (height,)), (279, 4, (len(body),))]
    entries += [(int(name[1:]), 3, (value,) * len(bits)) for name, value in tags.items()]
    end = 8 + 2 + 12 * (len(entries) + 1) + 4
    beyond = b""  # values that do not fit into their entry
    written = []
    for tag, kind, given in entries:
        raw = struct.pack(f"<{len(given)}{'H' if kind == 3 else 'I'}", *given)
        if len(raw) > 4:
            beyond, raw = beyond + raw, struct.pack("<I", end + len(beyond))
        written.append((tag, struct.pack("<HHI", tag, kind, len(given)) + raw.ljust(4, b"\0")))
    written.append((273, struct.pack("<HHII", 273, 4, 1, end + len(beyond))))
    directory = b"".join(entry for _, entry in sorted(written))
    return b"II*\0" + struct.pack("<IH", 8, len(written)) + directory + bytes(4) + beyond + body


def packed(values: np.ndarray) -> np.ndarray:
    """Return 12-bit values, two in three bytes."""
    pairs = values.reshape(len(values), -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    return three.reshape(len(values), -1).astype(np.uint8)


def twelve_bit_tiff() -> bytes:
    data = bytearray(tiff(packed(LEVELS >> 4), 1, (12,)))
    at = data.index(struct.pack("<HHI", 256, 4, 1)) + 8
    data[at : at + 4] = struct.pack("<I", 32)  # the width in pixels, not in bytes
    return bytes(data)


def as_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert lab is not None
    return lab


def eight_bit_palette() -> bytes:
    """Return a TIFF whose writer put 8-bit values into the 16-bit palette."""
    data = encoded(PHOTO.quantize(16), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        colours = image.tag_v2[320]
    return data.replace(
        struct.pack(f"<{len(colours)}H", *colours), struct.pack(f"<{len(colours)}H", *(c >> 8 for c in colours))
    )


def with_alpha(kind: str, mode: str = "RGBA") -> bytes:
    image = PHOTO.convert(mode)
    image.putalpha(Image.fromarray(np.tile(np.repeat([0, 255], 120).astype(np.uint8), (180, 1))))
    return encoded(image, kind)


def half_white(image: Image.Image) -> Image.Image:
    shown = image.convert("RGB").copy()
    shown.paste("white", (0, 0, 120, 180))
    return shown


def clear_palette() -> bytes:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (16, 0, 32, 32))
    return encoded(image, "GIF", transparency=0)


def blue_half() -> Image.Image:
    shown = Image.new("RGB", (32, 32), "white")
    shown.paste("blue", (16, 0, 32, 32))
    return shown


def clear_bilevel() -> bytes:
    return encoded(RAMP.point(lambda v: 255 * (v > 127)).convert("1"), "PNG", transparency=0)


def clear_deep_grey() -> bytes:
    values = np.where(LEVELS < 20_000, 7, LEVELS).astype(np.uint16)
    return encoded(Image.fromarray(values), "PNG", transparency=7)


def light_above(threshold: int) -> Image.Image:
    return Image.fromarray(np.where(threshold > LEVELS, 255, LEVELS >> 8).astype(np.uint8))


BIG = PHOTO.resize((800, 600))
SIX = np.repeat(LEVELS[..., None], 3, axis=2).astype("<u2")  # three equal channels of 16 bit
JPEG = encoded(PHOTO, quality=90)
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


class Case(NamedTuple):
    data: bytes
    policy: str
    """Policy of the stored image, or the reason of the refusal."""
    shows: Image.Image | None = None
    says: str = ""
    """Words of the refusal."""
    in_tar: str = "needs_reencoding"
    """Policy or reason if the same bytes are in a tar."""


DAMAGED = {"policy": "truncated", "in_tar": "truncated", "says": "premature end of data segment"}
OFF_BEAT = {"policy": "unreadable", "in_tar": "unreadable", "says": "earlier ones are damaged"}
CASES = {
    # damage, and what is none
    "a whole jpeg": Case(JPEG, "kept", PHOTO, in_tar="indexed"),
    "bytes behind the end": Case(JPEG + b"a trailer" * 9, "kept", PHOTO, in_tar="indexed"),
    "a second jpeg behind the end": Case(JPEG + JPEG, "kept", PHOTO, in_tar="indexed"),
    "zeros before the end marker": Case(before_end(JPEG, bytes(90)), "reencoded:repaired", PHOTO),
    "four bytes before the end marker": Case(before_end(JPEG, b"junk"), "reencoded:repaired", PHOTO),
    "bytes between segments": Case(in_header(JPEG), "reencoded:repaired", PHOTO),
    "both": Case(before_end(in_header(JPEG), bytes(90)), "reencoded:repaired", PHOTO),
    "bytes between segments of a large jpeg": Case(in_header(encoded(BIG)), "reencoded:resized,repaired"),
    "a hole": Case(hole(JPEG, 0.3, 4000), **OFF_BEAT),
    "a hole at the end": Case(JPEG[:-402] + bytes(400) + JPEG[-2:], **DAMAGED),
    "a hole behind a harmless fault": Case(hole(in_header(JPEG), 0.3, 4000), **OFF_BEAT),
    "a hole in a jpeg to be resized": Case(hole(encoded(BIG, quality=90), 0.5, 4000), **DAMAGED),
    "a hole in a grey jpeg": Case(hole(encoded(BIG.convert("L"), quality=90), 0.5, 4000), **DAMAGED),
    "a hole in a cmyk jpeg": Case(hole(encoded(BIG.convert("CMYK"), quality=90), 0.5, 4000), **DAMAGED),
    "a hole in a turned jpeg": Case(hole(encoded(BIG, exif=TURNED), 0.5, 4000), **DAMAGED),
    "a hole in a progressive jpeg": Case(
        hole(encoded(BIG, progressive=True, quality=90), 0.5, 4000), "unreadable", in_tar="unreadable"
    ),
    "no end marker": Case(JPEG[:-2], "truncated", in_tar="truncated"),
    "codes left over": Case(before_end(JPEG, JPEG[-300:-2]), "unreadable", says="earlier ones are damaged", in_tar="unreadable"),
    "a whole jpeg in a tiff": Case(encoded(PHOTO, "TIFF", compression="jpeg", quality=90), "reencoded:tiff", PHOTO),
    "a hole in the jpeg of a tiff": Case(hole(encoded(PHOTO, "TIFF", compression="jpeg", quality=90), 0.5, 300), "truncated"),
    # values and their meaning
    "16 bit, black is zero": Case(tiff(LEVELS.astype("<u2"), 1), "reencoded:tiff,16bit,grayscale", RAMP),
    "16 bit, white is zero": Case(tiff((65535 - LEVELS).astype("<u2"), 0), "reencoded:tiff,16bit,grayscale", RAMP),
    "8 bit, white is zero": Case(tiff((255 - (LEVELS >> 8)).astype(np.uint8), 0, (8,)), "reencoded:tiff,grayscale", RAMP),
    "12 bit in 16": Case(tiff((LEVELS >> 4).astype("<u2"), 1, t281=4095), "reencoded:tiff,16bit,grayscale", RAMP),
    "12 bit in 16, white is zero": Case(
        tiff((4095 - (LEVELS >> 4)).astype("<u2"), 0, t281=4095), "reencoded:tiff,16bit,grayscale", RAMP
    ),
    "12 bit in 16, by its largest value": Case(
        tiff((LEVELS >> 4).astype("<u2"), 1, t281=4000), "reencoded:tiff,16bit,grayscale", RAMP
    ),
    "a largest value that is none": Case(tiff(LEVELS.astype("<u2"), 1, t281=4095), "reencoded:tiff,16bit,grayscale", RAMP),
    "12 bit, packed": Case(twelve_bit_tiff(), "reencoded:tiff,16bit,grayscale", RAMP),
    "signed 16 bit": Case(tiff(LEVELS.astype("<i2"), 1, t339=2), "unsupported", says="signed"),
    "32 bit": Case(tiff(LEVELS.astype("<u4"), 1, (32,)), "unsupported", says="no agreed range"),
    "floating point": Case(tiff(LEVELS.astype("<f4"), 1, (32,), t339=3), "unsupported", says="no agreed range"),
    "16-bit colours": Case(tiff(SIX, 2, (16, 16, 16)), "reencoded:tiff", RAMP),
    "12-bit colours in 16": Case(tiff(SIX >> 4, 2, (16, 16, 16), t281=4095), "unsupported", says="almost black"),
    "inks of a printer": Case(encoded(PHOTO.convert("CMYK"), "TIFF", tiffinfo={332: 2}), "unsupported", says="inks"),
    "cmyk tiff": Case(encoded(PHOTO.convert("CMYK"), "TIFF"), "reencoded:tiff,cmyk", PHOTO),
    "ycbcr tiff": Case(encoded(PHOTO.convert("YCbCr"), "TIFF"), "reencoded:tiff,mode_ycbcr", PHOTO),
    "cielab tiff": Case(encoded(as_lab(PHOTO), "TIFF"), "reencoded:tiff,mode_lab", PHOTO),
    "palette tiff": Case(encoded(PHOTO.quantize(64), "TIFF"), "reencoded:tiff,palette", PHOTO.quantize(64)),
    "palette of 8 bit in a tiff": Case(eight_bit_palette(), "unsupported", says="palette"),
    "bilevel tiff": Case(encoded(PHOTO.convert("1"), "TIFF"), "reencoded:tiff,grayscale", PHOTO.convert("1")),
    "fax, white is zero": Case(
        encoded(PHOTO.convert("1"), "TIFF", compression="group4"), "reencoded:tiff,grayscale", PHOTO.convert("1")
    ),
    "inverted cmyk of adobe": Case(encoded(PHOTO.convert("CMYK"), quality=95), "reencoded:cmyk", PHOTO),
    "cmyk jpeg of unknown sense": Case(without_adobe(encoded(PHOTO.convert("CMYK"))), "unsupported", says="inverted or not"),
    "grey with alpha": Case(with_alpha("PNG", "LA"), "reencoded:png,grayscale,alpha", half_white(GREY)),
    "colour with alpha": Case(with_alpha("PNG"), "reencoded:png,alpha", half_white(PHOTO)),
    "webp with alpha": Case(with_alpha("WEBP"), "reencoded:webp,alpha", half_white(PHOTO)),
    "a palette with a clear entry": Case(clear_palette(), "reencoded:gif,palette,alpha", blue_half()),
    "bilevel with a clear value": Case(clear_bilevel(), "reencoded:png,grayscale,alpha", Image.new("RGB", (32, 32), "white")),
    "16 bit with a clear value": Case(clear_deep_grey(), "reencoded:png,16bit,alpha,grayscale", light_above(20_000)),
    # formats that need a decoder
    "avif": Case(encoded(PHOTO, "AVIF", quality=95), "reencoded:avif", PHOTO),
    "an avif cut short": Case(encoded(PHOTO, "AVIF")[:-900], "unreadable"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_stored_as_what_it_shows_or_refused(name):
    case = CASES[name]
    got = accept_image(case.data, POLICY)
    if isinstance(got, Refused):
        assert (got.reason, case.says in got.detail) == (case.policy, True), got
        assert case.shows is None
    else:
        assert got.policy == case.policy
        assert got.data == case.data or got.policy != "kept"
        if case.shows is not None:
            with Image.open(io.BytesIO(got.data)) as image:
                difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(case.shows.convert("RGB"), int))
            # JPEG and chroma cost up to 4 levels on the mean here; a negative, or black, costs 80
            assert difference.mean() < 8
    in_tar = accept_unchanged(case.data, POLICY)
    assert (in_tar.policy if isinstance(in_tar, Accepted) else in_tar.reason) == case.in_tar


def test_heic_is_stored_where_its_decoder_is_installed():
    pytest.importorskip("pillow_heif").register_heif_opener()
    got = accept_image(encoded(PHOTO, "HEIF", quality=95), POLICY)
    assert isinstance(got, Accepted)
    assert got.policy == "reencoded:heif"
    with Image.open(io.BytesIO(got.data)) as image:
        assert np.abs(np.asarray(image, int) - np.asarray(PHOTO, int)).mean() < 8


HEIC_HEADER = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(99)


def test_without_a_decoder_the_way_out_is_named_and_taken(tmp_path, monkeypatch):
    (tmp_path / "source" / "cat").mkdir(parents=True)
    (tmp_path / "source" / "cat" / "0.HEIC").write_bytes(HEIC_HEADER)
    (tmp_path / "source" / "cat" / "1.jpg").write_bytes(picture(1))
    (tmp_path / "source" / "cat" / "2.avif").write_bytes(encoded(PHOTO, "AVIF"))
    source = str(tmp_path / "source")
    listing = listed(source, tmp_path / "snapshot")
    assert listing.facts["listed"] == 3
    with monkeypatch.context() as patched:
        patched.setattr(optional_formats, "_installed", lambda kind: False)
        with pytest.raises(
            DataError, match=r"cat/0\.HEIC \(no_decoder: it is HEIF.*pip install 'mae-pipeline\[heif\]'"
        ):
            sharded(source, listing, tmp_path / "root")
        shards = sharded(source, listing, tmp_path / "root", bad_share_stop=1.0)
        assert quarantined(shards) == {"cat/0.HEIC": "no_decoder", "cat/2.avif": "no_decoder"}
        assert (
            _remark_on_images(DatasetFacts.read(shards.facts))
            == "2 images quarantined (2 no_decoder, such as cat/0.HEIC)"
        )
    # with the decoder, the same listing is read again instead of the refusal being kept
    again = sharded(source, listing, tmp_path / "root", generation=2, bad_share_stop=1.0)
    assert "cat/2.avif" in stored(again)


# Tars


def linked(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE
APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100)
A, B = ("cat/a.jpg", picture(1)), ("cat/b.jpg", picture(2))
TARS = {
    # members, {served name: number of its picture}, {reason: files of no sample}
    "a hard link": ([A, linked("dog/a.jpg", "cat/a.jpg", HARD)], {"cat/a.jpg": 1, "dog/a.jpg": 1}, {}),
    "a hard link below a dot": (
        [("./cat/a.jpg", A[1]), linked("./dog/a.jpg", "./cat/a.jpg", HARD)],
        {"./cat/a.jpg": 1, "./dog/a.jpg": 1},
        {},
    ),
    "a hard link to what comes later": ([linked("dog/a.jpg", "cat/a.jpg", HARD), A], {"cat/a.jpg": 1}, {"hard link": 1}),
    "a hard link to the first of two": (
        [A, linked("x/a.jpg", "cat/a.jpg", HARD), B, ("cat/a.jpg", picture(3))],
        {"cat/a.jpg": 3, "x/a.jpg": 1, "cat/b.jpg": 2},
        {},
    ),
    "a file named twice": ([A, B, linked("cat/a.jpg", "cat/a.jpg", HARD)], {"cat/a.jpg": 1, "cat/b.jpg": 2}, {"hard link": 1}),
    "a symbolic link": ([A, linked("dog/a.jpg", "../cat/a.jpg", SOFT)], {"cat/a.jpg": 1, "dog/a.jpg": 1}, {}),
    "a symbolic link to what comes later": ([linked("dog/a.jpg", "../cat/a.jpg", SOFT), A], {"cat/a.jpg": 1, "dog/a.jpg": 1}, {}),
    "a link to a link": (
        [A, linked("b/1.jpg", "../c/1.jpg", SOFT), linked("c/1.jpg", "cat/a.jpg", HARD)],
        {"cat/a.jpg": 1, "b/1.jpg": 1, "c/1.jpg": 1},
        {},
    ),
    "links in a ring": (
        [A, linked("b/1.jpg", "2.jpg", SOFT), linked("b/2.jpg", "1.jpg", SOFT)],
        {"cat/a.jpg": 1},
        {"symbolic link": 2},
    ),
    "a link out of the tar": ([A, linked("b/1.jpg", "/data/1.jpg", SOFT)], {"cat/a.jpg": 1}, {"symbolic link": 1}),
    "a link to a folder": ([A, linked("dog", "cat", SOFT)], {"cat/a.jpg": 1}, {"symbolic link": 1}),
    "a pipe and devices": (
        [A, linked("p.jpg", "", tarfile.FIFOTYPE), linked("c.jpg", "", tarfile.CHRTYPE), linked("d.jpg", "", tarfile.BLKTYPE)],
        {"cat/a.jpg": 1},
        {"FIFO": 1, "character device": 1, "block device": 1},
    ),
    "of a mac": ([("cat/._a.jpg", APPLE), A, ("cat/._b.jpg", APPLE), B], {"cat/a.jpg": 1, "cat/b.jpg": 2}, {"hidden": 2}),
    "of a mac's zip": ([A, ("__MACOSX/cat/._a.jpg", APPLE), ("__MACOSX/x.jpg", APPLE)], {"cat/a.jpg": 1}, {"hidden": 2}),
    "of a mac, from its root": ([("./._a.jpg", APPLE), ("./a.jpg", A[1])], {"./a.jpg": 1}, {"hidden": 1}),
    "of a synology": ([A, ("cat/@eaDir/a.jpg/THUMB.jpg", picture(9))], {"cat/a.jpg": 1}, {"hidden": 1}),
    "hidden files": ([A, (".cache/b.jpg", picture(9)), ("cat/.b.jpg", picture(9))], {"cat/a.jpg": 1}, {"hidden": 2}),
    "above its folder": ([("../cat/a.jpg", A[1])], {"../cat/a.jpg": 1}, {}),
    "notes": ([("README", b"words"), A, ("__index__", b"{}")], {"cat/a.jpg": 1}, {"no sample": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_every_member_of_a_tar_is_served_or_counted_with_its_reason(tmp_path, name):
    members, served, reasons = TARS[name]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.tar").write_bytes(tar(*members))
    source = str(tmp_path / "source")
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    rows = stored(shards)
    assert {path: row["data"] for path, row in rows.items()} == {
        f"x.tar/{one}": picture(n) for one, n in served.items()
    }
    facts = DatasetFacts.read(shards.facts)
    assert (facts.other_members, facts.other_reasons) == (sum(reasons.values()), reasons)
    remark = _remark_on_images(facts)
    assert all(f"{number} {reason}" in remark for reason, number in reasons.items())
    assert all(path.startswith("x.tar/") for paths in (facts.other_examples or {}).values() for path in paths)


def test_labels_stay_with_their_images_between_files_of_a_mac_and_links(tmp_path):
    members = [
        part
        for number in range(3)
        for part in (
            (f"cat/._{number}.jpg", APPLE),
            (f"cat/{number}.jpg", picture(number)) if number < 2 else linked("cat/2.jpg", "cat/1.jpg", HARD),
            (f"cat/._{number}.cls", APPLE),
            (f"cat/{number}.cls", b"%d" % number),
        )
    ]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.tar").write_bytes(tar(*members))
    source = str(tmp_path / "source")
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root")
    assert {Path(path).name: row["class"] for path, row in stored(shards).items()} == {
        "0.jpg": "0",
        "1.jpg": "1",
        "2.jpg": "2",
    }
    assert shards.facts["contradicting_labels"]["images"] == 1
    assert shards.facts["counts"]["total"]["served"] == 3


# Folders


def test_pipes_and_sockets_named_like_images_are_quarantined_and_never_opened(tmp_path, monkeypatch):
    folder = tmp_path / "source" / "cat"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to("pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    monkeypatch.chdir(folder)  # the path of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.jpg")
    source = str(tmp_path / "source")
    shards = sharded(source, listed(source, tmp_path / "snapshot"), tmp_path / "root", bad_share_stop=1.0)
    special = {f"cat/{name}.jpg": "not_a_file" for name in ("link", "pipe", "socket")}
    assert quarantined(shards) == special | {"cat/gone.jpg": "missing"}
    assert "3 not_a_file, such as cat/link.jpg" in _remark_on_images(DatasetFacts.read(shards.facts))


@pytest.mark.parametrize("name", ["x.tar", "x.parquet"])
def test_a_pipe_in_place_of_a_tar_or_table_is_refused_by_name(tmp_path, name):
    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / name)
    with pytest.raises(DataError, match=rf"{name} is a FIFO, not a regular file"):
        listed(str(tmp_path / "source"), tmp_path / "snapshot")


def test_files_that_systems_keep_for_themselves_are_ignored_and_counted(tmp_path):
    for name in ("cat/0.jpg", "cat/._0.jpg", "__MACOSX/cat/0.jpg", "cat/@eaDir/0.jpg/THUMB.jpg", ".cache/0.jpg"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(picture(0))
    facts = listed(str(tmp_path / "source"), tmp_path / "snapshot").facts
    assert (facts["listed"], facts["ignored"], facts["classes"]) == (1, 4, ["cat"])


def test_a_folder_and_a_tar_judge_damage_alike(tmp_path):
    files = {f"{number}.jpg": case.data for number, case in enumerate(CASES.values()) if case.data[:2] == b"\xff\xd8"}
    for name, data in files.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x.tar").write_bytes(tar_bytes(files.items()))
    found = []
    for kind in ("folder", "tars"):
        source = str(tmp_path / kind)
        shards = sharded(
            source, listed(source, tmp_path / f"{kind}-list"), tmp_path / f"{kind}-root", bad_share_stop=1.0
        )
        refused = quarantined(shards).items()
        found.append({Path(path).name: why for path, why in refused if why not in {"needs_reencoding", "unsupported"}})
    assert found[0] == found[1]
    assert len(found[0]) > 8
