"""Partial fine-tuning: only the last blocks of the encoder are trained, with a head; what is below them stays frozen.

The paper's figure 9. Half a block is the MLP of the last one, with the norm before it. The head, and the norm of the pooled patch
tokens before it, are always trained; with 0 blocks nothing else is, which is a linear classifier on frozen features, but one with
this recipe and its augmentations. The paper chooses the best of 50, 100 and 200 epochs for each number of blocks, since fewer
blocks take longer; here all of them train for `epochs`, and a choice by the scored split is not offered.
Frozen weights have no gradient and no optimiser state, and frozen blocks keep no activations. Drop path leaves them alone, so
that they give the same features at every step; the paper does not say what it does.
Each number of blocks is a step of its own, so that adding one computes only that one.

Source: He et al. 2021, arXiv 2111.06377, 4.3 and A.1. Output, facts and errors: those of `pipeline.evaluation.classifiers`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from pipeline.errors import ConfigError
from pipeline.evaluation.classifiers import ClassifierConfig, plain_recipe, train_classifier
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import resume_point
from pipeline.training.spec.recipe import FinetuneRecipe

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PartialSettings(FinetuneRecipe):
    """Fine-tuning of the last blocks. Defaults are MAE's for fine-tuning (arXiv 2111.06377, table 9, ViT-B)."""

    blocks: tuple[float, ...] = (0, 0.5, 1, 2, 4)
    """Numbers of blocks to train, each in a training of its own; 0.5 is the MLP of the last block, 0 the head alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ConfigError(f"blocks={list(self.blocks)}: write at least one number, and each only once")
        if not all(count >= 0 and (2 * count).is_integer() for count in map(float, self.blocks)):
            raise ConfigError(
                f"blocks={list(self.blocks)} are not all whole or half numbers: write such as 0, 0.5, 1, 4"
            )


@dataclass(frozen=True, kw_only=True)
class PartialConfig(ClassifierConfig):
    """Everything that decides the score."""

    section: ClassVar[str] = "evaluation.partial"
    blocks: float
    """Blocks of the encoder that are trained."""

    @property
    def trained_blocks(self) -> float:
        """As in the configuration."""
        return self.blocks


def variants(settings: PartialSettings) -> Mapping[str, PartialSettings]:
    """Return the settings of each number of blocks."""
    return {f"-{blocks:g}": replace(settings, blocks=(blocks,)) for blocks in settings.blocks}


def step_config(common: ProtocolConfig, settings: PartialSettings) -> PartialConfig:
    """Return the config of the step of one number of blocks."""
    (blocks,) = settings.blocks
    if blocks > common.encoder.depth:
        raise ConfigError(
            f"evaluation.partial.blocks: {blocks:g} is more than the {common.encoder.depth} blocks of the encoder: write fewer"
        )
    return PartialConfig(**vars(common), recipe=plain_recipe(settings), blocks=blocks)


def partial(config: PartialConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train the last blocks and the head on the labelled part of the training split and score them on the held-out split."""
    return train_classifier(config, inputs, attempt)


PROTOCOL = EvaluationProtocol(
    settings=PartialSettings, step_config=step_config, evaluate=partial, resume_point=resume_point, variants=variants
)
