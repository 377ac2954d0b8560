"""Fine-tuning of all weights with layer-wise decay of the learning rate, through the same loop as pretraining.

Output: classifier.safetensors, history.jsonl. Facts: `top1`, `top5`, `loss` on the test split, as fractions and nats; for images
without labels or without a test split `skipped` says why. Errors: those of training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from safetensors.torch import save

from mae_core.config import ViTConfig
from pipeline.data.dataset.address import dataset_address, unsuited
from pipeline.data.feed.order import OrderConfig
from pipeline.data.feed.substitution import substitution_facts
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.training.launch import run_training
from pipeline.training.spec.recipe import FinetuneRecipe
from pipeline.training.spec.tasks import ClassificationTask
from pipeline.training.spec.train_spec import Placement, TrainSpec

VERSION = 1
HISTORY = "history.jsonl"
CLASSIFIER = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What decides the score."""

    encoder: ViTConfig
    weights: Literal["pretrained", "random"]
    recipe: FinetuneRecipe
    train_labels: int | None
    seed: int


def finetune(config: FinetuneConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Trains encoder and head on the labelled training split, scores them on the test split."""
    shards = inputs["shards"]
    if reason := unsuited(shards):
        return StageResult({"skipped": reason})
    recipe = config.recipe
    spec = TrainSpec(
        task=ClassificationTask(
            encoder=config.encoder,
            encoder_uri=inputs["pretrain"].store.uri if config.weights == "pretrained" else "",
            num_classes=len(shards.facts["classes"]),
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            drop_path=recipe.drop_path,
            label_smoothing=recipe.label_smoothing,
            seed=config.seed,
        ),
        recipe=recipe,
        order=OrderConfig(seed=config.seed),
        image_size=config.encoder.image_size,
        dataset=dataset_address(shards),
        train_samples=config.train_labels or "labelled",
        evaluation_split="test",
        placement=Placement.from_resources(attempt.resources),
    )
    trained = run_training(spec, attempt)
    with open_checkpoint(attempt.root, trained.checkpoint_key) as checkpoint:
        weights = {name.removeprefix("model."): value for name, value in checkpoint.weights().items()}
        history, substitutions = checkpoint.history(), checkpoint.manifest.substitutions
        guard = checkpoint.manifest.guard
    attempt.store.write(CLASSIFIER, save(weights))
    attempt.store.write(HISTORY, "".join(json.dumps(row) + "\n" for row in history).encode())
    facts = {
        "global_step": trained.global_step,
        "ids_digest": str(trained.ids_digest),
        **substitution_facts(substitutions),
        **guard.as_facts(),
        **trained.scores,
    }
    return StageResult(facts, files=(CLASSIFIER,))
