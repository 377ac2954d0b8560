"""Nearest neighbours on frozen features: nothing is trained, so that the score shows the features as they are.

The labelled training images vote by exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978; temperature and numbers of
neighbours as in DINO, Caron et al. 2021, arXiv 2104.14294). MAE's features do badly at this, and a better score in it need not
mean a better fine-tuning.
Output: predictions.parquet, of `k` neighbours. Facts: ScoreFacts."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mae_core.classification.metrics import topk_counts
from mae_core.classification.neighbours import nearest, votes
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.evaluation import predictions
from pipeline.evaluation.features import Pool, extract_splits
from pipeline.evaluation.predictions import PREDICTIONS
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts, skipped
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1


class KnnSettings(BaseModel):
    """The vote of the nearest labelled images (arXiv 1805.01978), by the cosine of frozen features."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    pool: Pool = "cls"
    """The feature of an image: its class token or the mean of its patch tokens, both after the encoder's final norm."""
    k: int = Field(20, ge=1)
    """Neighbours that vote for the score. With fewer training images, all of them vote."""
    other_k: tuple[int, ...] = (10, 100, 200)
    """Numbers of neighbours whose top-1 accuracy is reported beside the score. The best is never taken as the score, since it
    would be chosen on the scored split."""
    temperature: float = Field(0.07, gt=0)
    """The lower, the more the nearest of the neighbours count."""

    @model_validator(mode="after")
    def _distinct(self) -> "KnnSettings":
        numbers = [self.k, *self.other_k]
        if min(numbers) < 1 or len(set(numbers)) < len(numbers):
            raise ValueError(f"other_k={list(self.other_k)} beside k={self.k}: write numbers from 1, each only once")
        return self


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ProtocolConfig):
    """Everything that decides the score."""

    knn: KnnSettings


def step_config(common: ProtocolConfig, settings: KnnSettings) -> KnnConfig:
    """Return the config of the step."""
    return KnnConfig(**vars(common), knn=settings)


def knn(config: KnnConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Let the neighbours of each image of the held-out split in the training split vote."""
    shards, settings = inputs["shards"], config.knn
    if result := skipped(shards, config.split):
        return result
    num_classes = len(DatasetFacts.read(shards.facts).classes)
    train, test = extract_splits(config, inputs, attempt, pool=settings.pool)
    numbers = sorted((settings.k, *settings.other_k))
    found = nearest(test.values, train.values, train.labels, count=numbers[-1])
    counted = {}
    for k in numbers:
        shares = votes(found, k=k, temperature=settings.temperature, num_classes=num_classes)
        counted[k] = topk_counts(shares, test.labels)
        if k == settings.k:
            attempt.store.write(PREDICTIONS, predictions.encode(test.sample_ids, test.labels, shares))
    facts = ScoreFacts(
        top1=counted[settings.k].top1,
        top5=counted[settings.k].top5,
        images=counted[settings.k].count,
        labels=len(train.labels),
        split=None if config.split == "test" else config.split,
        setting=f"k{settings.k}",
        top1_by_setting={f"k{k}": counts.top1 for k, counts in counted.items()},
    )
    return StageResult(facts.as_json(), files=(PREDICTIONS,))


PROTOCOL = EvaluationProtocol(settings=KnnSettings, step_config=step_config, evaluate=knn)
