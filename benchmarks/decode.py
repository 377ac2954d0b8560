"""JPEG bytes to a training picture on one core: our code, its bare library calls, and Pillow.

    python -m benchmarks.decode --images DIR
    python -m benchmarks.decode --quick

A picture is decoded, cropped by RandomResizedCrop to 224 x 224 (area 0.2 to 1, aspect 3/4 to 4/3, antialiased
bicubic) and flipped; uint8. Pillow decodes the whole image, then crops and resizes, as torchvision does. All
methods use the same boxes. "Bare" is simplejpeg down to the last row of the box, then torch's resize, with
boxes computed beforehand, without flip and without checking the bytes. Mixed methods show where the gain comes
from. All methods run in random order on a chunk of pictures, and ratios are taken within it.

Units:  CPU seconds of this process, helper threads included; grey levels; median and quartiles over chunks.
        ratio_vs_pillow: Pillow's time / ours; share_of_bare: bare time / ours; max_diff, mean_diff: grey levels
        between our pictures and Pillow's; images_per_core_s: ours.
Errors: SystemExit for a folder without usable JPEGs."""

import argparse
import io
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage

from benchmarks import _data
from benchmarks import _timing as timing
from benchmarks._data import Spread
from pipeline.data.images.decode_speed import CROP, SIZE, cores, crops, decode_rate, training_picture
from pipeline.data.images.jpeg_rows import decode_top
from pipeline.data.images.pictures import Box, Image, Uniforms, box_of, decode, reference_picture

CHUNK = 16


class Sample(NamedTuple):
    """A picture to make."""

    data: bytes
    uniforms: Uniforms
    box: Box


Method = Callable[[Sample], object]


def ours(sample: Sample) -> Image:
    """Make the picture as the loader does."""
    return training_picture(sample.data, sample.uniforms)


def bare(sample: Sample) -> torch.Tensor:
    """Make the two library calls and nothing else."""
    return _torch_resize(decode_top(sample.data, rows=sample.box.top + sample.box.height), sample.box)


def pillow(sample: Sample) -> Image:
    """Make the picture with Pillow, as torchvision does."""
    return reference_picture(sample.data, sample.uniforms, CROP, SIZE)


def whole(sample: Sample) -> torch.Tensor:
    """Make the two library calls, but decode all rows."""
    return _torch_resize(simplejpeg.decode_jpeg(sample.data, "RGB"), sample.box)


def pillow_then_torch(sample: Sample) -> torch.Tensor:
    """Decode with Pillow, resize with torch."""
    with PillowImage.open(io.BytesIO(sample.data)) as file:
        return _torch_resize(np.array(file.convert("RGB")), sample.box)


def simplejpeg_then_pillow(sample: Sample) -> Image:
    """Decode with simplejpeg, resize with Pillow."""
    box = sample.box
    part = decode(sample.data)[box.top : box.top + box.height, box.left : box.left + box.width]
    return np.array(PillowImage.fromarray(part).resize(SIZE[::-1], PillowImage.Resampling.BICUBIC))


METHODS: Mapping[str, Method] = {
    "ours": ours,
    "the same calls, bare": bare,
    "bare, all rows decoded": whole,
    "Pillow, as torchvision does": pillow,
    "Pillow, torch's resize": pillow_then_torch,
    "simplejpeg, Pillow's resize": simplejpeg_then_pillow,
}


def _torch_resize(image: Image, box: Box) -> torch.Tensor:
    part = np.ascontiguousarray(image[box.top : box.top + box.height, box.left : box.left + box.width])
    tensor = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
    return F.interpolate(tensor, size=SIZE, mode="bicubic", antialias=True, align_corners=False)


def samples(files: Sequence[bytes], count: int) -> list[Sample]:
    """Return `count` pictures to make from these files, each with a crop of its own."""
    chosen = [files[number % len(files)] for number in range(count)]
    numbers = crops(count)
    return [Sample(data, own, _box(data, own)) for data, own in zip(chosen, numbers, strict=True)]


def _box(data: bytes, uniforms: Uniforms) -> Box:
    """Return the box of a crop, given the size in the header."""
    with PillowImage.open(io.BytesIO(data)) as file:
        width, height = file.size
    return box_of(height, width, uniforms, CROP, SIZE)


def differences(made: Sequence[Sample]) -> tuple[int, float]:
    """Return the largest and the mean difference, in grey levels, between our pictures and Pillow's."""
    apart = [np.abs(ours(sample).astype(np.int16) - pillow(sample)) for sample in made]
    return max(int(one.max()) for one in apart), float(np.mean([one.mean() for one in apart]))


def cpu_seconds(made: Sequence[Sample]) -> dict[str, list[float]]:
    """Return seconds per picture in every chunk, by method."""
    shuffled = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for method in METHODS.values():  # warm up: one-time work is not timed
        for sample in made[:CHUNK]:
            method(sample)
    for first in range(0, len(made), CHUNK):
        chunk = made[first : first + CHUNK]
        for name in shuffled.sample(list(METHODS), len(METHODS)):
            method = METHODS[name]
            began = time.process_time()
            for sample in chunk:
                method(sample)
            seconds[name].append((time.process_time() - began) / len(chunk))
    return seconds


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print the tables and return the JSON line."""
    found = _data.chosen_photos(options, count=64 if options.quick else 512)
    chunks = options.chunks or (30 if options.quick else 120)
    made = samples(found.files, chunks * CHUNK)
    with _data.one_torch_thread():
        seconds = cpu_seconds(made)
        max_diff, mean_diff = differences(made[: len(found.files)])
    against: dict[str, Spread] = {name: _data.ratios(seconds["ours"], theirs) for name, theirs in seconds.items()}
    print(f"{found.words}\n{timing.device_name(torch.device('cpu'))}; CPU time, {chunks} chunks of {CHUNK} pictures")
    print(
        timing.table(
            ("", "images/core-second", "its time / ours (quartiles)"),
            [(name, f"{1 / median(took):.0f}", _data.shown(against[name])) for name, took in seconds.items()],
        )
    )
    print(f"Difference from Pillow's pictures: at most {max_diff}, on average {mean_diff:.3f} grey levels")
    rates = [decode_rate(found.files, threads=threads, seconds=options.seconds) for threads in sorted({1, cores()})]
    print("The host: " + ", ".join(f"{rate.images_per_s:.0f} images/s of {rate.threads} threads" for rate in rates))
    return {
        "benchmark": "decode",
        "ratio_vs_pillow": round(against["Pillow, as torchvision does"].median, 3),
        "share_of_bare": round(against["the same calls, bare"].median, 3),
        "max_diff": max_diff,
        "mean_diff": round(mean_diff, 4),
        "images_per_core_s": round(1 / median(seconds["ours"]), 1),
        "images_per_s_all_cores": round(rates[-1].images_per_s, 1),
        "images": found.words,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("decode", "JPEG bytes to training pictures, on one core.")
    parser.add_argument("--chunks", type=int, help=f"number of chunks of {CHUNK} pictures")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to measure the host's rate, on one core and on all"
    )
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
