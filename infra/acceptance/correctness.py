"""Whether the engine trains alike everywhere: losses and gradient norms of a small model, next to those that a CPU printed.

    python -m infra.acceptance.correctness            # compares with cpu_steps.json, beside this file
    python -m infra.acceptance.correctness --write    # writes it, on a CPU, after a change that is meant to change losses

Eight steps of two micro-batches, with images and mask noise made from counters, at ZeRO 1, 2 and 3, in fp32 and bf16, and
with compiled blocks where `resources` has a word for them. Then a checkpoint of the training loop, written on this machine's
device and continued on its CPU, against a training that stays on the device.

Output: one JSON line per check. `loss_off` and `norm_off` are the largest relative differences over the steps, `loss_bound` and
`norm_bound` what is accepted. Exit code 1 if a check fails.
Errors: SystemExit for `--write` on a machine with a GPU, and for a folder without usable JPEGs."""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import torch

from benchmarks import _data
from benchmarks.huge import StopAfter, part
from mae_core import MAEConfig, ViTConfig
from mae_core.randomness import mask_noise, uniform_rows
from pipeline.cluster.device import local_gpu_count
from pipeline.cluster.resources import Resources, ZeroStage
from pipeline.graph.receipts import claim
from pipeline.tracking import NullTracker
from pipeline.training.checkpoints.format import open_checkpoint, resume_point
from pipeline.training.engine.deepspeed_engine import Engine, MicroBatch
from pipeline.training.loop.loop import train
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.tasks import MAETask
from pipeline.training.spec.train_spec import engine_settings
from pipeline.training.world import World, enter_world

Precision = Literal["fp32", "bf16"]
STORED = Path(__file__).with_name("cpu_steps.json")
STEPS, BATCH, MICRO_BATCH, LR = 8, 16, 8, 1e-3
MODEL = MAEConfig(
    encoder=ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=96, depth=4, num_heads=3),
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
)
SAVED_AT, CONTINUED_TO = 4, 6


class Step(NamedTuple):
    """What one training step met."""

    loss: float
    grad_norm: float


class Bound(NamedTuple):
    """The largest accepted relative differences."""

    loss: float
    norm: float


BOUNDS: dict[Precision, Bound] = {"fp32": Bound(1e-5, 1e-4), "bf16": Bound(5e-3, 4e-2)}
"""Relative to fp32 on a CPU. fp32: sums in another order, 7e-8 seen at ZeRO-3; a slip to TF32, which keeps 10 bits, would show as
1e-3. bf16 resolves 4e-3: 9e-4 and 8e-3 seen on a CPU."""


def micro_batches(step: int, world: World) -> list[MicroBatch]:
    """Return the batch of a step, equal on every machine."""
    epochs, samples = [step] * BATCH, range(BATCH)
    side = MODEL.encoder.image_size[0]
    drawn = uniform_rows(0, epochs, samples, "acceptance", side * side * 3)
    pixels = torch.from_numpy((drawn * 256).astype("uint8")).view(BATCH, side, side, 3)
    noise = torch.from_numpy(mask_noise(0, epochs, samples, MODEL.encoder.num_patches))
    parts = [slice(start, start + MICRO_BATCH) for start in range(0, BATCH, MICRO_BATCH)]
    weights = torch.ones(MICRO_BATCH, device=world.device)
    return [MicroBatch((pixels[part].to(world.device), noise[part].to(world.device)), weights) for part in parts]


def trained(world: World, precision: Precision, zero_stage: ZeroStage, **resources: Any) -> list[Step]:
    """Train the small model from its seed and return its steps. `resources`: more words of that section."""
    recipe = Recipe(global_batch=BATCH, epochs=1, warmup_epochs=0.0, precision=precision)
    where = Resources(zero_stage=zero_stage, micro_batch=MICRO_BATCH, **resources)
    task = MAETask(model=MODEL, weight_decay=recipe.weight_decay, seed=0)
    with closing(Engine(*task.build(), engine_settings(recipe, where, workers=1), world)) as engine:
        return [
            Step(loss_sum / BATCH, grad_norm)
            for loss_sum, grad_norm in (
                engine.train_step(micro_batches(step, world), global_batch=BATCH, lr=LR) for step in range(STEPS)
            )
        ]


