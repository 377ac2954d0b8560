"""What the probes that train in the loop share: settings, the training, the choice of a learning rate, and what is left behind.

The official linear probe (arXiv 2111.06377, table 10): LARS, random resized crops and flips, no weight decay, a BatchNorm
without scale and shift. Differences: its BatchNorm takes the statistics of one GPU's images, this one those of the global batch,
so that scores do not depend on the number of workers; it drops the last, incomplete batch of an epoch, here batches go on
across epochs; heads compute in float32, only the encoder in `precision`.
Output: probe.safetensors (the chosen head, with its running statistics), predictions.parquet, history.jsonl. Facts: ProbeFacts.
Errors: those of training; ConfigError for several rates and too few labels to hold some back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save
from torch import Tensor

from mae_core.optimisation.schedules import scaled_lr
from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.order import OrderConfig
from pipeline.data.feed.selection import Part, select
from pipeline.data.images.pictures import AugmentConfig
from pipeline.errors import ConfigError
from pipeline.evaluation import predictions
from pipeline.evaluation.encoders import Pretrained, encoder_source
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocol import ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import Checkpoint, open_checkpoint
from pipeline.training.facts import TrainingFacts, incident_fields
from pipeline.training.launch import run_training
from pipeline.training.loop.scoring import read_predicted
from pipeline.training.spec.probe_tasks import ProbeKind, ProbeTask, Reads
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import TrainSpec

PROBE = "probe.safetensors"
HISTORY = "history.jsonl"


class OnlineSettings(BaseModel):
    """How a probe is trained in the loop. Defaults are the official linear probe's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    epochs: int = Field(90, ge=1)
    """How often the probe sees every labelled training image, each time cropped anew."""
    global_batch: int = Field(16384, ge=1)
    """Images per update, over all workers, at most as many as are trained on."""
    base_lr: float = Field(0.1, gt=0)
    """Learning rate per 256 images of the batch, with cosine decay."""
    more_base_lrs: tuple[float, ...] = ()
    """Further learning rates, each for a head of its own on the same features. The best head is chosen on a tenth of the labelled
    training images of each class, which no head is then trained on."""
    warmup_epochs: float = Field(10.0, ge=0)
    """Epochs over which the learning rate rises from zero to its peak. A default that is not shorter than the epochs becomes the
    same share of them."""
    min_lr: float = Field(0.0, ge=0)
    """Absolute learning rate at the end."""
    weight_decay: float = Field(0.0, ge=0)
    """LARS's, for matrices."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """LARS's."""
    trust_coefficient: float = Field(0.001, gt=0)
    """LARS moves a matrix by this share of its norm, times the learning rate."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What the frozen encoder computes in; heads are float32 either way."""
    augment: AugmentConfig = AugmentConfig(kind="clipped_crop", scale=(0.08, 1.0))
    """How a training picture is cut out of a stored image."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} is not in [0, epochs={self.epochs}): write fewer")
        if min(self.base_lrs) <= 0 or len(set(self.base_lrs)) < len(self.base_lrs):
            raise ValueError(f"base_lr and more_base_lrs are {list(self.base_lrs)}: write each once, above 0")
        return self

    @property
    def base_lrs(self) -> tuple[float, ...]:
        """All learning rates, in the order of the heads."""
        return (self.base_lr, *self.more_base_lrs)


@dataclass(frozen=True, kw_only=True)
class RateScore:
    """How the head of one learning rate scored."""

    base_lr: float
    top1: float
    """On the scored split."""
    held_out_top1: float
    """On the held-out tenth of the training images, by which the rate was chosen."""
    held_out_loss: float


@dataclass(frozen=True, kw_only=True)
class ProbeFacts(ScoreFacts, TrainingFacts):
    """The scores of the chosen head, and how training went."""

    base_lr: float
    """The learning rate of the chosen head."""
    rates: tuple[RateScore, ...] | None = None
    """Every learning rate, if there were several."""
    held_out: int | None = None
    """Labelled training images that the rate was chosen by and that were not trained on."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What a head is."""

    kind: ProbeKind
    reads: Reads
    num_heads: int | None = None
    """None for those of the encoder."""
    num_queries: int = 1


def train_probe(
    config: ProtocolConfig, settings: OnlineSettings, inputs: Mapping[str, StageInput], attempt: Attempt, heads: Heads
) -> StageResult:
    """Train a head per learning rate, choose one, and score it on the split that is scored."""
    if result := skipped(inputs["shards"], config.split):
        return result
    rates = settings.base_lrs
    learnt_from, held_out = _counts(config, inputs, holds_out=len(rates) > 1)
    task = _task(config, settings, inputs, heads)
    trained = run_training(_spec(config, settings, inputs, attempt, task, images=learnt_from), attempt)
    # The result is read from the store: this process holds no weights when workers train elsewhere.
    scores: Mapping[str, Any] = trained.scores
    best = best_head(scores["held_out"]["heads"], rates) if held_out else 0
    with open_checkpoint(attempt.root, trained.checkpoint_key) as checkpoint:
        head, history, manifest = _head(checkpoint, best, task), checkpoint.history(), checkpoint.manifest
    attempt.store.write(PROBE, save(head))
    attempt.store.write(PREDICTIONS, _predictions(attempt, scores["predicted_by"], best))
    attempt.store.write(HISTORY, "".join(json.dumps(row) + "\n" for row in history).encode())
    facts = ProbeFacts(
        split=None if config.split == "test" else config.split,
        labels=learnt_from,
        held_out=held_out or None,
        base_lr=rates[best],
        rates=_rate_scores(scores, rates) if held_out else None,
        global_step=trained.global_step,
        ids_digest=str(trained.ids_digest),
        **incident_fields(manifest.substitutions, manifest.guard),
        **scores["heads"][best],
    )
    return StageResult(facts.as_json(), files=(PROBE, PREDICTIONS))


