"""Fine-tuning of all weights, with a learning rate that decays from layer to layer, in the same loop as pretraining.

Source: He et al. 2021, arXiv 2111.06377, A.1. Output: classifier.safetensors, history.jsonl, predictions.parquet.
Facts: FinetuneFacts. Errors: those of training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import save

from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.order import OrderConfig
from pipeline.data.feed.selection import select
from pipeline.evaluation.encoders import Pretrained, encoder_source
from pipeline.evaluation.predictions import PREDICTIONS, encode_best
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import open_checkpoint, resume_point
from pipeline.training.facts import TrainingFacts, incident_fields
from pipeline.training.launch import run_training
from pipeline.training.loop.scoring import read_predicted
from pipeline.training.spec.recipe import FinetuneRecipe
from pipeline.training.spec.tasks import ClassificationTask
from pipeline.training.spec.train_spec import TrainSpec

VERSION = 1
HISTORY = "history.jsonl"
CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ProtocolConfig):
    """Everything that decides the score."""

    recipe: FinetuneRecipe


@dataclass(frozen=True, kw_only=True)
class FinetuneFacts(ScoreFacts, TrainingFacts):
    """The scores, and how training went."""


def step_config(common: ProtocolConfig, settings: FinetuneRecipe) -> FinetuneConfig:
    """Return the config of the step."""
    return FinetuneConfig(**vars(common), recipe=settings)


def finetune(config: FinetuneConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train encoder and head on the labelled part of the training split and score them on the held-out split."""
    shards = inputs["shards"]
    if result := skipped(shards, config.split):
        return result
    recipe, source = config.recipe, encoder_source(config, inputs)
    encoder = source.shape()
    spec = TrainSpec(
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
    trained = run_training(spec, attempt)
    # The result is read from the store: this process holds no weights when workers train elsewhere.
    with open_checkpoint(attempt.root, trained.checkpoint_key) as checkpoint:
        # The loop trains `ClassifierLosses`, which wraps the classifier as `model`.
        weights = {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}
        history, manifest = checkpoint.history(), checkpoint.manifest
    attempt.store.write(CLASSIFIER, save(weights))
    attempt.store.write(HISTORY, "".join(json.dumps(row) + "\n" for row in history).encode())
    learnt_from = select(spec.dataset.open(), "train", spec.train_samples, seed=spec.order.seed)
    scores = dict(trained.scores)
    predicted = read_predicted(attempt.store, scores.pop("predicted_by"))
    attempt.store.write(PREDICTIONS, encode_best(**predicted))
    facts = FinetuneFacts(
        split=None if config.split == "test" else config.split,
        labels=int(learnt_from.counts.sum()),
        global_step=trained.global_step,
        ids_digest=str(trained.ids_digest),
        **incident_fields(manifest.substitutions, manifest.guard),
        **scores,
    )
    return StageResult(facts.as_json(), files=(CLASSIFIER, PREDICTIONS))


PROTOCOL = EvaluationProtocol(
    settings=FinetuneRecipe, step_config=step_config, evaluate=finetune, resume_point=resume_point
)
