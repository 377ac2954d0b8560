"""Probes: small classifiers on the features of a frozen encoder.

Shapes: features [B, D] or tokens [B, T, D] -> logits float32 [B, num_classes]; h heads, Q queries.
Units:  none; features may have any scale, because they are standardised first.
Errors: ConfigError for sizes that do not fit; torch's ValueError for a training batch of one value a feature.
Source: He et al. 2022, arXiv 2111.06377, A.1 (linear); El-Nouby et al. 2024, arXiv 2401.08541, section 4 (attentive).

Both standardise features with BatchNorm without scale and shift, so that one learning rate serves encoders whose features
differ in scale. In train mode a batch is standardised by its own statistics, and the running ones, which eval mode uses,
are updated: on purpose. Train mode is for the probe alone; the encoder stays in eval mode and is given no drop path.

The statistics are those of a rank's own batch. With few images a rank they are noisy, the running ones differ between
ranks, and a checkpoint holds those of the rank that wrote it. Convert the probe to SyncBatchNorm then, or standardise once
by the statistics of the whole split, towards which the running ones converge: the pipeline's linear stage does that.

Features go through in the dtype of the probe's weights, float32 unless the caller casts it."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math

import torch
from torch import Tensor, nn

from mae_core.errors import ConfigError
from mae_core.vit import Linear, fill

BATCH_NORM_EPS = 1e-6
"""Added to the variance of a feature; torch's 1e-5 would already shrink features of deviation 0.01 by 5 %."""


class LinearProbe(nn.Module):
    """BatchNorm without affine, then one linear layer: weight normal with deviation 0.01, bias zero.

    The feature (which tokens, pooled how, through which norm) is the caller's: ViTEncoder.encode gives both of its pools
    after the pretrained final norm. Shapes, units, errors, statistics and source: the module's.
    """

    def __init__(self, dim: int, num_classes: int, *, generator: torch.Generator) -> None:
        super().__init__()
        _check_positive(dim=dim, num_classes=num_classes)
        self.dim = dim
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
        self.head = _head(dim, num_classes, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Score every class: features [B, D] -> float32 [B, num_classes]. Errors and source: the module's."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ConfigError(f"features of shape {tuple(features.shape)} are not [B, dim={self.dim}]: pool the tokens")
        logits: Tensor = self.head(self.norm(features.to(self.head.weight.dtype)))
        return logits.float()


class AttentiveProbe(nn.Module):
    """Multi-head cross attention of learnt queries over standardised tokens, their mean, and one linear layer.

    A feature's statistics are taken over all tokens of the batch. Key and value maps are xavier uniform, the queries
    normal with deviation 0.02, the head as in LinearProbe. Which tokens it reads (patches, class tokens or both; after
    the final norm or before) is the caller's choice. Shapes, units, errors, statistics and source: the module's.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        num_heads: int,
        num_queries: int = 1,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        _check_positive(dim=dim, num_classes=num_classes, num_heads=num_heads, num_queries=num_queries)
        if dim % num_heads:
            raise ConfigError(f"dim={dim} is not divisible by num_heads={num_heads}: every head needs as many")
        self.dim = dim
        self.num_heads = num_heads
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
        self.queries = nn.Parameter(torch.full((num_queries, dim), math.nan))
        # No biases: one of the keys adds the same to every score of a query, which softmax ignores, and one of the values
        # adds the same to every image, which the head's bias does already.
        self.keys = Linear(dim, dim, bias=False)
        self.values = Linear(dim, dim, bias=False)
        self.head = _head(dim, num_classes, generator=generator)
        fill(self.queries, lambda w: nn.init.normal_(w, std=0.02, generator=generator), generator=generator)
        for part in (self.keys, self.values):
            fill(part.weight, lambda w: nn.init.xavier_uniform_(w, generator=generator), generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score every class: tokens [B, T, D] -> float32 [B, num_classes]. Errors and source: the module's."""
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ConfigError(f"tokens of shape {tuple(tokens.shape)} are not [B, T, dim={self.dim}]: do not pool them")
        B, T, D = tokens.shape
        h = self.num_heads
        x = self.norm(tokens.reshape(B * T, D).to(self.queries.dtype))  # [B * T, D], a statistic is over all tokens
        q = self.queries.reshape(-1, h, D // h).transpose(0, 1).expand(B, -1, -1, -1)  # [B, h, Q, D/h]
        k = self.keys(x).reshape(B, T, h, D // h).transpose(1, 2)  # [B, h, T, D/h]
        v = self.values(x).reshape(B, T, h, D // h).transpose(1, 2)  # [B, h, T, D/h]
        pooled = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, h, Q, D/h]
        pooled = pooled.mean(dim=2).flatten(1)  # [B, D]
        logits: Tensor = self.head(pooled)
        return logits.float()


def _head(dim: int, num_classes: int, *, generator: torch.Generator) -> Linear:
    head = Linear(dim, num_classes)
    fill(head.weight, lambda w: nn.init.normal_(w, std=0.01, generator=generator), generator=generator)
    nn.init.zeros_(head.bias)
    return head


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} is not positive: write a number above 0")
