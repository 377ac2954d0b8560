"""Plain rows that every view shows: the terminal, the page, the figures and MLflow. No rendering here.

Units: scores are fractions in [0, 1] where the protocol says accuracy; seconds are wall clock."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StepState = Literal["done", "cached", "running", "failed", "stopped", "blocked", "waiting"]
PlanState = Literal["cached", "to_run", "blocked"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One protocol on one dataset with one encoder, over all its seeds."""

    protocol: str
    """`knn`, `linear`, `attentive`, `partial`, `finetune`."""
    dataset: str
    encoder: str
    """`pretrained`, or `random` for the same architecture without pretraining."""
    values: tuple[float, ...]
    """Top-1 accuracy in [0, 1], one for each seed."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None with a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """`97.1 ± 0.3 %`; a single seed shows no spread."""
        return f"{100 * self.mean:.1f} %" if self.sd is None else f"{100 * self.mean:.1f} ± {100 * self.sd:.1f} %"


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """A step as it ended, or as it stands."""

    name: str
    state: StepState
    fingerprint: str = ""
    seconds: float | None = None
    generation: int | None = None
    uri: str = ""
    detail: str = ""
    """Why it failed, was stopped or is blocked."""


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """A step as `mae plan` foresees it."""

    name: str
    state: PlanState
    fingerprint: str = ""
    differs: str = ""
    """The field that made it differ from the nearest finished step, `pretrain.mask_ratio 0.75 -> 0.6`."""
    memory_gib: float | None = None
    """Peak of one worker's accelerator or process."""
    seconds: float | None = None
    cost: str = ""
    """With its unit, `$12.40`."""


def pairs(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, Score]]:
    """(dataset, protocol) -> encoder -> score, in order of first appearance."""
    found: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        found.setdefault((score.dataset, score.protocol), {})[score.encoder] = score
    return found


def as_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """Names under which MLflow compares runs: `score/<protocol>/<dataset>/<encoder>`, `.../sd` and `.../seeds`."""
    metrics: dict[str, float] = {}
    for score in scores:
        key = f"score/{score.protocol}/{score.dataset}/{score.encoder}"
        metrics |= {key: score.mean, f"{key}/seeds": len(score.values)}
        if score.sd is not None:
            metrics[f"{key}/sd"] = score.sd
    return metrics
