"""Images into WebDataset tars: the plan is pure, and writing one planned shard is a task that may run any number of times.

Plan: in every split the samples stand in the order of a keyed hash of their paths (random, and the same at every retry)
and are cut into runs of equal planned bytes. Only snapshot, seed and limits decide, never the number of tasks.
Shard: a plain USTAR tar, `<key>.jpg` and, when labelled, `<key>.cls`; key = sample id, 12 digits; times, owner and mode
are fixed, so that the same plan gives the same bytes anywhere. It lies at `shards/<2 hex>/<sha256>.tar`.
Row: `rows/<plan digest>.json`, put-if-absent and last: it exists, so the shard is done. A row with a reading error
(file vanished, permission) is kept under a name of its own, so that the next attempt reads again.
Parquet tables: the same, with rows for paths; a task reads the row groups that hold its rows. Tars of others are not
written anew but indexed (`pipeline/data/dataset/tar_index.py`).
Units: bytes. Errors: StorageError when a store is down; DataError when too many images are bad."""

import hashlib
import json
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from webdataset import TarWriter

from pipeline.data.dataset.manifest import NO_LABEL, QUARANTINE, SAMPLES, json_digest
from pipeline.data.dataset.shard_plan import IntakePolicy, ShardPlan
from pipeline.data.images.intake import Refused, Taken, take_in
from pipeline.data.sources.tables import read_images
from pipeline.errors import DataError
from pipeline.storage import DeniedObject, MissingObject, Store, open_store


@dataclass(frozen=True)
class ShardRow:
    """What a task tells: the small part of a row; the samples are in the row object."""

    row_key: str
    shard: int
    split: str
    key: str
    """Of the tar (`pipeline.data.dataset.manifest.locate`); empty when every image was refused."""
    bytes: int
    sha256: str
    samples: int
    quarantine: tuple[Mapping[str, Any], ...]
    """Rows of quarantine.parquet."""
    reused: bool
    """An earlier attempt had written it."""
    classes: tuple[str, ...] | None = None
    """Of an indexed tar: what its labels index; its samples count from 0. None: labels and ids are the snapshot's."""
    other_members: int = 0
    """Files of an indexed tar that belong to no sample."""


def write_shard(
    plan: ShardPlan, *, source: str, root_uri: str, policy: IntakePolicy, image_column: str = ""
) -> ShardRow:
    """Writes the shard and, last, its row; returns at once when the row exists. `image_column`: of Parquet tables."""
    root = open_store(root_uri)
    row_key = f"rows/{plan.digest}.json"
    if root.exists(row_key):
        return stored_row(root, row_key, reused=True)
    fetch = _fetcher(plan, source, policy, image_column)
    samples: list[dict[str, Any]] = []
    quarantine: list[dict[str, Any]] = []
    unread = 0
    key = sha256 = ""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        with path.open("wb") as file, TarWriter(file, "root", "root", 0o444, encoder=False, mtime=0) as tar:
            for planned in plan.samples.to_pylist():
                taken, was_read = fetch(planned)
                if isinstance(taken, Refused):
                    unread += not was_read
                    quarantine.append(quarantine_row(planned, taken))
                    continue
                name = f"{planned['sample_id']:012d}"
                member = {"__key__": name, "jpg": taken.data}
                if planned["label"] != NO_LABEL:
                    member["cls"] = str(planned["label"]).encode()
                tar.write(member)
                samples.append(sample_row(plan, planned, taken, key=name))
        if samples:
            for row, offset in zip(samples, payload_offsets(path), strict=True):
                row["offset"] = offset
            sha256 = file_sha256(path)
            key, size = f"shards/{sha256[:2]}/{sha256}.tar", path.stat().st_size
            if not root.exists(key):
                root.upload(key, path)
    document = {
        "shard": plan.shard,
        "split": plan.split,
        "key": key,
        "bytes": size,
        "sha256": sha256,
        "samples": {name: [row[name] for row in samples] for name in SAMPLES.names},
        "quarantine": quarantine,
    }
    if unread:
        row_key = f"rows/{plan.digest}-{json_digest(document)[:16]}.json"
    root.create(row_key, json.dumps(document, sort_keys=True).encode())
    return stored_row(root, row_key, reused=False)  # as stored: another task may have been first


def read_samples(root: Store, row: ShardRow) -> Any:
    """The samples of a written shard or indexed tar (SAMPLES), all marked served."""
    return pa.table(json.loads(root.read(row.row_key))["samples"], schema=SAMPLES)


def file_sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def payload_offsets(path: Path) -> list[int]:
    """Where the image of each sample starts in a tar, by walking its headers."""
    with tarfile.open(path) as tar:
        return [member.offset_data for member in tar if member.name.endswith(".jpg")]


