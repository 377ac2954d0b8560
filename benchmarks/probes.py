"""What the heads of frozen-encoder probes cost: the linear, the efficient and the full attentive one, as the engine trains them.

    python -m benchmarks.probes                    # ViT-B on ImageNet
    python -m benchmarks.probes --quick            # ViT-S, fewer images

A step takes the features of a batch, already encoded, to the gradients of a head: norm over the batch, forward and backward
pass. Heads take turns and times are medians over rounds. The encoder's forward pass over the same images is timed as well.
On a CPU one core works and its time counts, which other processes do not lengthen. Prints one table and one JSON line.

Units:  milliseconds per image; MFLOP per image of a head's forward pass (mae_core.cost). full_over_efficient: time of the
        full head / that of the efficient one; flops_full_over_efficient likewise.
Source: Psomas et al. 2025, arXiv 2506.10178 (up to ten times faster than full attentive probes)."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks import _timing as timing
from mae_core import SIZES, ViTConfig, attentive_probe_flops, efficient_probe_flops, linear_probe_flops
from pipeline.training.spec.probe_tasks import FrozenProbes, ProbeKind, ProbeTask, Reads

READS: dict[ProbeKind, Reads] = {"linear": "cls", "efficient": "patches", "full": "patches"}
QUERIES: dict[ProbeKind, int] = {"linear": 1, "efficient": 32, "full": 1}


def probes(kind: ProbeKind, encoder: ViTConfig, *, num_classes: int) -> FrozenProbes:
    """Return a random encoder with one head."""
    task = ProbeTask(
        kind=kind,
        encoder=encoder,
        encoder_uri="",
        reads=READS[kind],
        num_classes=num_classes,
        num_heads=encoder.num_heads,
        num_queries=QUERIES[kind],
        lr_scales=(1.0,),
        weight_decay=0.0,
        momentum=0.9,
        trust_coefficient=0.001,
        seed=0,
    )
    module = task.build().module
    assert isinstance(module, FrozenProbes)
    return module.train()


def head_flops(kind: ProbeKind, encoder: ViTConfig, *, num_classes: int) -> int:
    """Return the FLOPs per image of a head's forward pass."""
    dim, tokens, queries = encoder.embed_dim, encoder.num_patches, QUERIES[kind]
    if kind == "linear":
        return linear_probe_flops(dim=dim, num_classes=num_classes)
    count = attentive_probe_flops if kind == "full" else efficient_probe_flops
    return count(tokens=tokens, dim=dim, num_queries=queries, num_classes=num_classes)


def step_of(module: FrozenProbes, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a function that takes the gradients of one step from features that are encoded once, here."""
    features, weights = module(images), torch.ones(len(labels), device=labels.device)

    def step() -> Tensor:
        module.zero_grad(set_to_none=False)
        return module.learn([features], [labels], [weights], batch=len(labels), share=lambda _: None)

    return step


def seconds_of(action: Callable[[], object], *, times: int, device: torch.device) -> float:
    """Return the mean seconds that an action takes the GPU, or of the process's CPU time."""
    if device.type == "cuda":
        return timing.seconds_of(action, times=times, device=device)
    began = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - began) / times


def measure(
    encoder: ViTConfig, *, batch: int, num_classes: int, rounds: int, steps: int, device: torch.device
) -> dict[str, object]:
    """Time the heads, print the table and return the JSON line."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, *encoder.image_size, 3), generator=generator).byte().to(device)
    labels = torch.randint(0, num_classes, (batch,), generator=generator).to(device)
    actions: dict[str, Callable[[], object]] = {}
    for kind in READS:
        module = probes(kind, encoder, num_classes=num_classes).to(device)
        actions[kind] = step_of(module, images, labels)
        actions["encoder"] = partial(module, images)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(seconds_of(action, times=steps, device=device))
    flops = {kind: head_flops(kind, encoder, num_classes=num_classes) for kind in READS}
    per_image = {name: 1000 * median(times) / batch for name, times in seconds.items()}
    print(
        f"{timing.device_name(device)}, torch {torch.__version__}, float32, batch {batch}, {rounds} rounds of {steps} steps"
    )
    print(
        timing.table(
            ("head", "ms/image", "of the encoder's", "MFLOP/image"),
            [
                (
                    name,
                    f"{each:.3f}",
                    f"{100 * each / per_image['encoder']:.1f} %",
                    f"{flops[name] / 1e6:.1f}" if name in flops else "-",
                )
                for name, each in per_image.items()
            ],
        )
    )
    return {
        "benchmark": "probes",
        "device": timing.device_name(device),
        "batch": batch,
        "full_over_efficient": round(per_image["full"] / per_image["efficient"], 2),
        "flops_full_over_efficient": round(flops["full"] / flops["efficient"], 2),
        "efficient_share_of_encoder": round(per_image["efficient"] / per_image["encoder"], 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description="What the heads of probes cost.")
    parser.add_argument("--quick", action="store_true", help="ViT-S and few images: within 20 s on 2 cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=SIZES, help="default: base, or small with --quick")
    parser.add_argument("--batch", type=int, help="default: 1024 on CUDA, 64 on a CPU, 8 with --quick")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine spin, which would count
    encoder = SIZES[options.model or ("small" if options.quick else "base")]()
    batch = options.batch or (8 if options.quick else 1024 if device.type == "cuda" else 64)
    line = measure(
        encoder,
        batch=batch,
        num_classes=options.classes,
        rounds=options.rounds,
        steps=options.steps,
        device=device,
    )
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
