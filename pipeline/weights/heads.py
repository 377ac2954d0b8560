"""A classifier's own head, as it comes with an encoder: which tensors it is, and what it reads.

    timm, official MAE   head.*, and fc_norm.* where the mean of the patch tokens is normalised instead of every token
    Hugging Face         classifier.*; of DINOv2 it reads the class token and the mean of the patch tokens side by side
    wrappers             head.*, fc.*, classifier.* or linear_head.* beside the encoder

Shapes: weight [classes, D], or [classes, 2 D] where the head reads both; features [n, D] -> logits [n, classes].
Errors: DataError for a head whose tensors do not fit each other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from mae_core.config import ViTConfig
from pipeline.errors import DataError
from pipeline.storage import Store
from pipeline.weights.foreign import ForeignWeights
from pipeline.weights.own import read_weights

HEAD = "head.safetensors"
HeadReads = Literal["cls", "mean", "mean of unnormalised", "cls and mean"]
"""The class token or the mean of the patch tokens after the final norm; the mean before it, which the head normalises itself; or
the first two, one behind the other."""

_WEIGHT = re.compile(r"(?:.*\.)?(?:head|fc|classifier|linear_head)\.weight")


@dataclass(frozen=True)
class Head:
    """A linear classifier on an encoder's features."""

    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor] | None = None
    """Weight and bias of the norm of the pooled feature (`fc_norm`)."""

    def logits(self, features: Tensor, *, layer_norm_eps: float) -> Tensor:
        """Return the scores of the classes: [n, D or 2 D] -> [n, classes]."""
        if self.norm:
            features = torch.nn.functional.layer_norm(features, features.shape[-1:], *self.norm, eps=layer_norm_eps)
        return torch.nn.functional.linear(features, self.weight, self.bias)


def head_in(found: ForeignWeights, config: ViTConfig) -> tuple[Head, HeadReads] | str | None:
    """Return the classification head of a file and what it reads, why its heads cannot be used, or None if it has none."""
    tensors = {**found.beside, **found.state_dict}
    names = [
        name
        for name, value in tensors.items()
        if _WEIGHT.fullmatch(name) and value.ndim == 2 and value.shape[0] > 1 and value.shape[1] % config.embed_dim == 0
    ]
    if len(names) > 1:
        return f"{len(names)} heads are in the file ({', '.join(sorted(names)[:4])}), and none is taken"
    if not names:
        return None
    stem = names[0].removesuffix("weight")
    weight = tensors[names[0]].float()
    bias = tensors.get(f"{stem}bias", torch.zeros(len(weight))).float()
    norm = None
    if "fc_norm.weight" in tensors:
        norm = (tensors["fc_norm.weight"].float(), tensors["fc_norm.bias"].float())
    if bias.shape != weight.shape[:1] or (norm and norm[0].shape != weight.shape[1:]):
        raise DataError(
            f"{names[0]} of shape {tuple(weight.shape)} does not fit its bias or fc_norm: give the whole file"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise DataError(
            f"{names[0]} holds values that are not finite: the training diverged, so use an earlier checkpoint"
        )
    return Head(weight, bias, norm), _reads(found.config, weight, config, normalises=norm is not None)


def _reads(stated: Mapping[str, Any], weight: Tensor, config: ViTConfig, *, normalises: bool) -> HeadReads:
    if normalises:
        return "mean of unnormalised"
    if weight.shape[1] == 2 * config.embed_dim:
        return "cls and mean"
    arguments = stated.get("model_args") or {}
    return "mean" if arguments.get("global_pool", stated.get("global_pool")) == "avg" else "cls"


def write_head(store: Store, head: Head) -> None:
    """Write a head."""
    norm = {"norm.weight": head.norm[0], "norm.bias": head.norm[1]} if head.norm else {}
    tensors = {"weight": head.weight, "bias": head.bias, **norm}
    store.write(HEAD, save({name: value.contiguous() for name, value in tensors.items()}))


def read_head(store: Store) -> Head:
    """Read what `write_head` wrote."""
    found = read_weights(store, HEAD)
    norm = (found["norm.weight"], found["norm.bias"]) if "norm.weight" in found else None
    return Head(found["weight"], found["bias"], norm)
