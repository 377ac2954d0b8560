"""Linear probe on frozen features: one linear layer, trained with SGD in float32 (He et al. 2021, arXiv 2111.06377, A.1).

Features are standardised by the training split's mean and standard deviation. The paper's BatchNorm without affine parameters
converges to the same statistics; computing them once lets the encoder run once per image instead of once per epoch
(docs/decisions/001-linear-probe-on-cached-features.md).
Output: probe.safetensors (mean, deviation [D]; weight [classes, D]; bias [classes]); predictions.parquet. Facts: ScoreFacts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from mae_core.classification.metrics import topk_counts
from mae_core.optimisation.schedules import scaled_lr, warmup_cosine
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.evaluation import predictions
from pipeline.evaluation.features import Features, Pool, extract_splits, standardisation
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1
PROBE = "probe.safetensors"
MOMENTUM = 0.9


class LinearSettings(BaseModel):
    """A linear classifier on frozen, standardised features (arXiv 2111.06377, A.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    pool: Pool = "cls"
    """The feature of an image: its class token or the mean of its patch tokens, both after the encoder's final norm."""
    epochs: int = Field(90, ge=1)
    """How often the probe sees every labelled training image."""
    batch: int = Field(16384, ge=1)
    """Images per update of the probe, at most as many as there are."""
    base_lr: float = Field(0.1, gt=0)
    """Learning rate per 256 images of the batch; SGD with momentum 0.9 and cosine decay."""
    warmup_epochs: float = Field(10.0, ge=0)
    """Epochs over which the learning rate rises from zero to its peak. A default that is not shorter than the epochs becomes the
    same share of them."""

    @model_validator(mode="after")
    def _warm_before_the_end(self) -> "LinearSettings":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is not in [0, epochs={self.epochs}): write fewer")
        return self


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProtocolConfig):
    """Everything that decides the score."""

    probe: LinearSettings


def step_config(common: ProtocolConfig, settings: LinearSettings) -> LinearConfig:
    """Return the config of the step."""
    return LinearConfig(**vars(common), probe=settings)


def linear(config: LinearConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train the probe on features of the training split and score it on those of the held-out split."""
    shards = inputs["shards"]
    if result := skipped(shards, config.split):
        return result
    train, test = extract_splits(config, inputs, attempt, pool=config.probe.pool)
    mean, deviation = standardisation(train.values)
    head = fit(
        train._replace(values=(train.values - mean) / deviation),
        config.probe,
        num_classes=len(DatasetFacts.read(shards.facts).classes),
        seed=config.seed,
    )
    with torch.inference_mode():
        logits = head((test.values - mean) / deviation)  # the training split's statistics
    score = topk_counts(logits, test.labels)
    attempt.store.write(PREDICTIONS, predictions.encode(test.sample_ids, test.labels, logits))
    attempt.store.write(PROBE, save({"mean": mean, "deviation": deviation, **head.state_dict()}))
    facts = ScoreFacts(
        top1=score.top1,
        top5=score.top5,
        loss=score.loss,
        images=score.count,
        labels=len(train.labels),
        split=None if config.split == "test" else config.split,
    )
    return StageResult(facts.as_json(), files=(PROBE, PREDICTIONS))


def fit(train: Features, settings: LinearSettings, *, num_classes: int, seed: int) -> nn.Linear:
    """Train the head. The seed decides its initial weights and the order of the samples."""
    count = len(train.labels)
    batch = min(settings.batch, count)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(train.values.shape[1], num_classes)
    # Small, as in the official linear probe (main_linprobe.py): the first logits are nearly equal.
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=MOMENTUM)  # set at every step below
    seen, total = 0, settings.epochs * count
    # `total` is a whole number of epochs, so the last one is complete; the last batch of each may be smaller.
    while seen < total:
        for indices in torch.split(torch.randperm(count, generator=generator), batch):
            # In images, as in pretraining, so that the curve does not depend on the size of the batch.
            lr = warmup_cosine(
                seen,
                peak_lr=scaled_lr(settings.base_lr, batch),
                warmup_images=round(settings.warmup_epochs * count),
                total_images=total,
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss = F.cross_entropy(head(train.values[indices]), train.labels[indices])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += len(indices)
    return head


PROTOCOL = EvaluationProtocol(settings=LinearSettings, step_config=step_config, evaluate=linear)
