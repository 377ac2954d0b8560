"""A finished classifier scored with its own head: nothing is trained, and no training image is read.

For weights from elsewhere (`mae evaluate`). Output i of the head is taken to be class i of the dataset, whose classes are sorted by
name: for ImageNet's folders that is the order that timm, Hugging Face and the official code use.
Output: predictions.parquet. Facts: ScoreFacts. Errors: ConfigError for weights without a head or with other classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict

from mae_core.classification.metrics import topk_counts
from pipeline.data.dataset.address import dataset_address
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import ConfigError
from pipeline.evaluation import predictions
from pipeline.evaluation.encoders import encoder_source
from pipeline.evaluation.features import FeatureRequest, TokenPool, extract_features
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.weights import ImportFacts, read_head

VERSION = 1
_POOLS: Mapping[str, tuple[TokenPool, ...]] = {
    "cls": ("cls",),
    "mean": ("mean",),
    "mean of unnormalised": ("mean of unnormalised",),
    "cls and mean": ("cls", "mean"),
}
"""What a head reads -> the features that it is given, one behind the other."""


class OwnHeadSettings(BaseModel):
    """The classification head that came with the weights of `mae evaluate`, as it is. It has no settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True)
class OwnHeadConfig(ProtocolConfig):
    """Everything that decides the score, beside the weights."""

    own_head: OwnHeadSettings = field(default_factory=OwnHeadSettings)


def step_config(common: ProtocolConfig, settings: OwnHeadSettings) -> OwnHeadConfig:
    """Return the config of the step."""
    return OwnHeadConfig(**vars(common), own_head=settings)


def own_head(config: OwnHeadConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Classify every image of the scored split."""
    shards = inputs["shards"]
    if result := skipped(shards, config.split, learns=False):
        return result
    weights = inputs["pretrain"]
    imported, classes = ImportFacts.read(weights.facts), DatasetFacts.read(shards.facts).classes
    if imported.head_reads is None:
        raise ConfigError("own_head: the weights have no classification head: leave own_head out of the protocols")
    if imported.classes != len(classes):
        raise ConfigError(
            f"own_head: the head has {imported.classes} classes and the dataset {len(classes)} ({', '.join(classes[:3])}, ...): "
            f"give the dataset that the classifier was trained for, or leave own_head out of the protocols"
        )
    found = [
        extract_features(
            FeatureRequest(
                encoder=encoder_source(config, inputs),
                dataset=dataset_address(shards),
                split=config.split,
                samples="all",
                seed=config.seed,
                pool=pool,
            ),
            attempt,
        )
        for pool in _POOLS[imported.head_reads]
    ]
    values, labels = torch.cat([part.values for part in found], dim=1), found[0].labels
    scores = read_head(weights.store).logits(values, layer_norm_eps=config.encoder.layer_norm_eps)
    counted = topk_counts(scores, labels)
    attempt.store.write(PREDICTIONS, predictions.encode(found[0].sample_ids, labels, scores))
    facts = ScoreFacts(
        top1=counted.top1,
        top5=counted.top5,
        images=counted.count,
        split=None if config.split == "test" else config.split,
    )
    return StageResult(facts.as_json(), files=(PREDICTIONS,))


PROTOCOL = EvaluationProtocol(
    settings=OwnHeadSettings,
    step_config=step_config,
    evaluate=own_head,
    origins=("pretrained",),
    learns=False,
)
