"""Scores and step rows as plain values: what the terminal, the page, the figures and MLflow all show.

Nothing is rendered here. Units: scores are top-1 accuracies as fractions in [0, 1], unless they have a `measure` of their own;
seconds are wall-clock time."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.reporting.format import count
from pipeline.tracking.names import SCORE_N_PREFIX, SCORE_PREFIX, SCORE_SD_PREFIX

StepState = Literal["done", "cached", "running", "failed", "stopped", "blocked", "waiting"]
PlanState = Literal["cached", "to_run", "blocked"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of one protocol on one dataset with one encoder, over all seeds."""

    protocol: str
    """`knn`, `linear`, `rankme`, `finetune`."""
    dataset: str
    encoder: str
    """`pretrained`, or `random` for the same architecture without pretraining."""
    values: tuple[float, ...]
    """Top-1 accuracy in [0, 1], or the measure, one per seed."""
    images: int | None = None
    """Test images that the accuracy is a mean over; None in receipts of older versions, as `labels`."""
    labels: int | None = None
    """Labelled training images that were learnt from."""
    measure: str = ""
    """What the values are if they are no accuracies, such as `effective rank`."""
    setting: str = ""
    """The setting that the values are of, for a protocol with several: `k20`."""
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Other setting -> top-1 accuracies, one per seed. They are shown beside the score and never replace it."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the seeds; None with a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """`97.1 ± 0.3 %`, without the spread for a single seed, and without the unit for a measure."""
        spread = "" if self.sd is None else f" ± {self.shown(self.sd)}"
        return f"{self.shown(self.mean)}{spread}{self.unit}"

    @property
    def unit(self) -> str:
        """` %` behind an accuracy, nothing behind a measure."""
        return "" if self.measure else " %"

    def shown(self, value: float) -> str:
        """Return a value as it is shown, without its unit: an accuracy in per cent."""
        return f"{value if self.measure else 100 * value:.1f}"

    def above(self, other: "Score") -> str:
        """Return by how much it is above another score, `+4.2`, in percentage points for an accuracy."""
        difference = float(self.shown(self.mean - other.mean))
        return f"{difference:+.1f}".replace("-", "−")  # as wide as +


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A step as it ended, or as it stands now."""

    name: str
    state: StepState
    fingerprint: str = ""
    seconds: float | None = None
    generation: int | None = None
    uri: str = ""
    detail: str = ""
    """Why it failed, stopped or is blocked, or a remark on a finished one."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """A step as `mae plan` shows it; `pipeline.graph.plan.PlannedStep` with its numbers."""

    name: str
    state: PlanState
    fingerprint: str = ""
    differs: str = ""
    """The fields in which it differs from the most similar finished step, `config.model.mask_ratio: 0.75 -> 0.6`."""
    memory_gib: float | None = None
    """Peak memory of one worker: its GPU's, or its process's on a CPU."""
    seconds: float | None = None
    cost: str = ""
    """With its unit, `$1 230 to $2 050`."""


FEW_IMAGES = 100
"""Test images below which a score is a rough figure: one image then is more than a percentage point."""


def remarks_on_scores(scores: Sequence[Score]) -> dict[str, str]:
    """Return why the scores of a dataset are rough figures, by dataset; datasets with enough test images are left out."""
    return {
        score.dataset: f"only {score.images} test image{'s' if score.images > 1 else ''}: one of them more or less is "
        f"{100 / score.images:.3g} percentage points"
        for score in scores
        if not score.measure and score.images is not None and 0 < score.images < FEW_IMAGES
    }


def settings_of_scores(scores: Sequence[Score]) -> dict[str, str]:
    """Return what a score is that the tables do not say, by protocol and dataset: its measure, its setting and the other ones."""
    found = {}
    for score in scores:
        name = f"{score.protocol} {score.dataset}"
        if score.measure:
            of = "" if score.images is None else f" of {count(score.images)} images"
            found[name] = f"{score.measure} of the features{of}, no accuracy"
        elif score.others:
            others = ", ".join(f"{key} {100 * statistics.fmean(of):.1f} %" for key, of in score.others.items())
            found[f"{name} {score.encoder}"] = f"the score is {score.setting}; beside it {others}"
    return found


def pairs(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """Group scores as (dataset, protocol) -> encoder -> score, in order of first appearance."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        found.setdefault((score.dataset, score.protocol), {})[score.encoder] = score
    return found


def as_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Name scores as MLflow compares them: `score/<protocol>/<dataset>/<encoder>`, the same under `score_sd/` and `score_n/`, and
    `score/.../k100` for another setting."""
    metrics: dict[str, float] = {}
    for score in scores:
        key = f"{score.protocol}/{score.dataset}/{score.encoder}"
        metrics |= {SCORE_PREFIX + key: score.mean, SCORE_N_PREFIX + key: len(score.values)}
        if score.sd is not None:
            metrics[SCORE_SD_PREFIX + key] = score.sd
        metrics |= {f"{SCORE_PREFIX}{key}/{setting}": statistics.fmean(of) for setting, of in score.others.items()}
    return metrics
