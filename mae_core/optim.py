"""Which parameters decay, and how fast each layer learns.

Units:  weight_decay and lr_scale are plain factors; layers count from 0 (patch embedding) to depth + 1 (head).
Errors: ConfigError for a layer decay without depth, or a depth that does not fit.
Source: He et al. 2022, arXiv 2111.06377, tables 8 and 9; Clark et al. 2020, arXiv 2003.10555 (layer-wise decay)."""

import re
from typing import TypedDict

from torch import nn

from mae_core.errors import ConfigError

NEVER_DECAYED = ("cls_token", "mask_token", "positions", "queries")
"""Learnt tokens and what is added to tokens: of two or three dimensions, yet no matrices that map one space to another."""


class ParameterGroup(TypedDict):
    """One optimiser group. The learning rate of its parameters is the schedule's times lr_scale."""

    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_scale: float
    name: str


def layer_index(name: str, *, depth: int) -> int:
    """The layer a parameter belongs to: what makes the encoder's first tokens (patch embedding, class and mask tokens,
    positions) 0, block i of the encoder i + 1, others (norm, head, the decoder with its own) depth + 1.

    `name` as in named_parameters of a ViTEncoder, Classifier or MaskedAutoencoder. Errors: ConfigError when the block's
    number is not below depth. Source: arXiv 2003.10555.
    """
    local = name.removeprefix("encoder.")
    if local.startswith("patch_embed.") or local in ("cls_token", "mask_token", "positions"):
        return 0
    block = re.match(r"blocks\.(\d+)\.", local)
    if block is None:
        return depth + 1
    if int(block[1]) >= depth:
        raise ConfigError(f"depth={depth}, yet there is a parameter {name}: write the encoder's depth")
    return int(block[1]) + 1


def parameter_groups(
    module: nn.Module, *, weight_decay: float, layer_decay: float | None = None, depth: int | None = None
) -> list[ParameterGroup]:
    """Sort the trainable parameters into at most 2 (or, with layer_decay, 2 * (depth + 2)) groups, none of them empty.

    Vectors, scalars and NEVER_DECAYED do not decay. With layer_decay the scale of layer l is
    layer_decay ** (depth + 1 - l); without, 1. Call it before ZeRO-3 splits the parameters: their rank decides.
    Errors: ConfigError unless layer_decay in (0, 1] and depth come together. Source: see the module.
    """
    if (layer_decay is None) != (depth is None):
        raise ConfigError(f"layer_decay={layer_decay}, depth={depth}: give both or neither")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ConfigError(f"layer_decay={layer_decay} is not in (0, 1]: write 0.75, or leave it out for equal rates")
    groups: dict[tuple[int, str], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
        kind = "no_decay" if exempt else "decay"
        layer = 0 if depth is None else layer_index(name, depth=depth)
        group = groups.setdefault(
            (layer, kind),
            ParameterGroup(
                params=[],
                names=[],
                weight_decay=0.0 if exempt else weight_decay,
                lr_scale=1.0 if layer_decay is None or depth is None else layer_decay ** (depth + 1 - layer),
                name=kind if depth is None else f"layer_{layer}/{kind}",
            ),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]
