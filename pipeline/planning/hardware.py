"""What runs are planned for: accelerators by their makers (hardware.yaml), this machine's CPU by a look at it, prices by the user.

Units:  bytes, FLOP/s (2 a multiply-add), USD for an hour of one device; mfu is the share of the peak that a training step uses.
Errors: ConfigError naming file, entry and way out.
Source: hardware.yaml says it entry by entry. A CPU's peak is measured (peak.py); its share of use is
the one of docs/performance.md."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from pipeline.errors import ConfigError
from pipeline.training.meters.matmul_peak import matmul_peak

CPU = "CPU"
Precision = Literal["bf16", "fp32"]
DTYPES: Mapping[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device that a worker has to itself; of a CPU, the whole machine."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    peaks: Mapping[Precision, float]
    """FLOP/s of dense matrix products."""
    mfu: tuple[float, float]
    source: str

    def as_measured(self, *, tflops: float | None, mfu: float | None) -> "Hardware":
        """With a peak and a share of use that somebody measured, in place of the table's."""
        for option, value, most in (("--tflops", tflops, math.inf), ("--mfu", mfu, 1.0)):
            if value is not None and not 0 < value <= most:
                words = "a share such as 0.4" if option == "--mfu" else "TFLOP/s, dense, such as 312"
                raise ConfigError(f"{option} {value} is not usable: write {words}")
        peaks = self.peaks if tflops is None else dict.fromkeys(DTYPES, tflops * 1e12)
        return replace(self, peaks=peaks, mfu=self.mfu if mfu is None else (mfu, mfu))


@cache
def accelerators() -> Mapping[str, Hardware]:
    """The table, by name."""
    table = yaml.safe_load((resources.files("pipeline.planning") / "hardware.yaml").read_text())
    return {
        name: Hardware(
            name=name,
            kind="cuda",
            memory_bytes=int(row["memory_gb"] * 1e9),
            peaks={"bf16": row["bf16_tflops"] * 1e12, "fp32": row["fp32_tflops"] * 1e12},
            mfu=tuple(row["mfu"]),
            source=row["source"],
        )
        for name, row in table.items()
    }


def hardware(name: str) -> Hardware:
    """By name, in any case; `CPU` is this machine. Errors: ConfigError for one that is not in the table."""
    if name.upper() == CPU:
        return this_cpu()
    found = accelerators().get(name.upper())
    if found is None:
        known = ", ".join([*accelerators(), CPU])
        raise ConfigError(f"--hardware {name} is unknown: write one of {known}; --tflops gives another peak")
    return found


def this_cpu() -> Hardware:
    """The machine that asks; how fast it is, `measured` finds out."""
    return Hardware(
        name=CPU,
        kind="cpu",
        memory_bytes=host_memory_bytes(),
        peaks={},
        mfu=(0.6, 0.75),
        source="its peak measured now, by a matrix product on all cores",
    )


def measured(device: Hardware, precision: Precision) -> Hardware:
    """A CPU with its peak; others, and one whose peak was given, as they are."""
    if device.kind != "cpu" or precision in device.peaks:
        return device
    return replace(device, peaks={**device.peaks, precision: matmul_peak(torch.device("cpu"), DTYPES[precision])})


def this_gpu() -> Hardware | None:
    """The first CUDA device here, with the memory it has and the peak of the table's entry that its name holds; None: no GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = next((entry for name, entry in accelerators().items() if _family(name) in properties.name), None)
    return Hardware(
        name=properties.name,
        kind="cuda",
        memory_bytes=properties.total_memory,
        peaks=known.peaks if known else {},
        mfu=known.mfu if known else (0.3, 0.5),
        source=known.source if known else "torch",
    )


def here(*, workers: int, use_gpu: bool | None) -> Hardware:
    """What training on this machine runs on: a GPU a worker, when there are as many (or when told so), else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = gpus >= workers if use_gpu is None else use_gpu
    return (wanted and this_gpu()) or this_cpu()


def of_cluster(kinds: Iterable[str]) -> Hardware | None:
    """The largest device that these names of Ray's can mean; None where one is in no table, or there is none."""
    families = [[entry for name, entry in accelerators().items() if _family(name) == _family(kind)] for kind in kinds]
    if not all(families):
        return None
    return max((entry for family in families for entry in family), key=lambda one: one.memory_bytes, default=None)


def _family(name: str) -> str:
    return name.partition("-")[0]


def host_memory_bytes() -> int:
    """Memory of this machine, or what a container of it may use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    there = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    given = [int(text) for path in limits if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min([there, *given])


def prices(path: Path) -> Mapping[str, float]:
    """USD for an hour of one device, by name, of a file that its user wrote; null stands for a price nobody knows."""
    try:
        table: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as cause:
        raise ConfigError(f"{path}: cannot be read ({cause}). Start from a copy of jobs/prices.yaml") from cause
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: holds no mapping: write lines such as `H100: 2.5`")
    known = [*accelerators(), CPU]
    for name, price in table.items():
        if name not in known:
            raise ConfigError(f"{path}: {name!r} is unknown: write one of {', '.join(known)}")
        if price is not None and (isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0):
            raise ConfigError(f"{path}: {name} = {price!r} is no price: write USD for an hour of one device, or null")
    return {name: float(price) for name, price in table.items() if price is not None}
