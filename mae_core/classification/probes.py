"""Probes: small classifiers on the features of a frozen encoder.

All probes standardise features with a BatchNorm that has no scale and no shift, so that one learning rate serves
encoders whose features differ in scale. In train mode a batch is standardised by its own statistics, and the running
statistics, which eval mode uses, are updated. Train mode is for the probe alone: keep the encoder in eval mode, without
drop path.

The batch statistics are those of one rank. With few images per rank they are noisy, the running statistics differ between
ranks, and a checkpoint holds those of the rank that wrote it. In that case replace the probe's `norm` by a `GlobalNorm`, or
standardise once by the statistics of the whole split, to which the running statistics converge. SyncBatchNorm serves too, where
every rank has a GPU and nothing is accumulated.

Shapes: features [B, D] or tokens [B, T, D] -> logits float32 [B, num_classes]; h heads, Q queries. Features are cast to
the dtype of the probe's weights, which is float32 unless the caller casts the probe.

Errors: ConfigError for sizes that do not fit. In train mode torch raises a ValueError for a batch with a single value per
feature, because its variance is undefined.

Source: He et al. 2022, arXiv 2111.06377, A.1 (linear); El-Nouby et al. 2024, arXiv 2401.08541, section 4 (attentive);
Psomas et al. 2025, arXiv 2506.10178 (efficient)."""

# ruff: noqa: N806 (sizes carry the letters of the legend above)

import math

import torch
from torch import Tensor, nn

from mae_core.errors import ConfigError
from mae_core.vit import Linear, fill

BATCH_NORM_EPS = 1e-6
"""Added to the variance of a feature. torch's 1e-5 would shrink features with a standard deviation of 0.01 by 5 %."""


