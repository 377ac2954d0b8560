"""Images per second of a whole training step: our model in several variants, and the same model in other libraries.

    python -m benchmarks.train_step                                    # CUDA: huge, large, base; CPU: base
    python -m benchmarks.train_step --model huge --batch 128 --rounds 7
    python -m benchmarks.train_step --quick                            # a small model, nothing compiled

Every variant has the same weights, batch, optimiser (fused AdamW) and precision (bf16 autocast on CUDA, float32
on CPU). In bfloat16 ours is also timed as the engine trains it: bf16 weights without autocast, while AdamW moves
float32 copies of them. Losses are checked to be equal, before and during the timing. Variants take turns and times are medians over
rounds (benchmarks/_timing.py). Prints one table and one JSON line per model, the largest last.

Units:  images per second; mfu = FLOPs that the model needs (mae_core.training_flops) x images per second / peak
        of the matrix product in the same precision, measured in the same run. ratio_vs_x: our speed / that of
        x, above 1 where ours is faster.
Errors: SystemExit if losses differ. A variant that cannot run is listed with its reason, and its keys are null."""

import argparse
import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import _peers as peers
from benchmarks import _timing as timing
from benchmarks._variants import mean_loss
from mae_core import SIZES, MAEConfig, MAEOutput, MaskedAutoencoder, ViTConfig, reference_forward, training_flops
from pipeline.training.engine.blocks import compile_blocks

BATCHES = {"cuda": {"tiny": 512, "small": 512, "base": 256, "large": 256, "huge": 128}, "cpu": {}}
CPU_BATCH = 4
QUICK_BATCH = 16
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative. Other orders of summation differ by 1e-6 in float32; bfloat16 numbers are 4e-3 apart, averaged over many patches."""

OURS, BY_BLOCK, WHOLE = "ours", "ours, compiled by block", "ours, compiled whole"
BF16_WEIGHTS, BF16_BY_BLOCK = "ours, bf16 weights", "ours, bf16 weights, by block"
HUGGING_FACE, HUGGING_FACE_COMPILED = "hugging face", "hugging face, compiled"
TIMM = "timm blocks"


def quick_config() -> MAEConfig:
    """Return a ViT of width 192 on 112 x 112 pixels; a step takes about 0.1 s on 2 cores."""
    encoder = ViTConfig(image_size=(112, 112), embed_dim=192, depth=6, num_heads=3)
    return MAEConfig(encoder=encoder, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    model: str
    config: MAEConfig
    batch: int
    rounds: int
    steps: int
    device: torch.device
    precision: timing.Precision
    compiled: bool
    """Measure compiled variants too, ours and theirs."""
    whole: bool
    """Among them those that compile the model as a whole, which takes a minute for a large one."""
    ablations: bool
    """Measure our model with each of its savings undone."""


class Way(NamedTuple):
    """One way to compute the mean loss of a batch, and the optimiser of its weights."""

    name: str
    loss: peers.Loss
    optimizer: torch.optim.Optimizer


def loss_of(model: Callable[[Tensor, Tensor], MAEOutput]) -> peers.Loss:
    """Return the mean loss of a model, compiled or not, as a function of the batch."""
    return lambda pixels, noise: model(pixels, noise).loss.mean()


def our_ways(model: MaskedAutoencoder, plan: Plan) -> list[Way]:
    """Return our model as it is and, if asked for, compiled and with one saving undone at a time; all share their weights."""
    fused = timing.adamw(model.parameters())
    ways = [Way(OURS, loss_of(model), fused)]
    if plan.precision == "bfloat16":
        ways += bf16_ways(model, plan)
    if plan.compiled:
        ways.append(Way(BY_BLOCK, loss_of(by_block(model)), fused))
    if plan.compiled and plan.whole:
        ways.append(Way(WHOLE, loss_of(torch.compile(model)), fused))
    if plan.ablations:

        def unfused_attention(pixels: Tensor, noise: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return loss_of(model)(pixels, noise)

        foreach = timing.adamw(model.parameters(), kernel="foreach")
        ways += [
            Way("ours, attention not fused", unfused_attention, fused),
            Way("ours, AdamW not fused", loss_of(model), foreach),
            Way("ours, every patch embedded", partial(mean_loss, model, embed="all"), fused),
            Way("ours, decoder in image order", partial(mean_loss, model, order="image"), fused),
            Way("ours, head on every patch", partial(mean_loss, model, head="all"), fused),
            Way("ours, these three at once", loss_of(partial(reference_forward, model)), fused),
        ]
    return ways


def by_block(model: MaskedAutoencoder, *, mode: str | None = None) -> MaskedAutoencoder:
    """Return a twin with the same weights whose blocks run compiled, as the engine compiles them unless `mode` differs."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    compile_blocks(twin, mode=mode)
    return twin


