"""Parameter groups for the optimiser: which parameters decay, and how fast each layer learns.

Units: weight_decay and lr_scale are plain factors. Layers count from 0 (patch embedding) to depth + 1 (head).

Source: He et al. 2022, arXiv 2111.06377, tables 8 and 9; Clark et al. 2020, arXiv 2003.10555 (layer-wise decay)."""

import re
from typing import TypedDict

from torch import nn

from mae_core.errors import ConfigError

NEVER_DECAYED = ("cls_token", "register_tokens", "mask_token", "positions", "queries")
"""Names of learnt tokens and positions. They have two or three dimensions, yet they are not matrices that map one space to
another, so weight decay does not apply to them."""

_FIRST_TOKENS = ("cls_token", "register_tokens", "mask_token", "positions")


class ParameterGroup(TypedDict):
    """One group of parameters for a torch optimiser. Its learning rate is the schedule's, multiplied by `lr_scale`."""

    params: list[nn.Parameter]
    """The parameters of the group."""
    names: list[str]
    """Their names, in the same order."""
    weight_decay: float
    """Weight decay of the group; 0 for vectors, scalars and `NEVER_DECAYED`."""
    lr_scale: float
    """Factor on the schedule's learning rate; 1 without layer decay."""
    name: str
    """`decay` or `no_decay`, after `layer_<index>/` where there is a layer decay."""


def layer_index(name: str, *, depth: int) -> int:
    """Return the layer that a parameter belongs to.

    Layer 0 makes the encoder's first tokens: patch embedding, class, register and mask tokens, positions. Block i of the encoder is
    layer i + 1. Everything else (final norm, head, and the whole decoder with its mask token) is layer depth + 1.
    `name` is as in named_parameters of a ViTEncoder, Classifier or MaskedAutoencoder.

    Source: arXiv 2003.10555.

    Raises:
        ConfigError: The name is of a block that an encoder of this depth does not have.
    """
    local = name.removeprefix("encoder.")
    if local.startswith("patch_embed.") or local in _FIRST_TOKENS:
        return 0
    # the decoder's names begin with "decoder.", so its blocks fall through to the last layer
    block = re.match(r"blocks\.(\d+)\.", local)
    if block is None:
        return depth + 1
    if int(block[1]) >= depth:
        raise ConfigError(f"depth={depth} is too small, because there is a parameter {name}: write the encoder's depth")
    return int(block[1]) + 1


def parameter_groups(
    module: nn.Module, *, weight_decay: float, layer_decay: float | None = None, depth: int | None = None
) -> list[ParameterGroup]:
    """Sort the trainable parameters of a module into optimiser groups.

    There are at most 2 groups, or 2 * (depth + 2) with a layer decay, and none is empty. Vectors, scalars and
    `NEVER_DECAYED` get no weight decay. With a layer decay, the learning rate of layer l is scaled by
    layer_decay ** (depth + 1 - l).

    Call this before ZeRO-3 partitions the parameters: the number of dimensions decides, and partitioning flattens them.

    Raises:
        ConfigError: layer_decay is not in (0, 1], or only one of layer_decay and depth is given.
    """
    if (layer_decay is None) != (depth is None):
        raise ConfigError(f"layer_decay={layer_decay}, depth={depth}: give both or neither")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ConfigError(
            f"layer_decay={layer_decay} is not in (0, 1]: write 0.75, or omit it for equal learning rates"
        )
    groups: dict[tuple[int, str], ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # one-dimensional parameters are biases and norms; timm and the official code exempt them too
        exempt = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in NEVER_DECAYED
        kind = "no_decay" if exempt else "decay"
        # without layer decay all parameters share layer 0, hence two groups
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
    # sorted, so that checkpoints and ranks see the groups in the same order, whatever the module's order
    return [groups[key] for key in sorted(groups)]
