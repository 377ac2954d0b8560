"""Images per second of the usual recipe, to stand beside the loop's: what most public code for masked autoencoders does.

    python -m infra.acceptance.usual --model huge --batch 256 --images DIR
    python -m infra.acceptance.usual --quick                                # a small model

torchvision's ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize; torch's DataLoader with a worker on every core
but one; an autoencoder of timm's blocks (benchmarks/_peers.py), eager; bf16 autocast (float32 on a CPU); fused AdamW. A loss is
read every 20 steps, so that the queue of kernels is as long as in a loop that logs.

Units:  see infra/acceptance/loop.py, whose JSON line has the same keys.
Errors: SystemExit for a folder without usable JPEGs; ImportError without timm or torchvision."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import _data
from benchmarks import _peers as peers
from benchmarks import _timing as timing
from infra.acceptance.loop import MOST_PHOTOS, command_line, config_of, speed
from mae_core import MaskedAutoencoder
from pipeline.data.images.decode_speed import CROP, cores
from pipeline.training.meters.matmul_peak import synchronise

_WITHOUT_END = 10**9
_READ_EVERY = 20


def batches(folder: Path, *, batch: int, side: int, pin_memory: bool) -> Iterator[Tensor]:
    """Yield float32 [B, C, H, W] without end, used as in PyTorch's ImageNet example."""
    from torchvision import transforms  # type: ignore[import-untyped,unused-ignore]
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped,unused-ignore]

    crop = transforms.RandomResizedCrop(side, scale=CROP.scale, interpolation=transforms.InterpolationMode.BICUBIC)
    normalise = transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    steps = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])
    dataset: Any = ImageFolder(str(folder), steps)
    # One endless epoch: a small folder would otherwise start its workers again every few steps.
    sampler: Any = RandomSampler(dataset, num_samples=_WITHOUT_END)
    workers = max(1, cores() - 1)
    for images, _ in DataLoader(dataset, batch, sampler=sampler, num_workers=workers, pin_memory=pin_memory):
        yield images


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Train, and return the JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(options.model)
    found = _data.chosen_photos(options, count=32 if options.quick else MOST_PHOTOS)
    with TemporaryDirectory(prefix="mae-acceptance-") as name:
        folder = _data.write_files(found.files, Path(name))
        side = config.encoder.image_size[0]
        feed = batches(folder, batch=options.batch, side=side, pin_memory=device.type == "cuda")
        next(feed)  # forks the workers, before CUDA is used
        weights = MaskedAutoencoder(config, generator=torch.Generator().manual_seed(0)).state_dict()
        model = peers.TimmAutoencoder(config, weights).to(device)
        optimizer = timing.adamw(model.parameters())

        def loss() -> Tensor:
            pixels = next(feed).to(device, non_blocking=True)
            value: Tensor = model(pixels, torch.rand(len(pixels), config.encoder.num_patches, device=device))
            return value

        precision: timing.Precision = "bfloat16" if device.type == "cuda" else "float32"
        step = timing.training_step(loss, optimizer=optimizer, device=device, precision=precision)
        # Every worker's first batches were made while the model was built, so they are not timed.
        for _ in range(options.warmup if options.quick else max(options.warmup, 2 * cores())):
            step()
        synchronise(device)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < options.seconds:
            value = step()
            steps += 1
            if steps % _READ_EVERY == 0:
                float(value)  # waits for the GPU, or the queue would hide how long the steps take
        synchronise(device)
        elapsed_s = time.perf_counter() - began
        feed.close()  # type: ignore[attr-defined]
    return {"benchmark": "usual", **speed(options, device, steps=steps, elapsed_s=elapsed_s), "images": found.words}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    print(json.dumps(measure(command_line("usual", arguments))), flush=True)


if __name__ == "__main__":
    main()
