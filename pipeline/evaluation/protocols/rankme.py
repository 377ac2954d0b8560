"""RankMe: the effective rank of the features of many training images, for which no label is needed.

It is no accuracy. It tells features that collapse onto a few directions from those that use many, and is to be compared between
encoders of one width on the same images only (Garrido et al. 2023, arXiv 2210.02885).
Facts: ScoreFacts with `measure` and `value`."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from mae_core.classification.rankme import rankme as effective_rank
from pipeline.data.dataset.address import dataset_address
from pipeline.errors import DataError
from pipeline.evaluation.encoders import encoder_source
from pipeline.evaluation.features import FeatureRequest, Pool, extract_features
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig, ScoreFacts
from pipeline.graph.step import Attempt, StageInput, StageResult

VERSION = 1
MEASURE = "effective rank"


class RankmeSettings(BaseModel):
    """The effective rank of frozen features (arXiv 2210.02885), a score that needs no labels."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    pool: Pool = "cls"
    """The feature of an image: its class token or the mean of its patch tokens, both after the encoder's final norm."""
    images: int = Field(25_600, ge=2)
    """Images of the training split that it is computed from, drawn by the seed; all if there are fewer. The rank is at most the
    number of images, so there should be many more than the encoder is wide."""


@dataclass(frozen=True, kw_only=True)
class RankmeConfig(ProtocolConfig):
    """Everything that decides the score."""

    rankme: RankmeSettings


def step_config(common: ProtocolConfig, settings: RankmeSettings) -> RankmeConfig:
    """Return the config of the step."""
    return RankmeConfig(**vars(common), rankme=settings)


def rankme(config: RankmeConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Compute the effective rank of the features of training images, labelled or not."""
    request = FeatureRequest(
        encoder=encoder_source(config, inputs),
        dataset=dataset_address(inputs["shards"]),
        split="train",
        samples="all",
        seed=config.seed,
        pool=config.rankme.pool,
        at_most=config.rankme.images,
    )
    values = extract_features(request, attempt).values
    try:
        rank = effective_rank(values)
    except ValueError as error:
        raise DataError(
            f"rankme on {request.dataset.manifest_uri}: {error}. Look at the pretraining's loss: its weights may have diverged"
        ) from error
    facts = ScoreFacts(measure=MEASURE, value=rank, images=len(values), split="train")
    return StageResult(facts.as_json())


PROTOCOL = EvaluationProtocol(settings=RankmeSettings, step_config=step_config, evaluate=rankme, needs_labels=False)
