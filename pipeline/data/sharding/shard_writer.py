"""Images into WebDataset tars: a task writes one planned shard, and may run any number of times.

Shard: a plain USTAR tar with `<key>.jpg` and, for labelled images, `<key>.cls`; key = sample id in 12 digits. Times, owner
and mode are fixed, so the same plan gives the same bytes anywhere. It is stored at `shards/<2 hex>/<sha256>.tar`, and its
record after it (`shard_record.py`). If an image could not be read (the file vanished, access was denied, or its decoder is not
installed), the record gets a name of its own, so that the next attempt reads again.
Parquet tables: the same, with rows in place of paths; a task reads the row groups that hold its rows. Tars of other authors
are not rewritten but indexed (`tar_index.py`).
Units: bytes. Memory: one image at a time; for Parquet tables, the images of one shard.
Errors: StorageError when a store is down; DataError when too many images are bad."""

import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from webdataset import TarWriter

from pipeline.data.dataset.digests import json_digest
from pipeline.data.dataset.schema import NO_LABEL, QuarantineRow, SampleRow, SnapshotRow
from pipeline.data.images.intake import Accepted, IntakePolicy, Refused, accept_image
from pipeline.data.sharding.shard_plan import ShardPlan
from pipeline.data.sharding.shard_record import (
    ShardRecord,
    ShardResult,
    quarantine_row,
    read_record,
    record_key,
    sample_columns,
    sample_row,
    write_record,
)
from pipeline.data.sources.listing import special_file
from pipeline.data.sources.tables import read_images
from pipeline.errors import DataError
from pipeline.storage import DeniedObject, MissingObject, Store, open_store
from pipeline.storage.files import file_sha256

_UNREAD = {"missing", "denied", "not_a_file"}
"""Reasons of images that could not be read and may be readable at the next attempt."""


def write_shard(
    plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy, image_column: str = ""
) -> ShardResult:
    """Write the shard and then its record, or return the record at once if it exists. `image_column`: for Parquet tables."""
    root = open_store(root_uri)
    key = record_key(plan.digest)
    if root.exists(key):
        return read_record(root, key, reused=True)
    accept = (
        _table_reader(plan, source, policy, image_column)
        if image_column
        else partial(_accept_file, open_store(source), policy=policy)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        samples, quarantine = _write_tar(path, plan, accept)
        record: ShardRecord = {
            "shard": plan.shard,
            "split": plan.split,
            "key": "",
            "bytes": 0,
            "sha256": "",
            "samples": sample_columns(samples),
            "quarantine": quarantine,
        }
        if samples:
            sha256 = file_sha256(path)
            record |= {"key": f"shards/{sha256[:2]}/{sha256}.tar", "bytes": path.stat().st_size, "sha256": sha256}
            # an attempt that was killed before it wrote its record may have left exactly these bytes
            if not root.exists(record["key"]):
                root.upload(record["key"], path)
    # under the plan's own key the record would be final, and an image that could not be read would never be tried again,
    # nor one whose decoder is installed later
    passing = {"no_decoder"} if image_column else {"no_decoder", *_UNREAD}
    if any(row["reason"] in passing for row in quarantine):
        key = record_key(plan.digest, f"-{json_digest(record)[:16]}")
    return write_record(root, key, record)


def payload_offsets(path: Path) -> list[int]:
    """Return where the image of each sample starts in a tar, by walking its headers."""
    with tarfile.open(path) as tar:
        return [member.offset_data for member in tar if member.name.endswith(".jpg")]


def check_bad_share(listed: int, bad: Sequence[QuarantineRow], *, bad_share_stop: float) -> None:
    """Raise DataError if more than this share of the listed images was refused."""
    share = len(bad) / max(1, listed)
    if share > bad_share_stop:
        first = "; ".join(f"{row['source']} ({row['reason']}: {row['detail']})" for row in bad[:3])
        raise DataError(
            f"{len(bad)} of {listed} images are bad ({share:.1%}), more than data.bad_share_stop={bad_share_stop} allows. "
            f"First: {first}. Repair or remove them and name a new data.snapshot, or raise data.bad_share_stop; shards "
            "already written are kept"
        )


def too_many_bytes(size: int, policy: IntakePolicy) -> Refused | None:
    """Refuse, before reading, a file too large to be an image of the allowed size."""
    limit = 2**20 + 8 * policy.image_max_pixels  # the largest bitmap has 8 bytes per pixel: RGBA of 16 bit
    if size <= limit:
        return None
    return Refused("too_many_bytes", f"{size} bytes, more than the {limit} that image_max_pixels allows")


def _write_tar(
    path: Path, plan: ShardPlan, accept: Callable[[SnapshotRow], Accepted | Refused]
) -> tuple[list[SampleRow], list[QuarantineRow]]:
    samples: list[SampleRow] = []
    quarantine: list[QuarantineRow] = []
    rows: list[SnapshotRow] = plan.samples.to_pylist()
    # fixed owner, mode and time: the tar's bytes, and so its key, must not depend on who writes it and when
    # encoder=False: the values are bytes as they are to be stored, and webdataset would encode them by suffix
    with path.open("wb") as file, TarWriter(file, "root", "root", 0o444, encoder=False, mtime=0) as tar:
        for row in rows:
            image = accept(row)
            if isinstance(image, Refused):
                quarantine.append(quarantine_row(row, image))
                continue
            key = f"{row['sample_id']:012d}"
            member = {"__key__": key, "jpg": image.data}
            if row["label"] != NO_LABEL:
                member["cls"] = str(row["label"]).encode()
            tar.write(member)
            # the offset is known once the tar is whole
            samples.append(sample_row(row, image, shard=plan.shard, split=plan.split, key=key, offset=0))
    for sample, offset in zip(samples, payload_offsets(path), strict=True):
        sample["offset"] = offset
    return samples, quarantine


def _accept_file(images: Store, row: SnapshotRow, *, policy: IntakePolicy) -> Accepted | Refused:
    """Read and accept or refuse one file. A store that is down raises; a missing file does not."""
    if refused := too_many_bytes(row["size"], policy):
        return refused
    if row["size"] == 0 and (
        kind := special_file(images, row["path"])
    ):  # asked before reading: opening a FIFO would block
        return Refused("not_a_file", f"it is a {kind}, not a regular file. Remove it, or put the image itself there")
    try:
        data = images.read(row["path"])
    except MissingObject as error:
        return Refused("missing", str(error))
    except DeniedObject as error:
        return Refused("denied", str(error))
    return accept_image(data, policy)


def _table_reader(
    plan: ShardPlan, source: str, policy: IntakePolicy, column: str
) -> Callable[[SnapshotRow], Accepted | Refused]:
    """Read all images of the plan first: row groups come in the order of the files, the tar has another order."""
    images = dict(_accept_rows(plan, source, policy, column))
    return lambda row: images.pop(row["path"])  # pop: each image is freed once it is in the tar


def _accept_rows(
    plan: ShardPlan, source: str, policy: IntakePolicy, column: str
) -> Iterator[tuple[str, Accepted | Refused]]:
    for name, data in read_images(source, plan.samples, column):
        if isinstance(data, Refused):
            yield name, data
        else:
            yield name, too_many_bytes(len(data), policy) or accept_image(data, policy)
