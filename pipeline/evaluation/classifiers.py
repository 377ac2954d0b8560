"""What the protocols that train a classifier share: encoder and head are trained in the pretraining's own loop, and then scored.

Output: classifier.safetensors, history.jsonl, predictions.parquet. Facts: FinetuneFacts.
Errors: those of training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from safetensors.torch import save
from torch import Tensor

from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.order import OrderConfig
from pipeline.data.feed.selection import select
from pipeline.evaluation.encoders import EncoderSource, Pretrained, encoder_source
from pipeline.evaluation.predictions import PREDICTIONS, encode_best
from pipeline.evaluation.protocol import ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.engine.deepspeed_engine import Kind
from pipeline.training.facts import TrainingFacts, incident_fields
from pipeline.training.launch import run_training
from pipeline.training.loop.scoring import read_predicted
from pipeline.training.spec.recipe import FinetuneRecipe
from pipeline.training.spec.tasks import ClassificationTask
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.weights import CLASSIFIER

HISTORY = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ProtocolConfig):
    """Everything that decides the score."""

    section: ClassVar[str] = "evaluation.finetune"
    """Where the configuration declares the recipe."""
    recipe: FinetuneRecipe

    @property
    def trained_blocks(self) -> float | None:
        """How many of the encoder's last blocks are trained; None for all of its weights."""
        return None


@dataclass(frozen=True, kw_only=True)
class FinetuneFacts(ScoreFacts, TrainingFacts):
    """The scores, and how training went."""


def train_classifier(config: ClassifierConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train encoder and head on the labelled part of the training split and score them on the held-out split."""
    shards = inputs["shards"]
    if result := skipped(shards, config.split):
        return result
    source = encoder_source(config, inputs)
    spec = _spec(config, source, shards, attempt)
    trained = run_training(spec, attempt)
    kind: Kind = "average" if config.recipe.ema else "weight"
    # The result is read from the store: this process holds no weights when workers train elsewhere.
    with open_checkpoint(attempt.root, trained.checkpoint_key) as checkpoint:
        # The loop trains `ClassifierLosses`, which wraps the classifier as `model`.
        weights = {name.removeprefix("model."): value for name, value in checkpoint.weights(kind).items()}
        history, manifest = checkpoint.history(), checkpoint.manifest
    if config.trained_blocks is not None:
        weights = _frozen(source) | weights
    attempt.store.write(CLASSIFIER, save(weights))
    attempt.store.write(HISTORY, "".join(json.dumps(row) + "\n" for row in history).encode())
    scores = dict(trained.scores)
    predicted = read_predicted(attempt.store, scores.pop("predicted_by"))
    attempt.store.write(PREDICTIONS, encode_best(**predicted))
    learnt_from = select(spec.dataset.open(), "train", spec.train_samples, seed=spec.order.seed)
    facts = FinetuneFacts(
        split=None if config.split == "test" else config.split,
        labels=int(learnt_from.counts.sum()),
        global_step=trained.global_step,
        ids_digest=str(trained.ids_digest),
        **incident_fields(manifest.substitutions, manifest.guard),
        **scores,
    )
    return StageResult(facts.as_json(), files=(CLASSIFIER, PREDICTIONS))


def plain_recipe(settings: FinetuneRecipe) -> FinetuneRecipe:
    """Return the recipe within a protocol's settings, which have other defaults or fields of their own."""
    return FinetuneRecipe(**{one.name: getattr(settings, one.name) for one in fields(FinetuneRecipe)})


def _spec(config: ClassifierConfig, source: EncoderSource, shards: StageInput, attempt: Attempt) -> TrainSpec:
    recipe, encoder = config.recipe, source.shape()
    return TrainSpec(
        task=ClassificationTask(
            encoder=encoder,
            encoder_uri=source.uri if isinstance(source, Pretrained) else "",
            num_classes=len(DatasetFacts.read(shards.facts).classes),
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            drop_path=recipe.drop_path,
            label_smoothing=recipe.label_smoothing,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            seed=config.seed,
            trained_blocks=config.trained_blocks,
        ),
        recipe=recipe,
        order=OrderConfig(seed=config.seed),
        image_size=encoder.image_size,
        dataset=dataset_address(shards),
        # Unlabelled images may be in the split, for pretraining; here they have nothing to teach.
        train_samples=config.train_labels or "labelled",
        evaluation_split=config.split,
        resources=attempt.resources,
    )


def _frozen(source: EncoderSource) -> dict[str, Tensor]:
    """Return the encoder's weights by their names in a classifier, whose own norm takes the place of the encoder's last one."""
    weights = source.load().weights
    return {f"encoder.{name}": value for name, value in weights.items() if not name.startswith("norm.")}
