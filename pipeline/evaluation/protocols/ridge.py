"""Few labels per class on frozen features: ridge classification in closed form, with the penalty from the leave-one-out error.

The chosen images are equally many per class, drawn by the seed; those of a smaller number are among those of a larger one.
Features are standardised by the training split's mean and standard deviation, for which no label is needed. Neither a validation
split nor the test split has a part in the fit.
Output: predictions.parquet, of the largest number of labels. Facts: ScoreFacts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from mae_core.classification.metrics import topk_counts
from mae_core.classification.ridge import fit_ridge, ridge_scores
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.data.feed.selection import balanced_sequence
from pipeline.evaluation import predictions
from pipeline.evaluation.features import Features, Pool, extract_splits, standardisation
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1
PENALTIES = tuple(10.0 ** (power / 2) for power in range(-4, 13))
"""From 0.01 to a million. A standardised feature vector of width D has squared length D, so that both ends are beyond use."""


class RidgeSettings(BaseModel):
    """Ridge classification with few labels per class, on frozen, standardised features."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    pool: Pool = "cls"
    """The feature of an image: its class token or the mean of its patch tokens, both after the encoder's final norm."""
    labels_per_class: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 10)
    """Labelled training images of each class, or all that a class has. The last number's accuracy is the score, and those of the
    others are reported beside it."""

    @field_validator("labels_per_class")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError(f"labels_per_class={list(value)}: write at least one number, and each only once")
        return value


@dataclass(frozen=True, kw_only=True)
class RidgeConfig(ProtocolConfig):
    """Everything that decides the score."""

    ridge: RidgeSettings


def step_config(common: ProtocolConfig, settings: RidgeSettings) -> RidgeConfig:
    """Return the config of the step."""
    return RidgeConfig(**vars(common), ridge=settings)


def ridge(config: RidgeConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Fit on few images of the training split, for each number of labels, and score on the held-out split."""
    shards = inputs["shards"]
    if result := skipped(shards, config.split):
        return result
    num_classes = len(DatasetFacts.read(shards.facts).classes)
    train, test = extract_splits(config, inputs, attempt, pool=config.ridge.pool)
    mean, deviation = standardisation(train.values)
    standardised = (test.values - mean) / deviation
    by_setting = {}
    for number in config.ridge.labels_per_class:
        few = chosen(train, number, seed=config.seed)
        fitted = fit_ridge(
            (train.values[few] - mean) / deviation,
            train.labels[few],
            num_classes=num_classes,
            penalties=PENALTIES,
        )
        scores = ridge_scores(fitted, standardised)
        counts = topk_counts(scores, test.labels)
        by_setting[_setting(number)] = counts.top1
    # of the last number of labels
    attempt.store.write(PREDICTIONS, predictions.encode(test.sample_ids, test.labels, scores))
    facts = ScoreFacts(
        top1=counts.top1,
        top5=counts.top5,
        images=counts.count,
        labels=len(few),
        split=None if config.split == "test" else config.split,
        setting=_setting(number),
        top1_by_setting=by_setting,
    )
    return StageResult(facts.as_json(), files=(PREDICTIONS,))


def chosen(train: Features, number: int, *, seed: int) -> Tensor:
    """Return indices of `number` images of each class, or of all that a class has."""
    sequence = torch.from_numpy(balanced_sequence(train.sample_ids.numpy(), train.labels.numpy(), seed))
    labels = train.labels[sequence]
    # the place of each image among those of its class, in the order of the sequence
    order = labels.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - torch.searchsorted(labels[order], labels[order])
    return sequence[place < number]


def _setting(number: int) -> str:
    return f"{number}_per_class"


PROTOCOL = EvaluationProtocol(settings=RidgeSettings, step_config=step_config, evaluate=ridge)
