"""Photographs to tars: our shard tasks, one and two at a time on Ray, and a loop around webdataset's ShardWriter.

    python -m benchmarks.shard --images DIR
    python -m benchmarks.shard --quick

Ours is what the shard stage runs: planned shards, each a Ray task that reads, decodes, rotates and re-encodes
where needed, hashes (SHA-256 and CRC-32 of each image, perceptual hash, SHA-256 of the tar), writes and uploads
to a folder with fsync, and writes its row. The peer checks each image in the same way, in one process with
Pillow, and writes with ShardWriter, used as in webdataset's README; it makes no row, no hash of the tar and no
fsync. A third variant, the peer with our intake (simplejpeg) instead of Pillow, shows the decoder's part. Ray
has started and its workers have imported everything before the first turn.

Units:  images per second, wall clock. ratio_vs_shardwriter: its time / ours with one task; speedup_2_tasks: the
        time of one task / that of two. Ratios are taken within a turn; median and quartiles over turns.
Errors: SystemExit for a folder without usable JPEGs; PipelineError if Ray does not start."""

import argparse
import hashlib
import io
import json
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from webdataset import ShardWriter

from benchmarks import _data
from benchmarks import _timing as timing
from pipeline import cluster
from pipeline.data.images.decode_speed import cores
from pipeline.data.images.intake import Accepted, IntakePolicy, accept_image, dhash64
from pipeline.data.sharding.shard_plan import ShardPlan, open_snapshot, plan_shards
from pipeline.data.sharding.shard_writer import write_shard

ONE, TWO = "ours, 1 task", "ours, 2 tasks"
WRITER, WRITER_OUR_INTAKE = "ShardWriter, Pillow", "ShardWriter, our intake"
_SHARDS = 4
_ORIENTATION = 0x0112
_POLICY = IntakePolicy()

Way = Callable[[Path], int]
"""Writes shards into a folder and returns the number of images stored."""
Checks = Callable[[bytes], tuple[bytes, int]]
"""Bytes of a file -> bytes to store, and perceptual hash."""


