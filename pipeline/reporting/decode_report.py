"""What `mae doctor --data` prints: how fast this host decodes, and how many cores a GPU needs for it."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.images.decode_speed import DecodeRate
from pipeline.planning.decode_cores import DecodeReport, Need


def decode_text(report: DecodeReport) -> str:
    """Return the measurement, the table of models and GPUs, and what the table rests on."""
    peaks = ", ".join(f"{name} {peak / 1e12:g} TFLOP/s" for name, peak in report.peaks.items())
    return "\n\n".join(
        (
            _host(report.images, report.one_thread, report.all_cores),
            _table(report.needs, list(report.peaks)),
            f"GPU: {report.share_of_peak:.0%} of its bfloat16 peak (--mfu), {peaks}. "
            f"A core: {report.all_cores.images_per_core_s:.0f} images/s.\n"
            "Reading, copies to the device and the training process need cores besides.",
        )
    )


def _host(images: str, one: DecodeRate, every: DecodeRate) -> str:
    lines = [
        f"{_processor()}: this process may use {every.threads} of {os.cpu_count()} logical cores",
        f"Decode, crop to 224 x 224 and flip; {images}",
    ]
    lines += [
        f"  {rate.threads} thread{'s' * (rate.threads > 1)}: {rate.images_per_s:.0f} images/s by the clock, "
        f"{rate.images_per_core_s:.0f} per core-second"
        for rate in dict.fromkeys((one, every))
    ]
    if every.images_per_s < 0.8 * every.threads * every.images_per_core_s:
        lines.append("  Other work keeps the cores busy: the table uses the figures per core-second")
    return "\n".join(lines)


def _table(found: Sequence[Need], gpus: Sequence[str]) -> str:
    """One line per model; images per second and cores for each GPU."""
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
    """The CPU's model: platform.processor() is empty or the architecture on Linux, so /proc/cpuinfo is asked first."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