def best_head(held_out: Sequence[Mapping[str, float]], rates: Sequence[float]) -> int:
    """Return the head with the highest held-out top-1; of equal ones that of lower loss, then of lower rate."""
    return min(range(len(rates)), key=lambda head: (-held_out[head]["top1"], held_out[head]["loss"], rates[head]))


def _counts(config: ProtocolConfig, inputs: Mapping[str, StageInput], *, holds_out: bool) -> tuple[int, int]:
    """Return how many labelled images are trained on, and how many are held out to choose a rate by."""
    manifest = dataset_address(inputs["shards"]).open()

    def count(part: Part) -> int:
        selection = select(manifest, "train", config.train_labels or "labelled", seed=config.seed, part=part)
        return int(selection.counts.sum())

    if not holds_out:
        return count("whole"), 0
    if not (held_out := count("held_out")):
        raise ConfigError(
            "more_base_lrs: no class has the five labelled images from which one is held out to choose a rate by. Write one "
            "base_lr, or allow more train_labels"
        )
    return count("kept"), held_out


def _task(
    config: ProtocolConfig, settings: OnlineSettings, inputs: Mapping[str, StageInput], heads: Heads
) -> ProbeTask:
    source = encoder_source(config, inputs)
    encoder = source.shape()
    return ProbeTask(
        kind=heads.kind,
        encoder=encoder,
        encoder_uri=source.uri if isinstance(source, Pretrained) else "",
        reads=heads.reads,
        num_classes=len(DatasetFacts.read(inputs["shards"].facts).classes),
        num_heads=heads.num_heads or encoder.num_heads,
        num_queries=heads.num_queries,
        lr_scales=tuple(rate / settings.base_lr for rate in settings.base_lrs),
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        trust_coefficient=settings.trust_coefficient,
        seed=config.seed,
    )


def _spec(
    config: ProtocolConfig,
    settings: OnlineSettings,
    inputs: Mapping[str, StageInput],
    attempt: Attempt,
    task: ProbeTask,
    *,
    images: int,
) -> TrainSpec:
    """Return what the workers train; `images`: how many are trained on."""
    recipe = Recipe(
        # A larger batch would hold the same image twice.
        global_batch=min(settings.global_batch, images),
        epochs=settings.epochs,
        base_lr=settings.base_lr,
        warmup_epochs=settings.warmup_epochs,
        min_lr=min(settings.min_lr, scaled_lr(settings.base_lr, min(settings.global_batch, images))),
        weight_decay=settings.weight_decay,
        precision=settings.precision,
        augment=settings.augment,
    )
    return TrainSpec(
        task=task,
        recipe=recipe,
        order=OrderConfig(seed=config.seed),
        image_size=task.encoder.image_size,
        dataset=dataset_address(inputs["shards"]),
        train_samples=config.train_labels or "labelled",
        holds_out=bool(settings.more_base_lrs),
        evaluation_split=config.split,
        resources=attempt.resources,
    )


def _head(checkpoint: Checkpoint, number: int, task: ProbeTask) -> dict[str, Tensor]:
    """Return the weights of one head, and the running statistics that it is used with."""
    prefix = f"heads.{number}."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint.weights().items() if name.startswith(prefix)
    }
    # Heads that read the same features share one norm, which bears the name of the first.
    owner = number if task.kind == "efficient" else 0
    for name in ("running_mean", "running_var"):
        weights[f"norm.{name}"] = checkpoint.read(f"heads.{owner}.norm.{name}", "weight", 0, task.encoder.embed_dim)
    return weights


def _predictions(attempt: Attempt, workers: int, head: int) -> bytes:
    """Return the file of predictions from the parts that the workers have written."""
    predicted = read_predicted(attempt.store, workers)
    return predictions.encode_best(predicted["sample_ids"], predicted["labels"], predicted["best"][:, head].long())


def _rate_scores(scores: Mapping[str, Any], rates: Sequence[float]) -> tuple[RateScore, ...]:
    return tuple(
        RateScore(base_lr=rate, top1=own["top1"], held_out_top1=held_out["top1"], held_out_loss=held_out["loss"])
        for rate, own, held_out in zip(rates, scores["heads"], scores["held_out"]["heads"], strict=True)
    )
