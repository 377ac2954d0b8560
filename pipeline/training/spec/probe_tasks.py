"""Probes in the training loop: heads that learn from a frozen encoder's features of randomly cropped images.

One head per learning rate, all on the same features, so several rates cost one pass over the images. All heads start equal, and
each learns as it would alone. The reported loss is the mean over the heads.
Letters: b samples of a micro-batch, R heads, T tokens, D features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_core.classification.global_norm import GlobalNorm, Share
from mae_core.classification.metrics import TopK, best_classes, topk_counts
from mae_core.classification.probes import BATCH_NORM_EPS, AttentiveProbe, EfficientProbe, LinearProbe
from mae_core.config import ViTConfig
from mae_core.cost import attentive_probe_flops, efficient_probe_flops, encoder_flops, linear_probe_flops
from mae_core.losses import cross_entropy_per_sample
from mae_core.optimisation.lars import LARS
from mae_core.optimisation.parameter_groups import ParameterGroup
from mae_core.patches import PixelScale
from mae_core.randomness import key64
from mae_core.vit import ViTEncoder, initialise
from pipeline.data.feed.batch import Batch, Int64s
from pipeline.storage import open_store
from pipeline.training.spec.tasks import BuiltHeads
from pipeline.training.world import World
from pipeline.weights import read_encoder_as

ProbeKind = Literal["linear", "full", "efficient"]
Reads = Literal["cls", "mean", "patches", "all"]
"""The features that a head reads: the class token or the mean of the patches, [b, D]; patches or all tokens, [b, T, D]."""
Probe = LinearProbe | AttentiveProbe | EfficientProbe
BEST = 5
_loss = partial(cross_entropy_per_sample, label_smoothing=0.0)


class FrozenProbes(nn.Module):
    """A frozen encoder and R heads, as the plain engine trains them (`HeadsOnFrozen`).

    The encoder stays in eval mode. Norms of heads that read the same features are one and the same.
    """

    def __init__(self, encoder: ViTEncoder, heads: Sequence[Probe], *, reads: Reads) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(requires_grad=False)
        self.heads = nn.ModuleList(heads)
        self.reads = reads
        config = encoder.config
        self.scale = PixelScale(config.pixel_mean, config.pixel_std)
        shared = GlobalNorm(config.embed_dim, eps=BATCH_NORM_EPS)
        for head in heads:
            # Efficient Probing normalises what a head has pooled, so each has statistics of its own.
            own = isinstance(head, EfficientProbe)
            head.norm = GlobalNorm(config.embed_dim, eps=BATCH_NORM_EPS) if own else shared
        self.norms = [part for part in self.modules() if isinstance(part, GlobalNorm)]

    def train(self, mode: bool = True) -> "FrozenProbes":  # noqa: FBT001, FBT002 - as nn.Module has it
        """Set the mode of the heads."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the encoder's features in its dtype: images uint8 [b, H, W, C] -> [b, D] or [b, T, D]."""
        with torch.no_grad():
            pixels = self.scale.normalise(images)
            if self.reads in ("cls", "mean"):
                return self.encoder.encode(pixels, pool=self.reads)
            tokens = self.encoder.encode(pixels, pool="none")
            return tokens if self.reads == "all" else tokens[:, self.encoder.config.prefix_tokens :]

    def logits(self, features: Tensor) -> list[Tensor]:
        """Return each head's logits, float32 [b, classes]."""
        return [head(features) for head in self.heads]

    def learn(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        batch: int,
        share: Share,
    ) -> Tensor:
        """Add the gradients of every head's mean loss over a global batch; return this worker's sum of the heads' mean losses."""
        total = torch.zeros((), device=weights[0].device)
        if not any(isinstance(head, EfficientProbe) for head in self.heads):
            self.norms[0].observe(zip(features, weights, strict=True), share=share)
            for x, y, real in zip(features, labels, weights, strict=True):
                for head in self.heads:
                    total += _backward(head(x), y, real, batch)
        else:
            for head in cast("Sequence[EfficientProbe]", self.heads):
                total += _learn_pooled(
                    head, features, torch.cat(tuple(labels)), torch.cat(tuple(weights)), batch, share
                )
        return total / len(self.heads)

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the losses [b], as means over the heads, with the statistics of the batch learnt from last."""
        return torch.stack([_loss(logits, labels) for logits in self.logits(features)]).mean(dim=0)

    def accept(self) -> None:
        """Take the batch learnt from last into the running statistics."""
        for norm in self.norms:
            norm.update()

    def state(self) -> dict[str, nn.Parameter]:
        """Return the running statistics, by the names of `named_parameters`."""
        own = {id(parameter) for norm in self.norms for parameter in norm.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in own}


def _backward(logits: Tensor, labels: Tensor, weights: Tensor, batch: int) -> Tensor:
    """Add the gradients of a micro-batch; return its sum of losses."""
    summed = (_loss(logits, labels) * weights).sum()
    (summed / batch).backward()  # type: ignore[no-untyped-call]
    return summed.detach()


def _learn_pooled(
    head: EfficientProbe, features: Sequence[Tensor], labels: Tensor, weights: Tensor, batch: int, share: Share
) -> Tensor:
    """Add the gradients of a head whose norm follows the pooling; return this worker's sum of losses.

    The gradient goes through statistics of the whole batch, so it is taken in two parts: from the loss to the pooled features of
    all samples, and from there to the queries and values, one micro-batch at a time. Pooling twice costs less than holding
    what its backward pass needs for all tokens of the batch.
    """
    with torch.no_grad():
        pooled = torch.cat([head.pool(x) for x in features])
    pooled.requires_grad_()
    head.norm.observe([(pooled, weights)], share=share)  # type: ignore[operator]
    summed = _backward(head.classify(pooled), labels, weights, batch)
    assert pooled.grad is not None  # noqa: S101 - for the type checker
    for x, gradient in zip(features, torch.split(pooled.grad, [len(x) for x in features]), strict=True):
        head.pool(x).backward(gradient)  # type: ignore[no-untyped-call]
    return summed


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """Probes of a frozen encoder, one per learning rate, trained with LARS (arXiv 2111.06377, table 10)."""

    kind: ProbeKind
    encoder: ViTConfig
    encoder_uri: str
    """Folder of a pretrained `encoder.safetensors`; empty for a randomly initialised encoder."""
    reads: Reads
    num_classes: int
    num_heads: int
    """Attention heads of kind `full`."""
    num_queries: int
    """Queries of the kinds `full` and `efficient`."""
    lr_scales: tuple[float, ...]
    """Of each head's learning rate: factors on that of the recipe."""
    weight_decay: float
    momentum: float
    trust_coefficient: float
    seed: int

    def build(self) -> BuiltHeads:
        """Return the frozen encoder with its heads, and LARS for them."""
        encoder = ViTEncoder(self.encoder)
        if self.encoder_uri:
            encoder.load_state_dict(read_encoder_as(open_store(self.encoder_uri), self.encoder))
        else:
            initialise(encoder, generator=torch.Generator().manual_seed(self.seed))
        module = FrozenProbes(encoder, [self._head() for _ in self.lr_scales], reads=self.reads)
        groups = [
            ParameterGroup(
                params=[parameter for parameter in head.parameters() if parameter.requires_grad],
                names=[name for name, parameter in head.named_parameters() if parameter.requires_grad],
                weight_decay=self.weight_decay,
                lr_scale=scale,
                name=f"rate_{number}",
            )
            for number, (head, scale) in enumerate(zip(module.heads, self.lr_scales, strict=True))
        ]
        make = partial(LARS, lr=0.0, momentum=self.momentum, trust_coefficient=self.trust_coefficient)
        return BuiltHeads(module, groups, make)

    def _head(self) -> Probe:
        # A key of its own: an untrained encoder draws from the seed itself. Equal for all heads, which differ in their rate only.
        generator = torch.Generator().manual_seed(key64("probe", self.seed) % 2**63)
        dim = self.encoder.embed_dim
        if self.kind == "linear":
            return LinearProbe(dim, self.num_classes, generator=generator)
        if self.kind == "efficient":
            return EfficientProbe(dim, self.num_classes, num_queries=self.num_queries, generator=generator)
        return AttentiveProbe(
            dim, self.num_classes, num_heads=self.num_heads, num_queries=self.num_queries, generator=generator
        )

    def noise(self, epochs: Int64s, sample_ids: Int64s) -> npt.NDArray[np.float32]:
        """Return no numbers, [b, 0]: crops and flips are drawn by the feed, and a probe draws nothing more."""
        return np.empty((len(sample_ids), 0), dtype=np.float32)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return images and labels."""
        return batch.images, batch.labels

    def training_flops(self) -> int:
        """Count the encoder's forward pass, and forward and backward passes of every head."""
        tokens = self.encoder.num_patches + (self.encoder.prefix_tokens if self.reads == "all" else 0)
        dim, classes = self.encoder.embed_dim, self.num_classes
        of_head = {
            "linear": linear_probe_flops(dim=dim, num_classes=classes),
            "full": attentive_probe_flops(tokens=tokens, dim=dim, num_queries=self.num_queries, num_classes=classes),
            "efficient": efficient_probe_flops(
                tokens=tokens, dim=dim, num_queries=self.num_queries, num_classes=classes
            ),
        }[self.kind]
        return encoder_flops(self.encoder, visible_patches=self.encoder.num_patches) + 3 * len(self.lr_scales) * of_head

    def evaluate(self, module: nn.Module, batches: Iterator[Batch], world: World) -> Mapping[str, Any]:
        """Return the scores of every head, in the order of `lr_scales`, and this rank's predictions per image.

        `heads` are equal on every worker. `predicted` holds sample_ids and labels, int64 [n], and best, the five best classes of
        every head, int32 [n, R, 5].
        """
        heads = [TopK() for _ in self.lr_scales]
        found: list[tuple[Tensor, Tensor, Tensor]] = [
            (*(torch.empty(0, dtype=torch.int64),) * 2, torch.empty(0, len(heads), min(BEST, self.num_classes)).int())
        ]
        module.eval()
        with torch.inference_mode():
            for batch in batches:
                logits = [
                    one.cpu() for one in cast("FrozenProbes", module).logits(module(batch.images.to(world.device)))
                ]
                heads = [counted + topk_counts(one, batch.labels) for counted, one in zip(heads, logits, strict=True)]
                best = torch.stack([best_classes(one, BEST) for one in logits], dim=1)
                real = batch.labels >= 0  # the loop's padding has no label, and neither scores nor predictions
                found.append((batch.sample_ids[real], batch.labels[real], best[real].int()))
        module.train()
        sample_ids, labels, best = (torch.cat(column) for column in zip(*found, strict=True))
        return {
            "heads": [_scores(counted, world) for counted in heads],
            "predicted": {"sample_ids": sample_ids, "labels": labels, "best": best},
        }


def _scores(counts: TopK, world: World) -> dict[str, float]:
    """Return a head's scores over all workers: counts are summed over samples and workers, and divided once."""
    top1, top5, count, loss = world.total([counts.correct_top1, counts.correct_top5, counts.count, counts.loss_sum])
    over_workers = TopK(correct_top1=int(top1), correct_top5=int(top5), count=int(count), loss_sum=loss)
    return {
        "top1": over_workers.top1,
        "top5": over_workers.top5,
        "loss": over_workers.loss,
        "images": over_workers.count,
    }
