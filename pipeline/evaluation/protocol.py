"""The interface of an evaluation protocol, and the scores that it leaves in a receipt.

A protocol is a module in `protocols/`, named as in the configuration. It declares
  settings    what `evaluation.<name>` may say in the YAML file
  a config    the step's config, a subclass of ProtocolConfig that holds the settings
  a stage     the function that computes the scores, with the module's VERSION
  PROTOCOL    an EvaluationProtocol that ties them together

The rest follows from it: the configuration section, its checks and error messages, the steps for every dataset, encoder and seed,
their fingerprints, and the rows of the report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_core.config import ViTConfig
from pipeline.data.dataset.address import dataset_address, labels_of
from pipeline.data.dataset.facts import DatasetFacts, ScoredSplit, unsuited
from pipeline.errors import DataError
from pipeline.graph.facts import Facts
from pipeline.graph.step import ADDED_LATER, Attempt, StageInput, StageResult
from pipeline.storage import Store

EncoderOrigin = Literal["pretrained", "random"]
"""`random` is the same architecture with its initial weights, as a baseline."""


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The part of an evaluation step's config that all protocols share: which encoder, and which labels it may learn from."""

    encoder: ViTConfig
    weights: EncoderOrigin
    train_labels: int | None
    """Number of labelled training images, balanced over the classes. None for all of them."""
    seed: int
    """Of the random encoder's weights, the choice of labelled images, and whatever else the protocol draws."""
    split: ScoredSplit = field(default="test", metadata=ADDED_LATER)
    """The split that is scored."""


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """One way to score an encoder."""

    settings: type[Any]
    """Class of the section `evaluation.<name>`: a frozen dataclass or pydantic model in which every field has a default."""
    step_config: Callable[[ProtocolConfig, Any], ProtocolConfig]
    """(common part, settings) -> the whole config of the step, all of which enters the fingerprint."""
    evaluate: Callable[[Any, Mapping[str, StageInput], Attempt], StageResult]
    """The stage. Its inputs are `shards` and, for a pretrained encoder, `pretrain`, which is the import of weights from elsewhere
    if there was no pretraining; its facts are ScoreFacts."""
    resume_point: Callable[[Store], str] | None = None
    """As in `Step`, for protocols that train with checkpoints."""
    needs_labels: bool = True
    """Whether it scores labelled images. One that does not is evaluated on every dataset."""
    learns: bool = True
    """Whether it learns from labelled images of train. One that does not needs no train split."""
    variants: Callable[[Any], Mapping[str, Any]] = lambda settings: {"": settings}
    """Settings -> what each variant appends to the protocol's name -> its settings. A variant has steps and rows of its own."""
    origins: tuple[EncoderOrigin, ...] = ("pretrained", "random")
    """The encoders that it is for."""


@dataclass(frozen=True, kw_only=True)
class ScoreFacts(Facts):
    """Scores on the test split (or val, if the configuration says so), or the reason why there are none.

    A score is an accuracy, `top1`, or something else, `measure` and `value`. The score is fixed by the configuration and never
    picked among settings afterwards, which would choose on the scored split; what the other settings reach stands beside it."""

    skipped: str | None = None
    """Why nothing was evaluated, such as `no labels`."""
    labels: int | None = None
    """Labelled training images that were learnt from. Receipts of older versions lack it."""
    top1: float | None = None
    """Share of images whose class was ranked first, in [0, 1]."""
    top5: float | None = None
    """Share of images whose class was among the first five, in [0, 1]."""
    loss: float | None = None
    """Mean cross entropy in nats."""
    images: int | None = None
    """Images that the scores are means over."""
    split: ScoredSplit | Literal["train"] | None = None
    """The split that was scored, if it is not test."""
    measure: str | None = None
    """What `value` is, for a score that is no accuracy: `effective rank`."""
    value: float | None = None
    """The score, where it is no accuracy."""
    setting: str | None = None
    """The setting that top1 and top5 are of, where a protocol has several: `k20`."""
    top1_by_setting: Mapping[str, float] | None = None
    """Setting -> top1, of all settings."""

    @property
    def score(self) -> float | None:
        """The score, whatever its measure; None if nothing was evaluated."""
        return self.top1 if self.measure is None else self.value


def skipped(shards: StageInput, split: ScoredSplit = "test", *, learns: bool = True) -> StageResult | None:
    """Return the result to leave for a dataset that cannot be evaluated on, or None if it can be.

    Raises DataError for a label for which a classifier of the dataset's classes has no output."""
    # Decided from the receipt: no shard is opened, and no worker starts, for a dataset without labels.
    facts = DatasetFacts.read(shards.facts)
    reason = unsuited(
        facts.classes,
        {name: one for name, one in labels_of(shards).items() if name in facts.splits},
        split,
        learns=learns,
    )
    if reason:
        return StageResult(ScoreFacts(skipped=reason).as_json())
    _check_labels(shards, len(facts.classes))
    return None


def _check_labels(shards: StageInput, classes: int) -> None:
    if wrong := dataset_address(shards).open().sample_with_label_from(classes):
        raise DataError(
            f"{shards.root_uri}: sample {wrong['sample_id']} has label {wrong['label']}, but the dataset names only {classes} "
            f"classes, 0 to {classes - 1}. Its tables are of different runs: delete the folder and run the same command again"
        )
