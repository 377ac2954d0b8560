"""Supervised training from scratch: what the same architecture reaches with the labels alone, as the control of fine-tuning.

The paper's table 11, a recipe that it tuned for ViTs without pretraining: another rate, a larger decay, longer, with the average
of the weights. `random` of `finetune` answers another question: what fine-tuning's own recipe makes of random weights.
Not from the paper: it does not say how its classifier pools, nor how its crops are scaled; here as in fine-tuning.

Source: He et al. 2021, arXiv 2111.06377, A.2. Output, facts and errors: those of `pipeline.evaluation.classifiers`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipeline.data.images.pictures import AugmentConfig
from pipeline.evaluation.classifiers import ClassifierConfig, plain_recipe, train_classifier
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import resume_point
from pipeline.training.spec.recipe import FinetuneRecipe

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ScratchSettings(FinetuneRecipe):
    """Supervised training of random weights. Defaults are those of arXiv 2111.06377, table 11, ViT-B."""

    global_batch: int = 4096
    epochs: int = 300
    base_lr: float = 1e-4
    warmup_epochs: float = 20.0
    min_lr: float = 0.0
    weight_decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    augment: AugmentConfig = AugmentConfig(scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1")  # noqa: RUF009 - frozen
    layer_decay: float = 1.0
    mixup: float = 0.8
    cutmix: float = 1.0
    ema: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class ScratchConfig(ClassifierConfig):
    """Everything that decides the score."""

    section: ClassVar[str] = "evaluation.scratch"


def step_config(common: ProtocolConfig, settings: ScratchSettings) -> ScratchConfig:
    """Return the config of the step."""
    return ScratchConfig(**vars(common), recipe=plain_recipe(settings))


def scratch(config: ScratchConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train random weights on the labelled part of the training split and score them on the held-out split."""
    return train_classifier(config, inputs, attempt)


PROTOCOL = EvaluationProtocol(
    settings=ScratchSettings,
    step_config=step_config,
    evaluate=scratch,
    resume_point=resume_point,
    origins=("random",),
)
