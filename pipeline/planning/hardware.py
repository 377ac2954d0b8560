"""Devices to plan for: GPUs from a table of data sheets (hardware.yaml), this machine's GPU or CPU, and the user's prices.

Units:  bytes; FLOP/s, counting 2 FLOPs per multiply-add; USD per device and hour. `mfu` (model FLOPs utilisation) is the share of
        the peak that training reaches.
Errors: ConfigError naming file, entry and what to write instead.
Source: hardware.yaml names one per entry. A CPU's peak is measured (`matmul_peak`); its mfu is from docs/performance.md."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from pipeline.cluster.device import choose_device_here, local_gpu_count
from pipeline.cluster.resources import Resources
from pipeline.errors import ConfigError
from pipeline.training.meters.matmul_peak import matmul_peak
from pipeline.training.meters.slowness import FORESEEN_MFU

CPU = "CPU"
Precision = Literal["bf16", "fp32", "tf32"]
DTYPES: Mapping[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device: a GPU, of which each worker has its own, or a machine's CPU, which all its workers share."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    peaks: Mapping[Precision, float]
    """FLOP/s of dense matrix products, by precision. Lacks those that are unknown or not measured yet."""
    mfu: tuple[float, float]
    """(cautious, good) share of the peak."""
    source: str
    """Where the figures come from, for the user."""

    def with_overrides(self, *, tflops: float | None, mfu: float | None) -> "Hardware":
        """Return the device with the peak and the utilisation that the user gave, where they gave any."""
        for option, value, most in (("--tflops", tflops, math.inf), ("--mfu", mfu, 1.0)):
            if value is not None and not 0 < value <= most:
                example = "a share such as 0.4" if option == "--mfu" else "dense TFLOP/s such as 312"
                raise ConfigError(f"{option} {value} is not usable: write {example}")
        # One figure for every precision: the user has measured the one that the training uses.
        peaks = self.peaks if tflops is None else dict.fromkeys(DTYPES, tflops * 1e12)
        return replace(self, peaks=peaks, mfu=self.mfu if mfu is None else (mfu, mfu))


@cache
def accelerators() -> Mapping[str, Hardware]:
    """Return the devices of hardware.yaml by name."""
    table = yaml.safe_load((resources.files("pipeline.planning") / "hardware.yaml").read_text())
    return {
        name: Hardware(
            name=name,
            kind="cuda",
            memory_bytes=int(row["memory_gb"] * 1e9),  # makers count decimal gigabytes
            peaks={name: row[f"{name}_tflops"] * 1e12 for name in DTYPES},
            mfu=tuple(row["mfu"]),
            source=row["source"],
        )
        for name, row in table.items()
    }


def hardware_named(name: str) -> Hardware:
    """Return a device of the table, or this machine for `CPU`. Case does not matter. Raises ConfigError for other names."""
    if name.upper() == CPU:
        return local_cpu()
    found = accelerators().get(name.upper())
    if found is None:
        known = ", ".join([*accelerators(), CPU])
        raise ConfigError(f"--hardware {name} is unknown: write one of {known}. --tflops sets another peak")
    return found


def local_cpu() -> Hardware:
    """Return this machine's CPU, without its peak, which `with_measured_peak` adds."""
    return Hardware(
        name=CPU,
        kind="cpu",
        memory_bytes=host_memory_bytes(),
        peaks={},
        mfu=FORESEEN_MFU["cpu"],
        source="its peak measured now, by a matrix product on all cores",
    )


def with_measured_peak(device: Hardware, precision: Precision) -> Hardware:
    """Return a CPU whose peak is unknown with its peak, measured in about a second. Other devices are returned unchanged."""
    if device.kind != "cpu" or precision in device.peaks:
        return device
    return replace(device, peaks={**device.peaks, precision: matmul_peak(torch.device("cpu"), DTYPES[precision])})


def local_gpu() -> Hardware | None:
    """Return this machine's first GPU, or None. Its memory is asked for; its peak is that of a table entry of the same family."""
    if not local_gpu_count():
        return None
    properties = torch.cuda.get_device_properties(0)
    # By family, because drivers report names such as "NVIDIA H100 80GB HBM3".
    known = next((entry for name, entry in accelerators().items() if _family(name) in properties.name), None)
    return Hardware(
        name=properties.name,
        kind="cuda",
        memory_bytes=properties.total_memory,
        peaks=known.peaks if known else {},
        mfu=known.mfu if known else FORESEEN_MFU["cuda"],
        source=known.source if known else "torch",
    )


def local_hardware(resources: Resources) -> Hardware:
    """Return what training would run on here. Without the GPUs that are asked for, it is planned for the CPU."""
    return (choose_device_here(resources).use_gpu and local_gpu()) or local_cpu()


def cluster_hardware(gpu_types: Iterable[str]) -> Hardware | None:
    """Return the largest device that Ray's names can stand for, or None if there are none or one is not in the table.

    Ray's names do not tell variants with different memory apart (`A100` may have 40 or 80 GB). The largest is taken because this
    serves to refuse runs that cannot possibly fit."""
    families = [
        [entry for name, entry in accelerators().items() if _family(name) == _family(kind)] for kind in gpu_types
    ]
    # One unknown type could be larger than all known ones, so nothing may be refused.
    if not all(families):
        return None
    return max((entry for family in families for entry in family), key=lambda one: one.memory_bytes, default=None)


def _family(name: str) -> str:
    return name.partition("-")[0]


def cpu_computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU multiplies bfloat16 matrices itself (x86: AVX512-BF16 or AMX, Arm: BF16).

    On others torch converts to float32 and back for every operation, several times slower than float32 alone."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return True  # unknown: better no advice than wrong advice
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def host_memory_bytes() -> int:
    """Return the memory of this machine or, in a container, the container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    files = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # cgroup v2, v1
    # No limit reads "max" in v2 and a huge number in v1, which `min` passes over.
    limits = [int(text) for path in files if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min([total, *limits])


def read_prices(path: Path) -> Mapping[str, float]:
    """Read the user's prices: USD per device and hour, by device name. A null, for an unknown price, is left out."""
    try:
        table: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise ConfigError(f"{path}: cannot be read ({cause}). Start from a copy of jobs/prices.yaml") from cause
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: holds no mapping. Write lines such as `H100: 2.5`")
    known = [*accelerators(), CPU]
    for name, price in table.items():
        if name not in known:
            raise ConfigError(f"{path}: {name!r} is unknown: write one of {', '.join(known)}")
        # YAML's yes and no are bools, which are ints in Python. `not >=` also refuses NaN.
        if price is not None and (isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0):
            raise ConfigError(f"{path}: {name} = {price!r} is not a price: write USD per device and hour, or null")
    return {name: float(price) for name, price in table.items() if price is not None}
