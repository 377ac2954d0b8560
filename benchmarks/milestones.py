"""What scoring checkpoints along the way costs the training beside it.

    python -m benchmarks.milestones            # generated photographs
    python -m benchmarks.milestones --quick    # fewer steps

A small encoder is pretrained in this process, beside a local Ray cluster whose one CPU is free for scores. The loop's share is
the time that its thread spends in calls of `Milestones`, over the time of its steps. Beside it stands the speed with scores and
without, which also shows what two processes take from each other through memory and caches.

Units:  shares in [0, 1]; images per second, medians over logged rows.
Errors: SystemExit for a folder without usable JPEGs."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks import _data
from mae_core import MAEConfig, ViTConfig
from pipeline import cluster
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import dataset_address
from pipeline.data.feed.order import OrderConfig
from pipeline.evaluation.milestones import MilestoneScores
from pipeline.graph.receipts import claim
from pipeline.graph.step import StageInput
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.checkpoints.retention import MILESTONES
from pipeline.training.health.stop_reasons import StopReason
from pipeline.training.loop.loop import train
from pipeline.training.meters.milestones import Milestones
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import MAETask
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import enter_world

_MODEL = MAEConfig(
    encoder=ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=192, depth=4, num_heads=3),
    decoder_embed_dim=64,
    decoder_depth=1,
    decoder_num_heads=4,
)
_BATCH, _CHECKPOINT_EVERY, _LOG_EVERY = 32, 20, 5


class _Never:
    """Lets a training run to its end."""

    def stop_reason(self) -> StopReason:
        """Return no reason."""
        return ""


class Trained(NamedTuple):
    """What a training took, and what was scored."""

    images_per_s: float
    seconds: float
    in_milestones_s: float
    scored: int


def trained(root: Path, shards: StageInput, *, steps: int, images: int) -> Trained:
    """Pretrain in this process; `images`: how many are scored at each checkpoint, 0 for no scores."""
    dataset = dataset_address(shards)
    samples = int(shards.facts["counts"]["splits"]["train"]["served"])
    spec = TrainSpec(
        task=MAETask(model=_MODEL, weight_decay=0.05, seed=0),
        recipe=Recipe(global_batch=_BATCH, epochs=steps * _BATCH // samples, precision="fp32", warmup_epochs=0),
        order=OrderConfig(seed=0),
        image_size=_MODEL.encoder.image_size,
        dataset=dataset,
        train_samples="all",
        evaluation_split="",
        resources=Resources(log_every_steps=_LOG_EVERY, checkpoint_every_steps=_CHECKPOINT_EVERY, use_gpu=False),
    )
    if images:
        scores = MilestoneScores(model=_MODEL, basis=None, dataset=dataset, images=images, resources=spec.resources)
        spec = replace(spec, milestones=scores)
    attempt = _data.attempt(root, executor="ray")
    claim(attempt.root, continues="")
    inside, take = 0.0, Milestones.take

    def timed(self: Milestones) -> dict[str, float]:
        nonlocal inside
        began = time.perf_counter()
        taken = take(self)
        inside += time.perf_counter() - began
        return taken

    began = time.perf_counter()
    with patch.object(Milestones, "take", timed):
        result = train(spec, attempt, world=enter_world(), tracker=NullTracker(), stop_signal=_Never())
    seconds = time.perf_counter() - began
    with open_checkpoint(attempt.root, result.checkpoint_key) as checkpoint:
        speeds = [row["images_per_s"] for row in checkpoint.history()[2:]]
    return Trained(median(speeds), seconds, inside, len(list(attempt.root.list(MILESTONES))))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return the JSON line."""
    steps = 80 if options.quick else 1000
    found = _data.chosen_photos(options, count=64)
    with TemporaryDirectory(prefix="mae-benchmark-") as name:
        root = Path(name)
        shards = _data.dataset(_data.write_files(found.files, root / "images", copies=4), root, shards=1)
        cluster.connect(cpus=1)
        try:
            plain = trained(root / "plain", shards, steps=steps, images=0)
            scored = trained(root / "scored", shards, steps=steps, images=256)
        finally:
            cluster.disconnect()
    share = scored.in_milestones_s / scored.seconds
    print(f"{scored.scored} checkpoints scored in {scored.seconds:.1f} s of training")
    print(f"the loop spent {100 * share:.4f} % of its time on them; at most 0.5 % is allowed")
    print(f"images/s: {plain.images_per_s:.0f} without scores, {scored.images_per_s:.0f} with scores beside it")
    return {
        "benchmark": "milestones",
        "loop_share": share,
        "scored": scored.scored,
        "images_per_s": round(scored.images_per_s, 1),
        "images_per_s_without": round(plain.images_per_s, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = _data.parser("milestones", "What scoring checkpoints along the way costs the training beside it.")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