def pillow_checks(data: bytes) -> tuple[bytes, int]:
    """Decode with Pillow; rotate, convert and re-encode where needed. Raises Pillow's error for bytes that do not decode."""
    with PillowImage.open(io.BytesIO(data)) as image:
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        if not turned and image.mode == "RGB" and min(image.size) <= _POLICY.image_max_short_side:
            return data, dhash64(image)
        upright = ImageOps.exif_transpose(image).convert("RGB")
    short = min(upright.size)
    if short > _POLICY.image_max_short_side:
        width, height = (side * _POLICY.image_max_short_side // short for side in upright.size)
        upright = upright.resize((width, height), PillowImage.Resampling.BICUBIC)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue(), dhash64(upright)


def our_checks(data: bytes) -> tuple[bytes, int]:
    """Check an image as our tasks do. Raises ValueError if it is refused."""
    accepted = accept_image(data, _POLICY)
    if not isinstance(accepted, Accepted):
        raise ValueError(f"{accepted.reason}: {accepted.detail}")
    return accepted.data, accepted.dhash64


def write_with_shardwriter(
    plans: Sequence[ShardPlan], source: Path, folder: Path, checks: Checks
) -> list[dict[str, Any]]:
    """Write the same images in the same order in a loop; return what it knows of each."""
    rows = []
    most = max(len(plan.samples) for plan in plans)
    folder.mkdir(parents=True)
    with ShardWriter(str(folder / "%06d.tar"), maxcount=most, verbose=0, encoder=False) as writer:
        for plan in plans:
            for planned in plan.samples.to_pylist():
                data, perceptual = checks((source / planned["path"]).read_bytes())
                key = f"{planned['sample_id']:012d}"
                writer.write({"__key__": key, "jpg": data, "cls": str(planned["label"]).encode()})
                hashes = {"sha256": hashlib.sha256(data).hexdigest(), "crc32": zlib.crc32(data), "dhash64": perceptual}
                rows.append({"key": key, "length": len(data), **hashes})
    return rows


def write_with_tasks(plans: Sequence[ShardPlan], source: Path, folder: Path, *, at_once: int) -> int:
    """Write with our tasks, one at a time or as many as the cluster has cores; return the number of images stored."""
    write = partial(write_shard, source=str(source), root_uri=str(folder), policy=_POLICY)
    groups = [plans] if at_once > 1 else [[plan] for plan in plans]
    return sum(row.samples for group in groups for row in cluster.map_tasks(write, group, executor="ray"))


def seconds_of(ways: Mapping[str, Way], folder: Path, *, images: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every turn, by variant. Raises ValueError if one loses images."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            stored = ways[name](folder / "out")
            seconds[name].append(time.perf_counter() - began)
            if stored != images:
                raise ValueError(f"{name} stored {stored} of {images} images: not the same work")
            shutil.rmtree(folder / "out")
    return seconds


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the table and return the JSON line."""
    found = _data.chosen_photos(options, count=64 if options.quick else 512)
    wanted = options.count or (512 if options.quick else 1024)
    rounds = options.rounds or (3 if options.quick else 7)
    tasks = min(2, cores())
    with tempfile.TemporaryDirectory(prefix="mae-benchmark-") as name:
        scratch = Path(name)
        source = _data.write_files(found.files, scratch / "images", copies=-(-wanted // len(found.files)))
        listing = _data.listed(source, scratch / "snapshot")
        with open_snapshot(listing.store) as snapshot:
            plans = list(plan_shards(snapshot, seed=0, shard_max_bytes=2**27, min_shards=_SHARDS, policy=_POLICY))
        images = sum(len(plan.samples) for plan in plans)
        ways: dict[str, Way] = {
            ONE: partial(write_with_tasks, plans, source, at_once=1),
            TWO: partial(write_with_tasks, plans, source, at_once=tasks),
            WRITER: lambda folder: len(write_with_shardwriter(plans, source, folder, pillow_checks)),
            WRITER_OUR_INTAKE: lambda folder: len(write_with_shardwriter(plans, source, folder, our_checks)),
        }
        if tasks == 1:
            del ways[TWO]
        cluster.connect(cpus=tasks)
        try:
            for _ in range(2):  # warm up: every worker of Ray has started, imported and run a task
                write_with_tasks(plans, source, scratch / "first", at_once=tasks)
                shutil.rmtree(scratch / "first")
            seconds = seconds_of(ways, scratch, images=images, rounds=rounds)
        finally:
            cluster.disconnect()
    against = {name: _data.ratios(seconds[ONE], theirs) for name, theirs in seconds.items()}
    print(
        f"{found.words}; {images} files into {len(plans)} shards\n{timing.device_name(torch.device('cpu'))}; {rounds} turns"
    )
    print(
        timing.table(
            ("", "images/s", "its time / ours of 1 task (quartiles)"),
            [(name, f"{images / median(took):.0f}", _data.shown(against[name])) for name, took in seconds.items()],
        )
    )
    gain = round(_data.ratios(seconds[TWO], seconds[ONE]).median, 3) if TWO in seconds else None
    if gain is not None:
        print(f"Two tasks at once are {gain:.2f} times as fast as one")
    return {
        "benchmark": "shard",
        "ratio_vs_shardwriter": round(against[WRITER].median, 3),
        "speedup_2_tasks": gain,
        "ratio_vs_shardwriter_our_intake": round(against[WRITER_OUR_INTAKE].median, 3),
        "images_per_s": round(images / median(seconds[ONE]), 1),
        "images": found.words,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("shard", "Photographs to tars, side by side.")
    parser.add_argument("--count", type=int, help="number of files; copies are made if there are fewer")
    parser.add_argument("--rounds", type=int)
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
