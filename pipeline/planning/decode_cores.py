"""`mae doctor --data`: how many of this host's cores it takes to decode images as fast as a GPU trains.

What the loader's threads do (decode, crop, resize, flip) is timed on this host. What a GPU consumes
is arithmetic: its share of use x its peak / the FLOPs of one image's training step. Cores for
reading, for copies to the device and for the training process are extra.
Units: images/s by the clock and per second of one core's time; FLOP/s.
Errors: ConfigError for options that make no sense."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_core import SIZES, MAEConfig, training_flops
from pipeline.data.images.decode_speed import DecodeRate, cores, decode_rate, images_per_s
from pipeline.data.images.photos import photos
from pipeline.errors import ConfigError
from pipeline.planning.hardware import accelerators

PHOTOS = 64
MODELS = ("small", "base", "large", "huge")
DEFAULT_GPUS = ("A100", "H100", "B200")


@dataclass(frozen=True)
class Need:
    """What a GPU needs from the host for one model."""

    model: str
    gpu: str
    images_per_s: float
    cores: float
    """Cores that decode as many; may be a fraction."""


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """What was measured on this host, and what follows for each model and GPU."""

    images: str
    """What was decoded, in words."""
    share_of_peak: float
    peaks: Mapping[str, float]
    """FLOP/s by GPU."""
    one_thread: DecodeRate
    all_cores: DecodeRate
    needs: Sequence[Need]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON line of `mae doctor --data --json`."""
        return {
            "cores": self.all_cores.threads,
            "images": self.images,
            "mfu": self.share_of_peak,
            "one_thread": self.one_thread._asdict(),
            "all_cores": self.all_cores._asdict(),
            "needs": [asdict(need) for need in self.needs],
        }


def measure_decoding(
    images: Path | None, *, gpus: Sequence[str], tflops: float | None, share_of_peak: float, seconds: float
) -> DecodeReport:
    """Time decoding on one core and on all, `seconds` each, with the JPEGs of a folder or generated ones."""
    peaks = chosen_peaks(gpus, tflops)
    flops = {name: training_flops(MAEConfig(encoder=SIZES[name]())) for name in MODELS}
    needs(flops, peaks, share_of_peak=share_of_peak, images_per_core_s=1.0)  # refuses wrong options before the timing
    if seconds <= 0:
        raise ConfigError(f"--seconds {seconds} is no time to measure in: write 3")
    sample, threads = photos(images, count=PHOTOS), cores()
    # Two timings: cores slow each other down (memory, clocks), so all of them decode less than their number times one.
    one = decode_rate(sample.files, threads=1, seconds=seconds)
    every = decode_rate(sample.files, threads=threads, seconds=seconds) if threads > 1 else one
    return DecodeReport(
        images=sample.words,
        share_of_peak=share_of_peak,
        peaks=peaks,
        one_thread=one,
        all_cores=every,
        needs=needs(flops, peaks, share_of_peak=share_of_peak, images_per_core_s=every.images_per_core_s),
    )


def needs(
    flops: Mapping[str, float], peaks: Mapping[str, float], *, share_of_peak: float, images_per_core_s: float
) -> list[Need]:
    """Return what each GPU needs for each model.

    `flops`: of one image's training step, by model; `peaks`: FLOP/s, by GPU."""
    rates = {
        (model, gpu): images_per_s(count, peak=peak, share_of_peak=share_of_peak)
        for model, count in flops.items()
        for gpu, peak in peaks.items()
    }
    return [Need(model, gpu, rate, rate / images_per_core_s) for (model, gpu), rate in rates.items()]


def chosen_peaks(gpus: Sequence[str], tflops: float | None) -> dict[str, float]:
    """Return FLOP/s by GPU: of those named, or of one given by its peak.

    Raises ConfigError for a name that is not in hardware.yaml, or a peak that is not positive."""
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise ConfigError(f"--tflops {tflops} is no peak: write TFLOP/s in bfloat16, dense, such as 312")
        return {f"{tflops:g} TFLOP/s": tflops * 1e12}
    # bfloat16 is what pretraining computes in by default.
    known = {name: entry.peaks["bf16"] for name, entry in accelerators().items()}
    unknown = [name for name in gpus if name not in known]
    if unknown:
        raise ConfigError(
            f"--gpu {unknown[0]} is unknown here: write {', '.join(known)}, or give its peak with --tflops"
        )
    return {name: known[name] for name in gpus or DEFAULT_GPUS}
