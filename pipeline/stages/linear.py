"""Linear probe on frozen features: standardise, then one linear layer (He et al. 2021, arXiv 2111.06377, A.1).

Features are taken once (centre crop, no augmentation), standardised by the training split's mean and deviation (what
BatchNorm without affine converges to; the paper calls the two equivalent) and fed to a linear classifier trained with SGD.
Tasks take the features, the head is trained here; all float32. Facts: `top1`, `top5`, `loss` on the test split as fractions
and nats; `skipped` says why not. Errors: those of reading the shards."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.config import ViTConfig
from mae_core.metrics import topk_counts
from mae_core.patches import normalise_pixels
from mae_core.schedules import scaled_lr, warmup_cosine
from mae_core.vit import ViTEncoder, initialise
from pipeline.cluster.tasks import map_tasks
from pipeline.config import LinearConfig
from pipeline.data.dataset.address import DatasetAddress, dataset_address, unsuited
from pipeline.data.feed.loader import Loader
from pipeline.data.feed.order import OrderConfig, SampleOrder
from pipeline.data.feed.selection import Samples, select
from pipeline.data.images.pictures import AugmentConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.storage import open_store
from pipeline.training.spec.train_spec import Placement
from pipeline.weights import ENCODER, read_weights

VERSION = 1
PROBE = "probe.safetensors"
IMAGES_PER_TASK = 2048
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class LinearStageConfig:
    """What decides the score."""

    encoder: ViTConfig
    weights: Literal["pretrained", "random"]
    probe: LinearConfig
    train_labels: int | None
    seed: int


class Features(NamedTuple):
    """Frozen features of some images."""

    values: Tensor  # [n, D] float32
    labels: Tensor  # [n] int64


@dataclass(frozen=True)
class Part:
    """One task's share of a split."""

    split: Literal["train", "test"]
    index: int
    of: int


def linear(config: LinearStageConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Takes features of the training and test splits, fits the probe, scores it."""
    shards = inputs["shards"]
    if reason := unsuited(shards):
        return StageResult({"skipped": reason})
    counts = shards.facts["counts"]["splits"]
    parts = [
        Part(split, index, of)
        for split in ("train", "test")
        for of in [-(-counts[split]["served"] // IMAGES_PER_TASK)]
        for index in range(of)
    ]
    take = partial(
        features_of,
        config=config,
        dataset=dataset_address(shards),
        encoder_uri=inputs["pretrain"].store.uri if config.weights == "pretrained" else "",
        placement=Placement.from_resources(attempt.resources),
    )
    done = 0

    def on_done(_: int, features: Features) -> None:
        nonlocal done
        done += len(features.labels)
        attempt.progress.update(done, sum(counts[split]["served"] for split in ("train", "test")), unit="images")

    taken = map_tasks(take, parts, executor=attempt.executor, on_done=on_done)
    train, test = (
        joined([features for part, features in zip(parts, taken, strict=True) if part.split == split])
        for split in ("train", "test")
    )
    mean, deviation = train.values.mean(dim=0), train.values.std(dim=0, correction=0).clamp_min(1e-6)
    head = fit(
        Features((train.values - mean) / deviation, train.labels),
        config.probe,
        num_classes=len(shards.facts["classes"]),
        seed=config.seed,
    )
    with torch.inference_mode():
        score = topk_counts(head((test.values - mean) / deviation), test.labels)
    attempt.store.write(PROBE, save({"mean": mean, "deviation": deviation, **head.state_dict()}))
    return StageResult(
        {"top1": score.top1, "top5": score.top5, "loss": score.loss, "images": score.count}, files=(PROBE,)
    )


def features_of(
    part: Part, *, config: LinearStageConfig, dataset: DatasetAddress, encoder_uri: str, placement: Placement
) -> Features:
    """Features of a part of a split; what a Ray task runs."""
    encoder = ViTEncoder(config.encoder)
    if encoder_uri:
        encoder.load_state_dict(read_weights(open_store(encoder_uri), ENCODER))
    else:
        initialise(encoder, generator=torch.Generator().manual_seed(config.seed))
    encoder.eval()
    samples: Samples = (config.train_labels or "labelled") if part.split == "train" else "all"
    selection = select(dataset.open(), part.split, samples, seed=config.seed)
    loader = Loader(
        selection,
        SampleOrder(selection.counts, OrderConfig(seed=config.seed)),
        global_batch=1,
        rank=part.index,
        world_size=part.of,
        augment=AugmentConfig(kind="center", flip=False),
        image_size=config.encoder.image_size,
        seed=config.seed,
        cache=placement.cache(dataset),
        decode_threads=placement.decode_threads,
    )
    values, labels = [], []
    with torch.inference_mode(), closing(loader.evaluation_batches(placement.micro_batch)) as batches:
        for batch in batches:
            pixels = normalise_pixels(batch.images, mean=config.encoder.pixel_mean, std=config.encoder.pixel_std)
            values.append(encoder.encode(pixels, pool=config.probe.pool))
            labels.append(batch.labels.clone())
    return joined(
        [Features(value, label) for value, label in zip(values, labels, strict=True)], config.encoder.embed_dim
    )


def joined(parts: list[Features], embed_dim: int = 0) -> Features:
    """Several parts as one, in their order."""
    if not parts:
        return Features(torch.empty(0, embed_dim), torch.empty(0, dtype=torch.int64))
    return Features(torch.cat([part.values for part in parts]), torch.cat([part.labels for part in parts]))


def fit(train: Features, config: LinearConfig, *, num_classes: int, seed: int) -> nn.Linear:
    """Trains the head with SGD and a cosine over `epochs`; order and first weights from the seed."""
    count = len(train.labels)
    batch = min(config.batch, count)
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(train.values.shape[1], num_classes)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.0, momentum=MOMENTUM)
    seen, total = 0, config.epochs * count
    while seen < total:
        for indices in torch.split(torch.randperm(count, generator=generator), batch):
            lr = warmup_cosine(
                seen,
                peak_lr=scaled_lr(config.base_lr, batch),
                warmup_images=round(config.warmup_epochs * count),
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
