"""How fast this host makes training pictures, and what that means for the GPUs it feeds.

A picture: decode, random resized crop to 224 x 224, flip; what the loader's threads do, by the same functions.
Units:  images a second by the clock, and of a second of one core's time; FLOP, FLOP/s; fractions for shares of use.
Errors: ConfigError for a share of use outside (0, 1]; DataError for bytes that are no RGB picture.
Source: none; the clock and the CPU time that the kernel counts."""

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
_THREADS_A_PROCESS = 8
"""As many as a rank has on a node of 8 GPUs and 64 cores: threads of one process share Python's lock, ranks do not."""


class DecodeRate(NamedTuple):
    """What was counted."""

    threads: int
    images_per_s: float
    """By the clock: what is left of the host beside other work."""
    images_per_core_s: float
    """Of one core's time: other work does not count, cores that slow each other down do."""


def crops(count: int, *, seed: int = 0) -> Sequence[Uniforms]:
    """Random numbers of as many crops."""
    return list(uniform_rows(seed, [0] * count, range(count), "augment", AUGMENT_UNIFORMS))


def training_picture(data: bytes, uniforms: Uniforms) -> Image:
    """[224, 224, 3] from a JPEG."""
    return picture(data, uniforms, CROP, SIZE)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def decode_rate(images: Sequence[bytes], *, threads: int, seconds: float) -> DecodeRate:
    """Makes pictures of `images` for so long, in so many threads (in several processes, where there are more than 8)."""
    processes = -(-threads // _THREADS_A_PROCESS)
    shares = [(number + 1) * threads // processes - number * threads // processes for number in range(processes)]
    if processes == 1:
        return _in_this_process(images, seconds, threads)
    context = get_context("spawn")
    together = context.Barrier(processes)  # importing takes seconds: nobody begins before all have
    with ProcessPoolExecutor(processes, context, together.wait) as pool:
        rates = list(pool.map(partial(_in_this_process, images, seconds), shares))
    used = sum(rate.images_per_s / rate.images_per_core_s for rate in rates)  # cores, on average
    total = sum(rate.images_per_s for rate in rates)
    return DecodeRate(threads, total, total / used)


def images_per_s(training_flops: float, *, peak: float, share_of_peak: float) -> float:
    """Images that a GPU trains on in a second, at a share of its peak (FLOP/s) and so many FLOPs an image."""
    if not 0 < share_of_peak <= 1:
        raise ConfigError(f"the share of the peak is {share_of_peak}, not in (0, 1]: write 0.4 for 40 %")
    return share_of_peak * peak / training_flops


def _in_this_process(images: Sequence[bytes], seconds: float, threads: int) -> DecodeRate:
    numbers = crops(len(images))
    for data, uniforms in zip(images[:8], numbers[:8], strict=True):  # what is done once is done
        training_picture(data, uniforms)
    began, cpu_began = time.perf_counter(), time.process_time()

    def work(first: int) -> int:
        made = 0
        while made == 0 or time.perf_counter() < began + seconds:
            index = (first + made) % len(images)
            training_picture(images[index], numbers[index])
            made += 1
        return made

    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(work, [len(images) * thread // threads for thread in range(threads)]))
    return DecodeRate(threads, made / (time.perf_counter() - began), made / max(1e-9, time.process_time() - cpu_began))
