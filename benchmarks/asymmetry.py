"""What the asymmetric design saves (an encoder for visible patches only, a small decoder): time, operations, memory.

    python -m benchmarks.asymmetry                        # base, large, huge
    python -m benchmarks.asymmetry --model large --batch 8
    python -m benchmarks.asymmetry --quick                # a small model

There are four autoencoders per size: the encoder sees visible patches or all (with mask tokens for hidden
ones), and the decoder has 8 blocks or 1. Each does full training steps (forward, backward, fused AdamW). Prints
one table and one JSON line per size, the largest last. Every variant runs in a process of its own, several
times in turn, so that none adds to the time or memory of another.

Units:  seconds per step; GFLOP per image (mae_core.training_flops); GiB at the fullest moment of a step:
        weights, gradients, moments and activations. On CUDA this is what the allocator handed out, on a CPU the
        growth of the resident set since before the model was built. speedup and flops_ratio: all patches /
        visible ones, with a decoder of 8 blocks. masking: share of a step's time spent sorting the noise and
        gathering patches and positions.
Errors: a size that does not fit into memory ends the run; the sizes before it have been printed.
Source: He et al. 2022, arXiv 2111.06377, tables 1c and 2 (2.8 to 4.1 times, wall-clock on TPUs)."""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import _timing as timing
from mae_core import SIZES, MAEConfig, MAEOutput, MaskedAutoencoder, ViTConfig, patchify, training_flops
from mae_core.patches import gather_patches

BATCHES = {"cuda": {"base": 128, "large": 64, "huge": 32}, "cpu": {"base": 8, "large": 4, "huge": 2}}


class Measured(NamedTuple):
    """The measurements of one process."""

    seconds: float  # per step
    masking_seconds: float  # of one step's sorting and gathering
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One autoencoder to measure."""

    config: MAEConfig
    batch: int
    steps: int
    device: str
    precision: timing.Precision


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (highest since it was reset) of this process (man 5 proc). Raises OSError outside Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def sort_and_gather(model: MaskedAutoencoder, patches: Tensor, noise: Tensor) -> None:
    """Do the sorting and gathering of one training step, as mae_core/mae.py and mae_core/vit.py do, and nothing else.

    Shapes: patches [B, L, N], noise [B, L]. None of it has a backward pass.
    """
    masked = model.mask(patches, noise)
    ids = torch.cat([masked.ids_visible, masked.ids_hidden], dim=1)
    gather_patches(patches, masked.ids_visible)
    gather_patches(patches, masked.ids_hidden)  # the patches to predict
    for table, index in (
        (model.encoder.positions, ids if model.config.encoder_input == "all" else masked.ids_visible),
        (model.decoder.positions, ids),
    ):
        gather_patches(table.expand(len(patches), -1, -1), index)


def measure(task: Task) -> Measured:
    """Build, train and measure one autoencoder; meant for a process of its own."""
    device = torch.device(task.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = resident_bytes("VmRSS")

    generator = torch.Generator(device).manual_seed(0)
    encoder = task.config.encoder
    model = MaskedAutoencoder(task.config, generator=generator).to(device)
    pixels = torch.randn(task.batch, encoder.in_channels, *encoder.image_size, device=device, generator=generator)
    noise = torch.rand(task.batch, encoder.num_patches, device=device, generator=generator)

    def mean_loss() -> Tensor:
        output: MAEOutput = model(pixels, noise)
        return output.loss.mean()

    step = timing.training_step(
        mean_loss,
        optimizer=timing.adamw(model.parameters()),
        device=device,
        precision=task.precision,
    )
    step()
    seconds = timing.seconds_of(step, times=task.steps, device=device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else resident_bytes("VmHWM")
    patches = patchify(pixels, encoder.patch_size)
    sort_and_gather(model, patches, noise)
    masking = timing.seconds_of(lambda: sort_and_gather(model, patches, noise), times=10, device=device)
    return Measured(seconds, masking, peak - before)


def measure_all(tasks: Sequence[Task], *, rounds: int) -> list[list[Measured]]:
    """Return `rounds` results per task, taken in turns, each from a fresh process in which torch has started no threads.

    Raises BrokenProcessPool if a process was killed, usually because memory ran out.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["benchmarks._timing", "mae_core", "torch._dynamo"]
    )  # imported once instead of in every process
    found: list[list[Measured]] = [[] for _ in tasks]
    for _ in range(rounds):
        for task, results in zip(tasks, found, strict=True):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                results.append(pool.submit(measure, task).result())
    return found