class LinearProbe(nn.Module):
    """Classify pooled features with one linear layer, after a BatchNorm without scale and shift.

    The weight starts normal with standard deviation 0.01 and the bias at zero; `generator` draws them. The caller chooses
    the feature, that is, which tokens are pooled and how; `ViTEncoder.encode` offers two pools, both after the pretrained
    final norm. In train mode the BatchNorm uses the statistics of the rank's own batch; `mae_core.classification.probes` says
    when that is a problem.

    Raises:
        ConfigError: dim or num_classes is not positive.
    """

    def __init__(self, dim: int, num_classes: int, *, generator: torch.Generator) -> None:
        super().__init__()
        _check_positive(dim=dim, num_classes=num_classes)
        self.dim = dim
        self.norm: nn.Module = nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
        self.head = _head(dim, num_classes, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of a batch.

        Shapes: features [B, D] -> float32 [B, num_classes].

        Raises:
            ConfigError: The features have another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ConfigError(f"features of shape {tuple(features.shape)} are not [B, dim={self.dim}]: pool the tokens")
        logits: Tensor = self.head(self.norm(features.to(self.head.weight.dtype)))
        return logits.float()


class AttentiveProbe(nn.Module):
    """Classify tokens by attention pooling: learnt queries attend to the tokens, and a linear layer reads their mean.

    The tokens first pass a BatchNorm without scale and shift, whose statistics are taken over all tokens of the batch.
    Key and value projections start xavier uniform, the queries normal with standard deviation 0.02, and the head as in
    `LinearProbe`; `generator` draws them. The caller chooses the tokens: patches, class tokens or both, before or after
    the encoder's final norm.

    Raises:
        ConfigError: A size is not positive, or num_heads does not divide dim.
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
            raise ConfigError(
                f"dim={dim} is not divisible by num_heads={num_heads}: all heads have the same width, so write a divisor of "
                f"{dim}"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.norm: nn.Module = nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
        self.queries = nn.Parameter(torch.full((num_queries, dim), math.nan))
        # No biases. A bias of the keys would add the same number to all scores of a query, which softmax ignores; a bias
        # of the values would add the same vector to every image, which the head's bias does already.
        self.keys = Linear(dim, dim, bias=False)
        self.values = Linear(dim, dim, bias=False)
        self.head = _head(dim, num_classes, generator=generator)
        fill(self.queries, lambda w: nn.init.normal_(w, std=0.02, generator=generator), generator=generator)
        for part in (self.keys, self.values):
            fill(part.weight, lambda w: nn.init.xavier_uniform_(w, generator=generator), generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of a batch.

        Shapes: tokens [B, T, D] -> float32 [B, num_classes].

        Raises:
            ConfigError: The tokens have another shape.
        """
        _check_tokens(tokens, dim=self.dim)
        B, T, D = tokens.shape
        h = self.num_heads
        x = self.norm(tokens.reshape(B * T, D).to(self.queries.dtype))  # [B * T, D]: statistics over all tokens
        q = self.queries.reshape(-1, h, D // h).transpose(0, 1).expand(B, -1, -1, -1)  # [B, h, Q, D/h]
        k = self.keys(x).reshape(B, T, h, D // h).transpose(1, 2)  # [B, h, T, D/h]
        v = self.values(x).reshape(B, T, h, D // h).transpose(1, 2)  # [B, h, T, D/h]
        pooled = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, h, Q, D/h]
        pooled = pooled.mean(dim=2).flatten(1)  # [B, D]
        logits: Tensor = self.head(pooled)
        return logits.float()


class EfficientProbe(nn.Module):
    """Classify tokens by Efficient Probing: the tokens themselves are the keys, and each query pools a part of the values.

    Query j attends to the tokens and reads the j-th block of D / Q features of the values. The pooled feature passes a BatchNorm
    without scale and shift, then a linear layer. The source projects every token to its values and pools those. The projection
    is linear, so pooling first gives the same feature, and D x D products per image instead of per token: a twentieth of the
    operations of `AttentiveProbe` for 32 queries at ViT-B.

    The queries start normal with standard deviation 0.02, the values uniform within 1 / sqrt(D) as torch's linear layers,
    and the head as in `LinearProbe`; `generator` draws them.

    Raises:
        ConfigError: A size is not positive, or num_queries does not divide dim.
    """

    def __init__(self, dim: int, num_classes: int, *, num_queries: int = 32, generator: torch.Generator) -> None:
        super().__init__()
        _check_positive(dim=dim, num_classes=num_classes, num_queries=num_queries)
        if dim % num_queries:
            raise ConfigError(
                f"dim={dim} is not divisible by num_queries={num_queries}: each query pools an equal part of the features, so "
                f"write a divisor of {dim}"
            )
        self.dim = dim
        self.queries = nn.Parameter(torch.full((num_queries, dim), math.nan))
        self.values = Linear(dim, dim, bias=False)
        self.norm: nn.Module = nn.BatchNorm1d(dim, affine=False, eps=BATCH_NORM_EPS)
        self.head = _head(dim, num_classes, generator=generator)
        bound = dim**-0.5
        fill(self.queries, lambda w: nn.init.normal_(w, std=0.02, generator=generator), generator=generator)
        fill(
            self.values.weight,
            lambda w: nn.init.uniform_(w, -bound, bound, generator=generator),
            generator=generator,
        )

    def pool(self, tokens: Tensor) -> Tensor:
        """Return the pooled features, before the norm.

        Shapes: tokens [B, T, D] -> [B, D] in the dtype of the weights.

        Raises:
            ConfigError: The tokens have another shape.
        """
        _check_tokens(tokens, dim=self.dim)
        x = tokens.to(self.queries.dtype)
        Q, D = self.queries.shape
        # one head over the whole width, so scores are scaled by 1 / sqrt(D)
        shares = (x @ (self.queries.T * D**-0.5)).softmax(dim=1)  # [B, T, Q]
        pooled = shares.transpose(1, 2) @ x  # [B, Q, D]
        blocks = self.values.weight.reshape(Q, D // Q, D)
        return torch.einsum("bqd,qed->bqe", pooled, blocks).flatten(1)  # [B, D]

    def classify(self, pooled: Tensor) -> Tensor:
        """Return the logits of pooled features: [B, D] -> float32 [B, num_classes]."""
        logits: Tensor = self.head(self.norm(pooled))
        return logits.float()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of a batch.

        Shapes: tokens [B, T, D] -> float32 [B, num_classes].

        Raises:
            ConfigError: The tokens have another shape.
        """
        return self.classify(self.pool(tokens))


def _head(dim: int, num_classes: int, *, generator: torch.Generator) -> Linear:
    head = Linear(dim, num_classes)
    fill(head.weight, lambda w: nn.init.normal_(w, std=0.01, generator=generator), generator=generator)
    nn.init.zeros_(head.bias)
    return head


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} is not positive: write a number above 0")


def _check_tokens(tokens: Tensor, *, dim: int) -> None:
    if tokens.ndim != 3 or tokens.shape[2] != dim:
        raise ConfigError(f"tokens of shape {tuple(tokens.shape)} are not [B, T, dim={dim}]: do not pool them")
