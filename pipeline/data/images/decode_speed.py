"""How fast this host makes training pictures, and how many GPUs that can feed.

A picture is decoded, cut by a random resized crop to 224 x 224 and flipped: the functions are the loader's own.
Units:  images per second of wall-clock time and per second of CPU time; FLOP, FLOP/s; utilisation as a fraction.
Errors: ConfigError for a utilisation outside (0, 1]; DataError for bytes that are not an RGB picture."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from mae_core.randomness import uniform_rows
from pipeline.data.images.pictures import AUGMENT_UNIFORMS, AugmentConfig, Image, Uniforms, picture
from pipeline.errors import ConfigError

SIZE = (224, 224)
CROP = AugmentConfig()
_THREADS_PER_PROCESS = 8
"""What a rank has on a node with 8 GPUs and 64 cores. Threads of one process share Python's lock; ranks do not, so more threads
than this are measured in several processes."""


class DecodeRate(NamedTuple):
    """Training pictures per second."""

    threads: int
    images_per_s: float
    """Per second of wall-clock time: what other work on the host leaves over."""
    images_per_core_s: float
    """Per second of CPU time: not slowed by other work, except where cores share caches or memory bandwidth."""


def crops(count: int, *, seed: int = 0) -> Sequence[Uniforms]:
    """Return the random numbers of `count` crops."""
    return list(uniform_rows(seed, [0] * count, range(count), "augment", AUGMENT_UNIFORMS))


def training_picture(data: bytes, uniforms: Uniforms) -> Image:
    """Return the [224, 224, 3] training picture of a JPEG."""
    return picture(data, uniforms, CROP, SIZE)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def decode_rate(images: Sequence[bytes], *, threads: int, seconds: float) -> DecodeRate:
    """Make pictures of `images` for `seconds` and return the rate. More than 8 threads are spread over several processes."""
    processes = -(-threads // _THREADS_PER_PROCESS)
    shares = [(number + 1) * threads // processes - number * threads // processes for number in range(processes)]
    if processes == 1:
        return _in_this_process(images, seconds, threads)
    # not fork: torch's threads do not survive it
    context = get_context("spawn")
    together = context.Barrier(processes)  # importing takes seconds, so all processes start measuring together
    with ProcessPoolExecutor(processes, context, together.wait) as pool:
        rates = list(pool.map(partial(_in_this_process, images, seconds), shares))
    used = sum(rate.images_per_s / rate.images_per_core_s for rate in rates)  # average number of busy cores
    total = sum(rate.images_per_s for rate in rates)
    return DecodeRate(threads, total, total / used)


def images_per_s(training_flops: float, *, peak: float, share_of_peak: float) -> float:
    """Return the images per second that a GPU trains on at this share of its peak FLOP/s. `training_flops`: FLOPs per image."""
    if not 0 < share_of_peak <= 1:
        raise ConfigError(f"the share of the peak is {share_of_peak}, not in (0, 1]: write 0.4 for 40 %")
    return share_of_peak * peak / training_flops


def _in_this_process(images: Sequence[bytes], seconds: float, threads: int) -> DecodeRate:
    numbers = crops(len(images))
    for data, uniforms in zip(images[:8], numbers[:8], strict=True):  # warm-up: imports, caches
        training_picture(data, uniforms)
    began, cpu_began = time.perf_counter(), time.process_time()

    def work(first: int) -> int:
        made = 0
        # at least one, so that there is a rate on however slow a machine
        while made == 0 or time.perf_counter() < began + seconds:
            index = (first + made) % len(images)
            training_picture(images[index], numbers[index])
            made += 1
        return made

    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(work, [len(images) * thread // threads for thread in range(threads)]))
    return DecodeRate(threads, made / (time.perf_counter() - began), made / max(1e-9, time.process_time() - cpu_began))
