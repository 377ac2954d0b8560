"""What sits on an encoder when it is evaluated: the classifier of fine-tuning, and its drop path.

Shapes: pixels [B, C, H, W] -> logits [B, num_classes]; drop scales [B, depth, 2], a number for each branch of each block.
Units:  drop_path is a probability in [0, 1).       Errors: ConfigError for another pool, norm or probability.
Source: He et al. 2022, arXiv 2111.06377, A.1 and table 9; Huang et al. 2016, arXiv 1603.09382 (drop path)."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from mae_core.errors import ConfigError
from mae_core.vit import Linear, ViTEncoder, fill, pooled


class Classifier(nn.Module):
    """An encoder with a linear head, for fine-tuning.

    Its feature is the last block's tokens under two choices, kept as `pool` and `norm`:
    pool "mean": the mean of the patch tokens, class tokens left out; "cls": the mean of the class tokens.
    norm "fresh": a new norm behind the pooling, fc_norm; the pretrained final norm has no part in it, so this classifier's
    own copy of the encoder has an Identity in its place and no parameter lies idle. "pretrained": the encoder's final norm
    on every token before the pooling, as ViTEncoder.encode. None: the usual one, fresh for "mean", pretrained for "cls".
    A fresh norm must be trained: frozen as it starts, it is no probe of what was learnt (mae_core.probes is).
    The encoder is copied: the one given is left as it was. Shapes, errors and source: the module's.
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
        self.encoder = copy.deepcopy(encoder)
        self.fc_norm: nn.Module = nn.Identity()
        if self.norm == "fresh":
            self.encoder.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(dim, eps=encoder.config.layer_norm_eps)
        self.head = Linear(dim, num_classes)
        fill(self.head.weight, lambda w: nn.init.trunc_normal_(w, std=2e-5, generator=generator), generator=generator)
        nn.init.zeros_(self.head.bias)
        self.to(device=encoder.cls_token.device, dtype=encoder.cls_token.dtype)

    def forward(self, pixels: Tensor, drop_scales: Tensor | None = None) -> Tensor:
        """Score every class: pixels float32 [B, C, H, W], drop_scales [B, depth, 2] or None -> float32 [B, num_classes].

        Errors and source: the module's.
        """
        tokens = self.encoder(pixels, None, drop_scales)  # [B, n + L, D], before the final norm when norm is "fresh"
        feature = pooled(tokens, pool=self.pool, cls_tokens=self.encoder.config.cls_tokens)  # [B, D]
        logits: Tensor = self.head(self.fc_norm(feature))
        return logits.float()


def drop_path_scales(noise: Tensor, *, drop_path: float) -> Tensor:
    """How much of each branch each sample keeps: 0 where dropped, 1 / (share kept) elsewhere, so that the mean is 1.

    The probability grows linearly over the blocks, from 0 at the first to drop_path at the last.
    Shapes: noise uniform in [0, 1) [B, depth, 2] -> [B, depth, 2]. Errors: ConfigError outside [0, 1).
    Source: arXiv 1603.09382, section 3.
    """
    if not 0.0 <= drop_path < 1.0:
        raise ConfigError(f"drop_path={drop_path} is not in [0, 1): write 0.1 to drop 10 % in the last block")
    rates = torch.linspace(0.0, drop_path, noise.shape[1], dtype=noise.dtype, device=noise.device)[
        :, None
    ]  # [depth, 1]
    return (noise >= rates).to(noise.dtype) / (1.0 - rates)
