"""How Transformer blocks run in training: compiled one by one, and recomputed in the backward pass.

Both replace the method `forward` on the instances. The model's code, its parameters and their names stay as they are, so a
checkpoint does not tell how its blocks ran. Block by block, because a model of 40 blocks has two kinds: each is compiled once
and serves all its blocks, whereas a whole model takes several times as long to compile for little more speed
(docs/decisions/021-compiled-blocks.md)."""

import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from os import environ
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from mae_core.vit import Block
from pipeline.cluster.resources import Compile

BACKEND = "inductor"


def compile_blocks(module: nn.Module, *, mode: str | None = None) -> None:
    """Make every block run compiled in passes that need gradients, and as it is in all others.

    `mode` is torch.compile's; no other than its default has been measured (benchmarks/step_variants.py does).
    Call it before `recompute_blocks`, so that what is recomputed is compiled too, and before the first pass.
    """
    # Dynamo counts compilations per code object, and every block of every model shares one. A process that trains one model
    # after another would come to the limit of 8, after which blocks silently run as they are.
    torch.compiler.reset()
    # Static shapes. A rank meets the full micro-batch, one that is cut short and possibly padding of one sample: three sizes
    # for each of two kinds of blocks, within that limit. With dynamic shapes there would be as many compilations, and the
    # kernels of the decoder, compiled second, would take any number of tokens.
    compiled = torch.compile(Block.forward, backend=BACKEND, mode=mode, dynamic=False)
    for block in _blocks(module):
        block.forward = partial(_run, partial(compiled, block), block.forward)  # type: ignore[method-assign]


def _run(
    compiled: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, drop_scale: Tensor | None = None
) -> Tensor:
    # Evaluation has batches of other sizes and no gradients: more compilations, for a small share of the time.
    return (compiled if torch.is_grad_enabled() else plain)(x, drop_scale)


def recompute_blocks(module: nn.Module) -> None:
    """Make every block keep only its input and recompute its activations in the backward pass.

    A block draws no random numbers (drop path's noise is an argument), so there is no generator state to preserve.
    """
    for block in _blocks(module):
        recomputing = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = recomputing  # type: ignore[method-assign]


def why_not_compiled(choice: Compile, device: torch.device) -> str | None:
    """Return None if blocks are compiled on this device, or the reason that they are not."""
    if choice == "on":
        return None
    if choice == "off":
        return "resources.compile is off"
    if device.type != "cuda":
        return "on a CPU it gains nothing"
    return _missing_for_kernels()


def _missing_for_kernels() -> str | None:
    """Return what Triton lacks to build the launchers of its kernels, which are written in C, or None."""
    if not has_triton():
        return "Triton is not installed or does not support this GPU"
    if not (environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "this node has no C compiler: install gcc or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"{header} is missing: install Python's headers"
    return None


def _blocks(module: nn.Module) -> Iterator[Block]:
    return (part for part in module.modules() if isinstance(part, Block))