def check_bad_share(listed: int, bad: Sequence[Mapping[str, Any]], *, bad_share_stop: float) -> None:
    """DataError when more than this share of the listed images was refused."""
    share = len(bad) / max(1, listed)
    if share > bad_share_stop:
        first = "; ".join(f"{row['source']} ({row['reason']}: {row['detail']})" for row in bad[:3])
        raise DataError(
            f"{len(bad)} of {listed} images are bad ({share:.1%}), more than data.bad_share_stop={bad_share_stop} allows. "
            f"First: {first}. Repair or remove them and name a new data.snapshot, or raise data.bad_share_stop; shards "
            "already written are kept"
        )


def sample_row(plan: ShardPlan, planned: Mapping[str, Any], taken: Taken, *, key: str) -> dict[str, Any]:
    """A row of samples.parquet, but for the offset."""
    return {
        "sample_id": planned["sample_id"],
        "shard": plan.shard,
        "length": len(taken.data),
        "crc32": zlib.crc32(taken.data),
        "sha256": hashlib.sha256(taken.data).hexdigest(),
        "dhash64": taken.dhash64,
        "width": taken.width,
        "height": taken.height,
        "original_width": taken.original_width,
        "original_height": taken.original_height,
        "label": planned["label"],
        "key": key,
        "source": planned["path"],
        "split": plan.split,
        "served": True,
        "policy": taken.policy,
    }


def quarantine_row(planned: Mapping[str, Any], refused: Refused) -> dict[str, Any]:
    """A row of quarantine.parquet."""
    row = {"source": planned["path"], "split": planned["split"], "label": planned["label"], "bytes": planned["size"]}
    row |= {"reason": refused.reason, "detail": refused.detail}
    return {name: row[name] for name in QUARANTINE.names}


def stored_row(root: Store, row_key: str, *, reused: bool) -> ShardRow:
    """A row as it is in the store."""
    row = json.loads(root.read(row_key))
    small = {name: row[name] for name in ("shard", "split", "key", "bytes", "sha256")}
    classes = row.get("classes")
    return ShardRow(
        row_key,
        **small,
        samples=len(row["samples"]["sample_id"]),
        quarantine=tuple(row["quarantine"]),
        reused=reused,
        classes=None if classes is None else tuple(classes),
        other_members=row.get("other_members", 0),
    )


def _fetcher(
    plan: ShardPlan, source: str, policy: IntakePolicy, image_column: str
) -> Callable[[Mapping[str, Any]], tuple[Taken | Refused, bool]]:
    """What gives the image of a planned row, taken in or refused, and whether it could be read at all."""
    if not image_column:
        return partial(_fetch, open_store(source), policy=policy)
    images = dict(_taken_rows(plan, source, policy, image_column))
    return lambda planned: (images.pop(planned["path"]), True)


def rows_of(root: Store, keys: Collection[str]) -> dict[str, str]:
    """The key of the row that names each of these tars (`shards/...`), where there is one."""
    wanted, found = set(keys), dict[str, str]()
    for info in root.list("rows/"):
        if len(found) == len(wanted):
            break
        # keys are sorted in a row, so that the tar's comes before the samples
        start = root.read_range(info.key, 0, min(info.size, 512)).decode(errors="replace")
        found |= {key: info.key for key in wanted if f'"{key}"' in start}
    return found


def _fetch(images: Store, planned: Mapping[str, Any], policy: IntakePolicy) -> tuple[Taken | Refused, bool]:
    """The image taken in or refused, and whether it could be read at all. A store that is down raises."""
    if refused := too_many_bytes(planned["size"], policy):
        return refused, True
    try:
        data = images.read(planned["path"])
    except (MissingObject, DeniedObject) as error:
        return Refused("missing" if isinstance(error, MissingObject) else "denied", str(error)), False
    return take_in(data, max_side=policy.image_max_short_side, max_pixels=policy.image_max_pixels), True


def _taken_rows(
    plan: ShardPlan, source: str, policy: IntakePolicy, image_column: str
) -> Iterator[tuple[str, Taken | Refused]]:
    """The images of a plan over Parquet tables, in the order of the files; what is taken in is held until the tar is written."""
    for name, data in read_images(source, plan.samples, image_column):
        refused = data if isinstance(data, Refused) else too_many_bytes(len(data), policy)
        if refused is None and isinstance(data, bytes):
            yield name, take_in(data, max_side=policy.image_max_short_side, max_pixels=policy.image_max_pixels)
        elif refused is not None:
            yield name, refused


def too_many_bytes(size: int, policy: IntakePolicy) -> Refused | None:
    """A refusal of what is too large to be an image of allowed size; it is not even read."""
    limit = 2**20 + 8 * policy.image_max_pixels  # no bitmap of allowed size is larger: 16 bit RGBA
    if size <= limit:
        return None
    return Refused("too_many_bytes", f"{size} bytes, allowed are {limit} (from image_max_pixels)")