def bf16_twin(model: MaskedAutoencoder) -> tuple[MaskedAutoencoder, torch.optim.AdamW]:
    """Return a twin with weights in bf16, and AdamW that moves float32 copies of them: the engine without DeepSpeed."""
    twin = copy.deepcopy(model).bfloat16()
    weights = list(twin.parameters())
    masters = [nn.Parameter(parameter.detach().float()) for parameter in weights]
    optimizer = timing.adamw(masters)

    def take_gradients(*_: object) -> None:
        for weight, master in zip(weights, masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None

    def put_weights(*_: object) -> None:
        with torch.no_grad():
            torch._foreach_copy_([*weights], [*masters])

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(put_weights)
    return twin, optimizer


def bf16_ways(model: MaskedAutoencoder, plan: Plan) -> list[Way]:
    """Return our model with weights in bf16 as the engine trains it, eager and, if asked for, compiled."""
    twin, optimizer = bf16_twin(model)

    def loss(model: MaskedAutoencoder, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(plan.device.type, enabled=False):
            return loss_of(model)(pixels, noise)

    ways = [Way(BF16_WEIGHTS, partial(loss, twin), optimizer)]
    if plan.compiled:
        ways.append(Way(BF16_BY_BLOCK, partial(loss, by_block(twin)), optimizer))
    return ways


def their_ways(model: MaskedAutoencoder, pixels: Tensor, noise: Tensor, plan: Plan) -> list[Way]:
    """Return the peers that are installed (benchmarks/_peers.py), with the weights of `model`.

    Shapes: pixels [B, C, H, W], noise [B, L]. Raises SystemExit if a loss differs from ours in float32.
    """
    weights, ways = model.state_dict(), []
    if peers.installed("transformers"):
        peer = peers.hugging_face(plan.config, weights).to(plan.device)
        optimizer = timing.adamw(peer.parameters())
        ways.append(Way(HUGGING_FACE, peers.hugging_face_loss(peer), optimizer))
        check_equal(HUGGING_FACE, model, ways[-1].loss, pixels, noise)
        if plan.compiled and plan.whole:
            ways.append(Way(HUGGING_FACE_COMPILED, peers.hugging_face_loss(torch.compile(peer)), optimizer))
    if peers.installed("timm"):
        timm: nn.Module = peers.TimmAutoencoder(plan.config, weights).to(plan.device)
        check_equal(TIMM, model, timm, pixels, noise)
        ways.append(Way(TIMM, timm, timing.adamw(timm.parameters())))
    return ways


def check_equal(name: str, model: MaskedAutoencoder, peer: peers.Loss, pixels: Tensor, noise: Tensor) -> None:
    """Compare the float32 losses of two images. Raises SystemExit if they differ."""
    with torch.no_grad():
        ours, theirs = float(model(pixels[:2], noise[:2]).loss.mean()), float(peer(pixels[:2], noise[:2]))
    check_near(name, theirs, ours, LOSS_TOLERANCE["float32"])


def check_near(name: str, loss: float, ours: float, tolerance: float) -> None:
    """Raise SystemExit, with both losses, unless they are near."""
    if not abs(loss - ours) <= tolerance * abs(ours):
        raise SystemExit(f"{name}: loss {loss:.7g}, ours {ours:.7g}; this is not the same model, so times mean nothing")


def measure(plan: Plan) -> dict[str, object]:
    """Time every variant of a plan, print the table and return the JSON line.

    Raises SystemExit if losses differ or our own step cannot run.
    """
    generator = torch.Generator(plan.device).manual_seed(0)
    encoder = plan.config.encoder
    model = MaskedAutoencoder(plan.config, generator=generator).to(plan.device)
    pixels = torch.randn(plan.batch, encoder.in_channels, *encoder.image_size, device=plan.device, generator=generator)
    noise = torch.rand(plan.batch, encoder.num_patches, device=plan.device, generator=generator)

    ways = our_ways(model, plan) + their_ways(model, pixels, noise, plan)
    timed = timing.take_turns(
        [
            timing.Variant(
                name,
                timing.training_step(
                    partial(loss, pixels, noise), optimizer=optimizer, device=plan.device, precision=plan.precision
                ),
            )
            for name, loss, optimizer in ways
        ],
        rounds=plan.rounds,
        steps=plan.steps,
        device=plan.device,
        precision=plan.precision,
    )
    peak = timed.peak
    if OURS in timed.failed:
        raise SystemExit(f"{OURS} cannot run: {timed.failed[OURS]}; try a smaller --batch")
    for name, loss in timed.losses.items():
        check_near(name, loss, timed.losses[OURS], LOSS_TOLERANCE[plan.precision])

    speed = {name: plan.batch / median(rounds) for name, rounds in timed.seconds.items()}
    flops = training_flops(plan.config)
    best = max((name for name in (OURS, BY_BLOCK, WHOLE) if name in speed), key=speed.__getitem__)
    print(heading(plan, peak))
    print(
        timing.table(
            ("variant", "images/s", "of the peak", "ours is faster by"),
            [
                (
                    name,
                    timing.shown(speed.get(name), ".2f"),
                    f"{100 * flops * speed[name] / peak:.1f} %" if name in speed else timed.failed[name],
                    timing.shown(timing.speed_ratio(timed.seconds, of=OURS, over=name), ".3f"),
                )
                for name, *_ in ways
            ],
        )
    )
    return {
        "benchmark": "train_step",
        "device": timing.device_name(plan.device),
        "model": plan.model,
        "batch": plan.batch,
        "precision": plan.precision,
        "variant": best,
        "images_per_s": rounded(speed[best]),
        "mfu": rounded(flops * speed[best] / peak),
        "matmul_tflops": rounded(peak / 1e12),
        "ratio_vs_hf_eager": rounded(timing.speed_ratio(timed.seconds, of=best, over=HUGGING_FACE)),
        "ratio_vs_hf_compiled": rounded(timing.speed_ratio(timed.seconds, of=best, over=HUGGING_FACE_COMPILED)),
        "ratio_vs_timm_eager": rounded(timing.speed_ratio(timed.seconds, of=best, over=TIMM)),
        "variants": {name: rounded(value) for name, value in speed.items()},
    }


def heading(plan: Plan, peak: float) -> str:
    """Return the line above the table: what was measured, and on what."""
    return (
        f"{plan.model}: {timing.device_name(plan.device)}, torch {torch.__version__}, {plan.precision}, batch {plan.batch}, "
        f"{plan.rounds} rounds of {plan.steps} steps; matrix product {peak / 1e12:.3g} TFLOP/s, "
        f"{training_flops(plan.config) / 1e9:.3g} GFLOP per image"
    )


def rounded(value: float | None) -> float | None:
    """Round to four digits, for the JSON line."""
    return None if value is None else float(f"{value:.4g}")


def plans(arguments: Sequence[str] | None = None) -> list[Plan]:
    """Return what the command line asks for, smallest model first."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description="Images per second, side by side."
    )
    parser.add_argument("--quick", action="store_true", help="a small model, nothing compiled: within 40 s on 2 cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", choices=SIZES, help="default: base large huge on CUDA, base on CPU")
    parser.add_argument("--batch", type=int, help="images per step; default: by model and device")
    parser.add_argument("--steps", type=int, help="steps per round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--precision", choices=timing.DTYPES, help="default: bfloat16 autocast on CUDA, float32 on CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled variants, ours and theirs")
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="compile whole models too")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True, help="undo each saving")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if options.quick:
        configs = {"quick": quick_config()}
    else:
        names = options.model or (["base", "large", "huge"] if on_gpu else ["base"])
        configs = {name: MAEConfig(encoder=SIZES[name]()) for name in SIZES if name in names}
    return [
        Plan(
            model=name,
            config=config,
            batch=options.batch or (QUICK_BATCH if options.quick else BATCHES[device.type].get(name, CPU_BATCH)),
            rounds=options.rounds or 5,
            steps=options.steps or (10 if on_gpu else 2 if options.quick else 1),
            device=device,
            precision=options.precision or ("bfloat16" if on_gpu else "float32"),
            compiled=not options.quick if options.compile is None else options.compile,
            whole=options.whole,
            ablations=options.ablations,
        )
        for name, config in configs.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )  # variants allocate blocks of different sizes
    for plan in plans(arguments):
        result = measure(plan)
        print(json.dumps(result), flush=True)
        torch._dynamo.reset()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