def compared(check: str, steps: Sequence[Step], expected: Sequence[Step], bound: Bound) -> dict[str, Any]:
    """Return the JSON line of a check. A loss that is not a number fails it."""
    loss, norm = (
        # NaN first: max() would pass over it, because it compares as neither smaller nor larger.
        max(
            (abs(ours[field] / theirs[field] - 1) for ours, theirs in zip(steps, expected, strict=True)),
            key=lambda off: (math.isnan(off), off),
        )
        for field in (0, 1)
    )
    return {
        "benchmark": "correctness",
        "check": check,
        "ok": loss <= bound.loss and norm <= bound.norm,
        "loss_off": loss,
        "loss_bound": bound.loss,
        "norm_off": norm,
        "norm_bound": bound.norm,
    }


def engine_checks(world: World, expected: Sequence[Step]) -> Iterator[dict[str, Any]]:
    """Train at every ZeRO stage in both precisions, eager and, where there is a word for it, compiled."""
    has_word = "compile" in Resources.model_fields
    ways: dict[str, dict[str, Any]] = {"": {"compile": "off"} if has_word else {}}
    # On a CPU nothing is compiled, so there this would only repeat the eager steps.
    if has_word and world.device.type == "cuda":
        ways[", compiled"] = {"compile": "auto"}
    for way, words in ways.items():
        for precision, bound in BOUNDS.items():
            for zero_stage in get_args(ZeroStage):
                steps = trained(world, precision, zero_stage, **words)
                yield compared(f"{precision} ZeRO-{zero_stage}{way}", steps, expected, bound)


def checkpoint_check(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Continue a checkpoint of this machine's device on the CPU, in a process of its own."""
    recipe = Recipe(global_batch=BATCH, epochs=CONTINUED_TO, warmup_epochs=0.0, precision="fp32")
    found = _data.chosen_photos(options, count=BATCH)
    with TemporaryDirectory(prefix="mae-acceptance-") as name:
        root = Path(name)
        source = _data.write_files(found.files, root / "images")
        spec = _data.pretraining(
            MODEL,
            recipe,
            Resources(micro_batch=MICRO_BATCH, log_every_steps=1),
            _data.dataset(source, root, shards=1),
            cache=root / "cache",
        )
        straight, moved = (_data.attempt(root / folder) for folder in ("straight", "moved"))
        for attempt, steps in ((straight, CONTINUED_TO), (moved, SAVED_AT)):
            claim(attempt.root, continues="")
            train(spec, attempt, world=world, tracker=NullTracker(), stop_signal=StopAfter(steps))
        with open_checkpoint(straight.root, resume_point(straight.root)) as checkpoint:
            expected = checkpoint.history()[-1]
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the worker that `part` starts
        last = part(spec, moved, workers=1, steps=CONTINUED_TO - SAVED_AT).row
    if last["step"] != expected["step"]:
        raise SystemExit(
            f"the CPU ended at step {last['step']:g}, the device at {expected['step']:g}: the checkpoint was not read"
        )
    on_cpu, on_device = (Step(row["loss"], row["grad_norm"]) for row in (last, expected))
    return compared("checkpoint continued on the CPU", [on_cpu], [on_device], BOUNDS["fp32"])


def checks(world: World, expected: Sequence[Step], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of all checks."""
    yield from engine_checks(world, expected)
    yield checkpoint_check(world, options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, or write what to compare with."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.acceptance.correctness", description="Losses next to a CPU's."
    )
    parser.add_argument("--write", action="store_true", help=f"write {STORED.name}, on a CPU")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs for the checkpoint; default: generated ones")
    options = parser.parse_args(arguments)
    world = enter_world(use_gpu=local_gpu_count() > 0)
    if options.write:
        if world.device.type == "cuda":
            raise SystemExit("--write stores a CPU's steps: set CUDA_VISIBLE_DEVICES= to hide the GPU")
        found = {"torch": torch.__version__, "steps": [step._asdict() for step in trained(world, "fp32", 1)]}
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        return
    expected = [Step(**step) for step in json.loads(STORED.read_text())["steps"]]
    failed = False
    for line in checks(world, expected, options):
        print(json.dumps(line), flush=True)
        failed = failed or not line["ok"]
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
