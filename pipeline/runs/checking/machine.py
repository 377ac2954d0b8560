"""The checks of `mae doctor`: whether this machine can do what a run asks of it.

Units: GiB. Nothing is raised: what goes wrong is a finding."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pipeline import cluster
from pipeline.cluster.device import local_gpu_count
from pipeline.errors import PipelineError
from pipeline.evaluation.protocols import PROTOCOL_NAMES, protocol_named
from pipeline.planning.hardware import cpu_computes_bf16, host_memory_bytes

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Ray keeps its objects
LEAST_DISK_GIB = 5.0
LEAST_SHARED_MEMORY_GIB = 0.25
"""Ray's object store takes 200 MB of /dev/shm."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found, in one line."""

    name: str
    state: Literal["ok", "warning", "wrong"]
    text: str


def examine_machine() -> Iterator[Finding]:
    """Check one thing after the other; the last check starts Ray, which takes seconds."""
    for check in (_python, _torch, _cores, _bf16, _disk, _shared_memory, _ray):
        yield check()


def _python() -> Finding:
    fits = sys.version_info >= (3, 11) and sys.platform == "linux"
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return _finding("python", fits, text, "Linux with Python 3.11 or newer is needed")


def _torch() -> Finding:
    gpus = local_gpu_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(gpus)}))
    text = f"{torch.__version__}, {f'{gpus} GPUs: {names}' if gpus else 'no GPU: training runs on the CPU'}"
    return Finding(name="torch", state="ok", text=text)


def _cores() -> Finding:
    # not os.cpu_count(): containers and batch systems grant fewer
    usable = len(os.sched_getaffinity(0))
    text = f"{usable} usable, {host_memory_bytes() / GIB:.1f} GiB of memory"
    return _finding("cores", usable > 1, text, "resources.workers=2 needs resources.cpus_per_worker=0.5", bad="warning")


def _bf16() -> Finding:
    if local_gpu_count():
        fits = torch.cuda.is_bf16_supported()
        text = "computed by the GPU" if fits else "not computed by this GPU"
    else:
        fits = cpu_computes_bf16()
        text = "computed by the CPU" if fits else "not computed by this CPU"
    trained = [f"evaluation.{name}" for name in PROTOCOL_NAMES if hasattr(protocol_named(name).settings(), "precision")]
    return _finding("bf16", fits, text, f"write precision: fp32 in {', '.join(['pretrain', *trained])}", bad="warning")


def _disk() -> Finding:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.1f} GiB free in {folder}"
    return _finding("disk", free >= LEAST_DISK_GIB, text, "free some, or set store to another disk", bad="warning")


def _shared_memory(folder: Path = SHARED_MEMORY) -> Finding:
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as cause:
        return Finding(name=str(SHARED_MEMORY), state="wrong", text=f"cannot be read ({cause.strerror}): Ray needs it")
    way_out = "Ray needs more: start the container with --shm-size=1g"
    return _finding(str(SHARED_MEMORY), free >= LEAST_SHARED_MEMORY_GIB, f"{free:.1f} GiB free", way_out)


def _ray(connect: Callable[[], None] = cluster.connect) -> Finding:
    began = time.monotonic()
    try:
        connect()
    except PipelineError as error:
        return Finding(name="ray", state="wrong", text=f"{error}; `mae run --in-process` works without it")
    finally:
        cluster.disconnect()
    where = os.environ.get("RAY_ADDRESS", "this machine")
    return Finding(name="ray", state="ok", text=f"connected to {where} in {time.monotonic() - began:.0f} s")


def _finding(name: str, fits: bool, text: str, way_out: str, bad: Literal["warning", "wrong"] = "wrong") -> Finding:  # noqa: FBT001
    return Finding(name=name, state="ok" if fits else bad, text=text if fits else f"{text}: {way_out}")
