"""Launches and bytes of one training pass by kind of operation, to see what a step does besides its products.

    python -m benchmarks.step_traffic                          # ViT-B at batch 8, in bf16 as the engine trains it
    python -m benchmarks.step_traffic --precision fp32 --most 40
    python -m benchmarks.step_traffic --quick                  # a small model

Runs the forward and the backward pass of the pretraining task on stored bytes, once, under a TorchDispatchMode. Counts eager
operations, which are those of a GPU in all but attention. A launch is an operation that is neither a view nor an allocation.
Bytes are the distinct memory of its tensor arguments and of its result, which a fused kernel would not move but an eager one must.

Units: launches; MB per image, 1e6 bytes."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import _timing as timing
from benchmarks.host_overhead import is_launch
from benchmarks.train_step import quick_config
from mae_core import SIZES, MAEConfig
from pipeline.training.spec.tasks import MAETask

KINDS = {
    "product": ("mm", "addmm", "bmm", "linear"),
    "attention": ("_scaled_dot_product",),
    "GELU": ("gelu",),
    "LayerNorm": ("native_layer_norm",),
}
"""Kinds that every implementation needs, by the beginning of the operation's name; everything else is `the rest`."""
REST = "the rest"


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts launches and bytes by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.moved = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_launch(func):
            name = func._schema.name.partition("::")[2]
            self.launches[name] += 1
            self.moved[name] += sum(map(_distinct_bytes, _tensors((args, kwargs, result))))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _distinct_bytes(tensor: Tensor) -> int:
    size = tensor.element_size() if tensor.numel() else 0
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1  # expanded: the same memory
    return size


def kind_of(operation: str) -> str:
    """Return the kind that an operation belongs to."""
    return next((kind for kind, names in KINDS.items() if operation.startswith(names)), REST)


def count(config: MAEConfig, *, batch: int, dtype: torch.dtype) -> Traffic:
    """Return what a forward and a backward pass launch and move."""
    task = MAETask(model=config, weight_decay=0.0, seed=0)
    module = task.build().module.to(dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, *config.encoder.image_size, 3), dtype=torch.uint8, generator=generator)
    noise = torch.rand(batch, config.encoder.num_patches, generator=generator)
    counted = Traffic()
    with counted:
        module(images, noise).sum().backward()
    return counted


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Count, print both tables and return the JSON line."""
    config = quick_config() if options.quick else MAEConfig(encoder=SIZES[options.model]())
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    counted = count(config, batch=options.batch, dtype=dtype)
    launches, moved = Counter[str](), Counter[str]()
    for name, number in counted.launches.items():
        launches[kind_of(name)] += number
        moved[kind_of(name)] += counted.moved[name]
    megabytes = {name: value / options.batch / 1e6 for name, value in {**moved, **counted.moved}.items()}
    rest = [name for name, _ in counted.moved.most_common() if kind_of(name) == REST][: options.most]
    print(f"{options.model}, batch {options.batch}, {options.precision}: one forward and backward pass")
    print(_table([*KINDS, REST], launches, megabytes))
    print()
    print(_table(rest, counted.launches, megabytes))
    return {
        "benchmark": "step_traffic",
        "model": "quick" if options.quick else options.model,
        "batch": options.batch,
        "precision": options.precision,
        "launches": dict(launches),
        "mb_per_image": {kind: round(megabytes[kind], 2) for kind in [*KINDS, REST]},
        "rest": {name: [counted.launches[name], round(megabytes[name], 2)] for name in rest},
    }


def _table(names: Sequence[str], launches: Counter[str], megabytes: dict[str, float]) -> str:
    rows = [(name, str(launches[name]), f"{megabytes[name]:.2f}") for name in names]
    return timing.table(("", "launches", "MB per image"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_traffic", description="Launches and bytes.")
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--most", type=int, default=25, help="operations of the rest to list")
    print(json.dumps(measure(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
