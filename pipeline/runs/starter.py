"""The configuration that `mae init` writes: small enough for a laptop, and commented for whoever changes it.

Every update of a small model has a fixed cost, so batches are not small; the epochs are chosen so that pretraining sees about
`PRETRAIN_IMAGES` images.
Errors: ConfigError for a local source that does not exist."""

import os
import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import yaml
from PIL import Image

from pipeline.cluster.device import local_gpu_count
from pipeline.data.sources.listing import IMAGE_SUFFIXES
from pipeline.errors import ConfigError
from pipeline.planning.hardware import cpu_computes_bf16

PRETRAIN_IMAGES = 20_000
FINETUNE_IMAGES = 3_000
"""Images that a training on a laptop's CPU sees in a few minutes, all epochs together."""
MOST_COUNTED = 100_000
MEASURED = 50
"""Images whose size is read from their headers."""
TEMPLATE = """\
# Written by `mae init`. `mae config` lists every field with its default; what is left out is the paper's choice.
#     mae plan {file}        what would run, and how long it takes
#     mae run {file}         run it; the same command continues after an interruption
name: {name}
store: .mae/store                 # where everything is written: a folder, or s3://bucket/prefix
data:
  source: {source}
  # {found}
  # Classes are the folders' names. Put images under train/, val/ and test/, or let a tenth become the test split:
  test_share: 0.1
model:
  size: tiny                      # tiny, small, base, large or huge; the fields below make it smaller still
  encoder:
    image_size: {side}{image_size_note}
    patch_size: {patch}                 # divides image_size; {grid} x {grid} patches
    embed_dim: 128
    depth: 6
    num_heads: 4
  decoder_embed_dim: 64
  decoder_depth: 2
  decoder_num_heads: 4
  mask_ratio: 0.75                # share of the patches that the encoder does not see
pretrain:
  epochs: {epochs}{epochs_note}
  global_batch: {batch}
  base_lr: 1.0e-3                 # per 256 images; small models on few images want more than the paper's 1.5e-4
  warmup_epochs: {warmup}
  precision: {precision}{precision_note}
  augment: {augment}
evaluation:                       # the pretrained encoder against the same one with random weights
  datasets: [{{name: data, protocols: [linear, finetune]}}]
  linear: {{pool: mean, epochs: 60, batch: 256, warmup_epochs: 5}}
  finetune:
    epochs: {finetune_epochs}
    global_batch: 32
    base_lr: 4.0e-3
    warmup_epochs: {finetune_warmup}
    drop_path: 0.0
    precision: {precision}
    augment: {augment}
resources:
  workers: 1                      # processes that train; each takes one CPU core, or one GPU where there is one
  micro_batch: 64
  checkpoint_every_steps: 200
"""


def starter_config(source: str, *, file: str = "mae.yaml") -> str:
    """Return the text of a YAML file for a source; an empty one is left to be filled in."""
    images = list(islice(_images(Path(source)), MOST_COUNTED)) if source and "://" not in source else []
    short_side = _short_side(images)
    # 64 patches at most: the cost of an image grows with their number
    side, patch = (64, 8) if short_side is None or short_side > 48 else (max(8, round(short_side / 4) * 4), 4)
    train = round(0.9 * len(images)) or 1000
    epochs = _epochs(PRETRAIN_IMAGES, train, most=300)
    finetune_epochs = _epochs(FINETUNE_IMAGES, train, most=30)
    on_gpu, bf16 = local_gpu_count() > 0, cpu_computes_bf16()
    return TEMPLATE.format(
        file=file,
        name=_name(source),
        # safe_dump ends a bare text with `...`, and would fold a long one
        source=yaml.safe_dump(source or "/path/to/images", width=10_000).removesuffix("\n...\n").strip(),
        found=_found(source, len(images), short_side),
        side=side,
        image_size_note="                # height and width in pixels; larger shows more and costs more",
        patch=patch,
        grid=side // patch,
        epochs=epochs,
        epochs_note=f"                     # about {epochs * train:,} images in all, for minutes on a CPU; results grow with it"
        if images
        else "                      # how often every image is seen; results grow with it",
        batch=128 if train >= 512 else 64,
        warmup=max(1, epochs // 10) if epochs > 1 else 0,
        precision="bf16" if on_gpu else "fp32",
        precision_note=""
        if on_gpu
        else "                 # bf16 is for GPUs" + ("" if bf16 else "; this CPU has no bf16 arithmetic"),
        augment="{kind: shift, shift_pixels: 2}" if side < 64 else "{kind: random_resized_crop}",
        finetune_epochs=finetune_epochs,
        finetune_warmup=1 if finetune_epochs > 1 else 0,
    )


def _images(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the folder with the images, or s3://bucket/prefix")
    for where, folders, names in os.walk(folder):
        # in place: os.walk then takes the folders in this order
        folders.sort()
        yield from (Path(where) / name for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES))


def _short_side(images: Sequence[Path]) -> int | None:
    """Return the median short side of some images in pixels, or None where none can be read."""
    sides = []
    # evenly spaced, since the first folders may be of one class or one camera
    for path in images[:: max(1, len(images) // MEASURED)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, ValueError):  # a damaged image; the run reports it
            continue
    return round(statistics.median(sides)) if sides else None


def _epochs(budget: int, images: int, *, most: int) -> int:
    return min(most, max(1, round(budget / images)))


def _name(source: str) -> str:
    stem = source.rstrip("/").rpartition("/")[2]
    return (
        "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)[:64]
        or "mae"
    )


def _found(source: str, images: int, short_side: int | None) -> str:
    if images:
        number = f"{images:,}" if images < MOST_COUNTED else f"{images:,} or more"
        return f"{number} image files" + (f", the short side {short_side} pixels in the median" if short_side else "")
    return "a folder or s3:// prefix of images, WebDataset tars or Parquet tables" + (
        "; no image files were found to choose sizes by" if source and "://" not in source else ""
    )
