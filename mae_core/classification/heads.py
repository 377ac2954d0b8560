"""The classifier for fine-tuning, and the drop path that regularises it.

Shapes: pixels [B, C, H, W] -> logits [B, num_classes]. Drop scales are [B, depth, 2], one factor for each of a block's two
branches.

Units: drop_path is a probability in [0, 1).

Source: He et al. 2022, arXiv 2111.06377, A.1 and table 9; Huang et al. 2016, arXiv 1603.09382 (drop path)."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from mae_core.errors import ConfigError
from mae_core.vit import Linear, ViTEncoder, fill, pooled


class Classifier(nn.Module):
    """Classify images with an encoder and a linear head, for fine-tuning.

    Two choices decide how the last block's tokens become the feature that the head reads:

    - `pool="mean"` averages the patch tokens and leaves the class tokens out; `pool="cls"` averages the class tokens.
    - `norm="fresh"` normalises the pooled feature with a new LayerNorm, `fc_norm`. The pretrained final norm is then
      unused, and an Identity replaces it so that no parameter goes without a gradient. `norm="pretrained"` applies the
      encoder's final norm to every token before pooling, as `ViTEncoder.encode` does. `None` picks the usual partner:
      fresh for "mean", pretrained for "cls".

    A fresh norm has to be trained. To measure what a frozen encoder has learnt, use `LinearProbe` or `AttentiveProbe`.
    The classifier works on a copy of the encoder and leaves the original untouched.

    Raises:
        ConfigError: pool or norm is unknown, or num_classes is not positive.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        *,
        num_classes: int,
        pool: Literal["mean", "cls"] = "mean",
        norm: Literal["fresh", "pretrained"] | None = None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "cls"):
            raise ConfigError(f"pool={pool!r} is unknown: write one of mean, cls")
        if norm not in ("fresh", "pretrained", None):
            raise ConfigError(f"norm={norm!r} is unknown: write one of fresh, pretrained")
        if num_classes < 1:
            raise ConfigError(f"num_classes={num_classes} is not positive: write the number of labels")
        dim = encoder.config.embed_dim
        self.pool: Literal["mean", "cls"] = pool
        self.norm: Literal["fresh", "pretrained"] = norm or ("fresh" if pool == "mean" else "pretrained")
        # a copy, because the final norm is replaced below
        self.encoder = copy.deepcopy(encoder)
        self.fc_norm: nn.Module = nn.Identity()
        if self.norm == "fresh":
            self.encoder.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(dim, eps=encoder.config.layer_norm_eps)
        self.head = Linear(dim, num_classes)
        # nearly zero, as in the official fine-tuning: the first gradients do not push a random head into the encoder
        fill(self.head.weight, lambda w: nn.init.trunc_normal_(w, std=2e-5, generator=generator), generator=generator)
        nn.init.zeros_(self.head.bias)
        # last, because head and norm were just made in float32 on the CPU
        self.to(device=encoder.cls_token.device, dtype=encoder.cls_token.dtype)

    def forward(self, pixels: Tensor, drop_scales: Tensor | None = None) -> Tensor:
        """Return the logits of a batch.

        Shapes: pixels float32 [B, C, H, W]; drop_scales [B, depth, 2] from `drop_path_scales`, or None to drop nothing
        -> float32 [B, num_classes].
        """
        tokens = self.encoder(pixels, None, drop_scales)  # [B, n + L, D], before the final norm when norm is "fresh"
        feature = pooled(tokens, pool=self.pool, config=self.encoder.config)  # [B, D]
        logits: Tensor = self.head(self.fc_norm(feature))
        return logits.float()


def freeze_below(model: Classifier, *, trained_blocks: float) -> int:
    """Freeze the encoder below its last blocks: patch embedding, class tokens, positions and the first residual branches.

    A block has two branches, attention and MLP, each with the norm before it, so half a block is the MLP of one. Norm and head
    stay trained. Returns the number of frozen branches.

    Source: arXiv 2111.06377, 4.3.

    Raises:
        ConfigError: trained_blocks is not a whole or half number of blocks that the encoder has.
    """
    depth = model.encoder.config.depth
    if not 0 <= trained_blocks <= depth or not float(2 * trained_blocks).is_integer():
        raise ConfigError(f"trained_blocks={trained_blocks} is not a whole or half number in [0, {depth}]: write one")
    frozen = 2 * depth - int(2 * trained_blocks)
    for name, parameter in model.encoder.named_parameters():
        parts = name.split(".")
        if parts[0] == "blocks":
            branch = 2 * int(parts[1]) + (parts[2] in ("norm2", "mlp"))
            parameter.requires_grad_(branch >= frozen)
        elif parts[0] != "norm":
            parameter.requires_grad_(trained_blocks == depth)
    return frozen


def drop_path_scales(noise: Tensor, *, drop_path: float) -> Tensor:
    """Return the factor of each branch of each sample: 0 where it is dropped, 1 / (probability of keeping it) elsewhere.

    The expected factor is therefore 1. The probability of dropping grows linearly over the blocks, from 0 at the first to
    drop_path at the last.

    Shapes: noise [B, depth, 2], uniform in [0, 1) -> [B, depth, 2].

    Source: arXiv 1603.09382, section 3.

    Raises:
        ConfigError: drop_path is not in [0, 1).
    """
    if not 0.0 <= drop_path < 1.0:
        raise ConfigError(f"drop_path={drop_path} is not in [0, 1): write 0.1 to drop 10 % in the last block")
    rates = torch.linspace(0.0, drop_path, noise.shape[1], dtype=noise.dtype, device=noise.device)  # [depth]
    rates = rates[:, None]  # [depth, 1]
    return (noise >= rates).to(noise.dtype) / (1.0 - rates)
