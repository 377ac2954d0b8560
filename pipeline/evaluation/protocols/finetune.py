"""Fine-tuning of all weights, with a learning rate that decays from layer to layer.

Source: He et al. 2021, arXiv 2111.06377, A.1. Output, facts and errors: those of `pipeline.evaluation.classifiers`."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluation.classifiers import ClassifierConfig, train_classifier
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import resume_point
from pipeline.training.spec.recipe import FinetuneRecipe

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ClassifierConfig):
    """Everything that decides the score."""


def step_config(common: ProtocolConfig, settings: FinetuneRecipe) -> FinetuneConfig:
    """Return the config of the step."""
    return FinetuneConfig(**vars(common), recipe=settings)


def finetune(config: FinetuneConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train encoder and head on the labelled part of the training split and score them on the held-out split."""
    return train_classifier(config, inputs, attempt)


PROTOCOL = EvaluationProtocol(
    settings=FinetuneRecipe, step_config=step_config, evaluate=finetune, resume_point=resume_point
)
