"""mae doctor: can this machine do what a run will ask of it?

`--data` times what the loader's threads do (decode, crop, resize, flip) on this host, and says how many of its cores a GPU needs
to be fed, by model. A GPU's appetite is arithmetic: share of use x peak / FLOPs of an image's training step. Cores for reading,
copying to the device and the training process itself come on top."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from mae_core import SIZES, MAEConfig, training_flops
from pipeline.data.images.decode_speed import DecodeRate, cores, decode_rate, images_per_s
from pipeline.data.images.photos import photos
from pipeline.errors import ConfigError
from pipeline.planning.hardware import accelerators

_PHOTOS = 64
_MODELS = ("small", "base", "large", "huge")


@dataclass(frozen=True)
class Need:
    """What a GPU asks of the host for one model."""

    model: str
    gpu: str
    images_per_s: float
    cores: float
    """To make so many; a quarter of one is a quarter."""


def needs(
    flops: Mapping[str, float], peaks: Mapping[str, float], *, share_of_peak: float, images_per_core_s: float
) -> list[Need]:
    """By model and GPU. `flops`: an image's training step, by model; `peaks`: FLOP/s, by GPU."""
    rates = {
        (model, gpu): images_per_s(count, peak=peak, share_of_peak=share_of_peak)
        for model, count in flops.items()
        for gpu, peak in peaks.items()
    }
    return [Need(model, gpu, rate, rate / images_per_core_s) for (model, gpu), rate in rates.items()]


def chosen_peaks(gpus: Sequence[str], tflops: float | None) -> dict[str, float]:
    """FLOP/s by GPU: of those named, or of one given by its peak. Errors: ConfigError for an unknown name or no peak."""
    if tflops is not None:
        if not 0 < tflops < math.inf:
            raise ConfigError(f"--tflops {tflops} is no peak: write TFLOP/s in bfloat16, dense, such as 312")
        return {f"{tflops:g} TFLOP/s": tflops * 1e12}
    known = {name: entry.peaks["bf16"] for name, entry in accelerators().items()}
    unknown = [name for name in gpus if name not in known]
    if unknown:
        raise ConfigError(
            f"--gpu {unknown[0]} is unknown here: write {', '.join(known)}, or give its peak with --tflops"
        )
    return {name: known[name] for name in gpus or ("A100", "H100", "B200")}


def data_command(
    images: Path | None, *, gpus: Sequence[str], tflops: float | None, share: float, seconds: float, as_json: bool
) -> int:
    """Times, prints, and returns the exit code."""
    peaks = chosen_peaks(gpus, tflops)
    flops = {name: training_flops(MAEConfig(encoder=SIZES[name]())) for name in _MODELS}
    needs(flops, peaks, share_of_peak=share, images_per_core_s=1.0)  # wrong options end here, before the timing
    if seconds <= 0:
        raise ConfigError(f"--seconds {seconds} is no time to measure in: write 3")
    sample, count = photos(images, count=_PHOTOS), cores()
    one = decode_rate(sample.files, threads=1, seconds=seconds)
    every = decode_rate(sample.files, threads=count, seconds=seconds) if count > 1 else one
    found = needs(flops, peaks, share_of_peak=share, images_per_core_s=every.images_per_core_s)
    typer.echo(_host(sample.words, one, every))
    typer.echo("\n" + _table(found, list(peaks)))
    typer.echo(
        f"\nGPU: {share:.0%} of its bfloat16 peak (--mfu), {', '.join(f'{n} {p / 1e12:g} TFLOP/s' for n, p in peaks.items())}. "
        f"A core: {every.images_per_core_s:.0f} images/s.\nReading, copies to the device and the training process come on top."
    )
    if as_json:
        line = {"cores": count, "images": sample.words, "mfu": share, "one_thread": one._asdict()}
        typer.echo(json.dumps(line | {"all_cores": every._asdict(), "needs": [asdict(need) for need in found]}))
    return 0


def _host(words: str, one: DecodeRate, every: DecodeRate) -> str:
    lines = [
        f"{_processor()}: {every.threads} of {os.cpu_count()} logical cores are this process's",
        f"Decode, crop to 224 x 224 and flip; {words}",
    ]
    lines += [
        f"  {rate.threads} thread{'s' * (rate.threads > 1)}: {rate.images_per_s:.0f} images/s by the clock, "
        f"{rate.images_per_core_s:.0f} a core-second"
        for rate in dict.fromkeys((one, every))
    ]
    if every.images_per_s < 0.8 * every.threads * every.images_per_core_s:
        lines.append("  Other work keeps cores busy: figures a core-second count for the table")
    return "\n".join(lines)


def _table(found: Sequence[Need], gpus: Sequence[str]) -> str:
    """A line a model; images a second and cores, by GPU."""
    width = max(18, *(len(gpu) + 2 for gpu in gpus))
    by_model: dict[str, list[Need]] = {}
    for need in found:
        by_model.setdefault(need.model, []).append(need)
    lines = [
        "A GPU needs".ljust(14) + "".join(gpu.rjust(width) for gpu in gpus),
        " " * 14 + "".join("images/s   cores".rjust(width) for _ in gpus),
    ]
    lines += [
        f"ViT {model}".ljust(14)
        + "".join(f"{need.images_per_s:8.0f} {need.cores:7.1f}".rjust(width) for need in of_model)
        for model, of_model in by_model.items()
    ]
    return "\n".join(lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
