"""The interface that every evaluation protocol implements, and the scores that it leaves in a receipt.

A protocol is a module in `protocols/`, named as in the configuration. It declares its settings, the config of its step, a stage
function, `VERSION`, and `PROTOCOL`, which ties them together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mae_core.config import ViTConfig
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.graph.facts import Facts
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.storage import Store

EncoderOrigin = Literal["pretrained", "random"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: the part of a step's config that all protocols share."""

    encoder: ViTConfig
    weights: EncoderOrigin
    """`random`: the same architecture with its initial weights, as the baseline."""
    train_labels: int | None
    """Train on this many labelled images, balanced over the classes; None: on all of them."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """One way to score an encoder."""

    settings: type[Any]
    """What `evaluation.<name>` may say in the configuration; its defaults are those of the paper."""
    step_config: Callable[[Subject, Any], Subject]
    """(subject, settings) -> the config of the step, all of which enters the fingerprint."""
    evaluate: Callable[[Any, Mapping[str, StageInput], Attempt], StageResult]
    """The stage function: inputs `shards` and, for a pretrained encoder, `pretrain`; facts are ScoreFacts."""
    resume_point: Callable[[Store], str] | None = None
    """As in `Step`, for protocols that train in a resumable loop."""


@dataclass(frozen=True, kw_only=True)
class ScoreFacts(Facts):
    """Scores on the test split, or why there are none."""

    skipped: str | None = None
    """Why nothing was evaluated."""
    top1: float | None = None
    """Share of images whose class was ranked first, in [0, 1]."""
    top5: float | None = None
    loss: float | None = None
    """Mean cross entropy in nats."""
    images: int | None = None
    """Images that the scores are means over."""


def skipped(shards: StageInput) -> StageResult | None:
    """Return the result of an evaluation that cannot be done on this dataset, or None if it can."""
    reason = DatasetFacts.read(shards.facts).unsuited
    return StageResult(ScoreFacts(skipped=reason).as_json()) if reason else None