def variants_of(config: MAEConfig) -> list[MAEConfig]:
    """Return the four variants, the reference last: visible patches or all, the decoder of `config` or one of 1 block."""
    shallow = replace(config, decoder_depth=1)
    return [
        config,
        shallow,
        replace(shallow, encoder_input="all"),
        replace(config, encoder_input="all"),
    ]


def compare(name: str, tasks: Sequence[Task], *, rounds: int) -> dict[str, object]:
    """Measure the variants of a size, of which the last is the reference; print the table and return the JSON line."""
    found = measure_all(tasks, rounds=rounds)
    reference, flops = found[-1], [training_flops(task.config) for task in tasks]
    faster = [
        median(theirs.seconds / ours.seconds for ours, theirs in zip(results, reference, strict=True))
        for results in found
    ]
    masking = [median(result.masking_seconds / result.seconds for result in results) for results in found]
    peaks = [
        min(result.peak_bytes for result in results) for results in found
    ]  # the least: leftovers of malloc can only add
    task = tasks[0]
    device = timing.device_name(torch.device(task.device))
    print(
        f"{name}: {device}, torch {torch.__version__}, {task.precision}, batch {task.batch}, "
        f"{rounds} rounds of {task.steps} steps"
    )
    print(
        timing.table(
            ("encoder sees, decoder blocks", "s/step", "faster", "GFLOP/image", "fewer", "GiB", "less", "masking"),
            [
                (
                    f"{task.config.encoder_input}, {task.config.decoder_depth}",
                    f"{median(result.seconds for result in results):.3f}",
                    f"{speedup:.2f} x",
                    f"{count / 1e9:.1f}",
                    f"{flops[-1] / count:.2f} x",
                    f"{peak / 2**30:.2f}",
                    f"{peaks[-1] / peak:.2f} x",
                    f"{100 * share:.1f} %",
                )
                for task, results, speedup, count, peak, share in zip(
                    tasks, found, faster, flops, peaks, masking, strict=True
                )
            ],
        )
    )
    return {
        "benchmark": "asymmetry",
        "device": device,
        "model": name,
        "batch": task.batch,
        "precision": task.precision,
        "speedup": round(faster[0], 3),
        "flops_ratio": round(flops[-1] / flops[0], 3),
        "speedup_decoder_1": round(faster[1], 3),
        "memory_ratio": round(peaks[-1] / peaks[0], 3),
        "masking_share": round(masking[0], 5),
    }


def quick_config() -> MAEConfig:
    """Return a ViT of width 192 on 160 x 160 pixels; a step takes about a second on 2 cores."""
    encoder = ViTConfig(image_size=(160, 160), embed_dim=192, depth=12, num_heads=3)
    return MAEConfig(encoder=encoder, decoder_embed_dim=96, decoder_num_heads=3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.asymmetry", description="What the asymmetric design saves."
    )
    parser.add_argument("--quick", action="store_true", help="a small model: within 40 s on 2 cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["base", "large", "huge"])
    parser.add_argument("--batch", type=int, help="images per step; default: by model and device")
    parser.add_argument("--steps", type=int, help="steps per round, after an untimed one")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--precision", choices=timing.DTYPES, help="default: bfloat16 autocast on CUDA, float32 on CPU")
    options = parser.parse_args(arguments)
    on_gpu = options.device.startswith("cuda")
    batches = BATCHES["cuda" if on_gpu else "cpu"]
    names = [name for name in SIZES if name in options.model]
    configs = {"quick": quick_config()} if options.quick else {name: MAEConfig(encoder=SIZES[name]()) for name in names}
    for name, config in configs.items():
        tasks = [
            Task(
                config=variant,
                batch=options.batch or batches.get(name, 8),
                steps=options.steps or (5 if on_gpu else 1),
                device=options.device,
                precision=options.precision or ("bfloat16" if on_gpu else "float32"),
            )
            for variant in variants_of(config)
        ]
        print(json.dumps(compare(name, tasks, rounds=options.rounds or 3)), flush=True)


if __name__ == "__main__":
    main()
