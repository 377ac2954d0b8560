"""May the optimiser move? Decided before it does, from numbers that all ranks share: go on, skip, roll back, or give up.

A step whose loss or gradient norm is not finite is skipped: its samples count as seen, the weights stay as they are. A spike
is skipped too if the recipe asks for it: a value far above the median of the accepted steps before it, measured in median
absolute deviations (a robust measure: one earlier spike hardly moves either). Several skips in a row mean that the weights
themselves have gone wrong. The newest checkpoint from before is loaded, and the range, with some steps before it, is never
trained on. All of this is bounded.
The state is a value that is saved in checkpoints, so a killed run decides the same way again.
By default spikes are reported and not acted on, so a recipe written before the guard existed still means the same.
Units: steps are numbers of global batches, from 0; a range is [first, one past the last)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, NamedTuple

from pipeline.errors import ConfigError

Verdict = Literal["go", "skip", "roll_back", "give_up"]
Range = tuple[int, int]

_MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
_LEAST_DEVIATION_SHARE = 0.01
"""Smallest deviation, as a share of the median: on a plateau the measured one is near zero, and noise would be a spike."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is not taken. This decides results, so it is part of the recipe."""

    spikes: Literal["report", "skip", "roll_back"] = "report"
    """What a spike of the loss or the gradient norm leads to; values that are not finite are always skipped."""
    deviations: float = 20.0
    """A spike lies this many (robust) standard deviations above the median: enough that none occurs by chance."""
    window: int = 128
    """Number of accepted steps behind the median and the deviation; nothing is called a spike before there are that many."""
    skips_in_a_row: int = 3
    """This many consecutive skipped steps lead to a rollback."""
    roll_back_steps: int = 100
    """Steps before the first bad one that are undone and skipped with it: whatever damaged the weights came earlier."""
    roll_backs: int = 3
    """More rollbacks than this end the training."""
    lost_share: float = 0.1
    """Largest share of all steps that may be lost to skips and rollbacks; more end the training."""

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("skips_in_a_row", 1), ("roll_back_steps", 0), ("roll_backs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small: write {least} or more")
        if not self.deviations > 0:
            raise ConfigError(f"deviations={self.deviations} is not positive: write 20 to catch gross spikes only")
        if not 0 <= self.lost_share <= 1:
            raise ConfigError(f"lost_share={self.lost_share} is not in [0, 1]: write 0.1 for a tenth of all steps")


class StepStats(NamedTuple):
    """What is known of a step before the optimiser moves."""

    step: int
    loss: float
    """Mean over the global batch."""
    grad_norm: float


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers at a position. Its field names are JSON keys of a checkpoint's manifest."""

    recent: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the last accepted steps, at most `window` of them."""
    skipped: tuple[int, ...] = ()
    """Steps whose samples were seen and whose gradients were dropped."""
    stepped_over: tuple[Range, ...] = ()
    """Skipped ranges: steps whose samples were never seen. Ascending and disjoint; after a rollback one may lie ahead."""
    roll_backs: int = 0

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GuardState":
        """Read the state from a checkpoint's manifest."""
        rows = {name: tuple(map(tuple, body[name])) for name in ("recent", "stepped_over")}
        return cls(**{**body, **rows, "skipped": tuple(body["skipped"])})

    def next_step(self, step: int) -> int:
        """Return the first step from `step` on that is trained on: the end of a skipped range if `step` lies in one."""
        return next((last for first, last in self.stepped_over if first <= step < last), step)

    def untrained_before(self, step: int) -> int:
        """Count the steps before `step` that lie in skipped ranges."""
        return sum(max(0, min(last, step) - first) for first, last in self.stepped_over)


FRESH = GuardState()
"""The state before the first step."""


class Judgement(NamedTuple):
    """What to do about a step, and why."""

    verdict: Verdict
    reason: str
    """In words; empty if nothing is wrong."""
    stats: StepStats
    state_before: GuardState
    """What was known when the step was judged."""
    state_after: GuardState
    """What is known afterwards. For a rollback it lacks the checkpoint's own past, which is known only once it is loaded."""
    undone: Range = (0, 0)
    """For a rollback: load a checkpoint from the start of this range, or earlier, and never train on the range."""


def judge(config: GuardConfig, state: GuardState, stats: StepStats, total_steps: int) -> Judgement:
    """Decide about a step. Pure, so all ranks come to the same decision."""
    not_finite = _not_finite(stats)
    reason = not_finite or _spike(config, state.recent, stats)
    if not reason or (not not_finite and config.spikes == "report"):
        recent = (*state.recent, (stats.loss, stats.grad_norm))[-config.window :]
        return Judgement("go", reason, stats, state, replace(state, recent=recent))
    # `recent` stays as it is: a bad value must not shift the median that the next ones are judged by.
    skipping = replace(state, skipped=(*state.skipped, stats.step))
    in_a_row = _skips_in_a_row(skipping.skipped)
    if in_a_row < config.skips_in_a_row and (not_finite or config.spikes == "skip"):
        return _within_limits(config, Judgement("skip", reason, stats, state, skipping), total_steps)
    first_bad = stats.step + 1 - in_a_row  # the row of skips led here, so it is undone as a whole
    target = _roll_back_target(first_bad - config.roll_back_steps, config.roll_back_steps, state.stepped_over)
    undone = (target, stats.step + 1)
    # Provisional, for the limits below: `roll_back` replaces it by the checkpoint's own record.
    at_target = GuardState(skipped=tuple(step for step in state.skipped if step < target))
    state_after = state_after_rollback(state, at_target, undone)
    return _within_limits(config, Judgement("roll_back", reason, stats, state, state_after, undone), total_steps)


def state_after_rollback(state: GuardState, at_checkpoint: GuardState, undone: Range) -> GuardState:
    """Return what is known after a rollback: the checkpoint's past, with all skipped ranges and one more rollback."""
    stepped_over = merge_range(state.stepped_over, undone)
    return replace(at_checkpoint, stepped_over=stepped_over, roll_backs=state.roll_backs + 1)


def _within_limits(config: GuardConfig, judgement: Judgement, total_steps: int) -> Judgement:
    """Return the judgement, or `give_up` if it would exceed the configured limits."""
    lost = len(judgement.state_after.skipped) + judgement.state_after.untrained_before(judgement.stats.step + 1)
    # A short training may still skip one row of steps: lost_share of it would round down to nothing.
    most = max(config.skips_in_a_row, int(config.lost_share * total_steps))
    if judgement.state_after.roll_backs > config.roll_backs:
        why = f"{config.roll_backs} rollbacks have not helped"
    elif lost > most:
        why = f"{lost} of {total_steps} steps would be lost, {most} may be (lost_share={config.lost_share:g})"
    else:
        return judgement
    return judgement._replace(verdict="give_up", reason=f"{judgement.reason}; {why}")


def merge_range(ranges: Sequence[Range], added: Range) -> tuple[Range, ...]:
    """Return ascending disjoint ranges with one more, which is merged with those that overlap or touch it."""
    first, last = added
    apart = []
    for one in ranges:
        if one[1] < first or last < one[0]:  # a range excludes its last number, so equal ends touch
            apart.append(one)
        else:
            first, last = min(first, one[0]), max(last, one[1])
    return tuple(sorted([*apart, (first, last)]))


def _not_finite(stats: StepStats) -> str:
    wrong = [name for name, value in _named(stats) if not math.isfinite(value)]
    return f"{' and '.join(wrong)} not finite" if wrong else ""


def _spike(config: GuardConfig, recent: Sequence[tuple[float, float]], stats: StepStats) -> str:
    """Return how far a value lies above the recent ones, or an empty string if none is a spike."""
    # Early losses fall so fast that a short window would have no meaningful deviation.
    if len(recent) < config.window:
        return ""
    for (name, value), earlier in zip(_named(stats), zip(*recent, strict=True), strict=True):
        middle = median(earlier)
        # Median, not mean: the outliers that are looked for would widen a standard deviation.
        measured = _MAD_TO_SIGMA * median(abs(one - middle) for one in earlier)
        deviation = max(measured, _LEAST_DEVIATION_SHARE * abs(middle))
        # Upwards only: a loss or norm that falls sharply does no harm.
        if value > middle + config.deviations * deviation:
            return f"{name} {value:.4g} spikes, {middle:.4g} is the median of {len(earlier)} steps before"
    return ""


def _named(stats: StepStats) -> tuple[tuple[str, float], ...]:
    return ("loss", stats.loss), ("gradient norm", stats.grad_norm)


def _skips_in_a_row(skipped: Sequence[int]) -> int:
    """Count the consecutive steps at the end of an ascending sequence."""
    return next((n for n in range(1, len(skipped)) if skipped[-n - 1] != skipped[-n] - 1), len(skipped))


def _roll_back_target(step: int, further: int, ranges: Sequence[Range]) -> int:
    """Return where training can go on from: `step`, or `further` before each skipped range that it would fall into.

    Going back into a skipped range would land on steps that were given up already, so a second rollback soon after the
    first goes back further.
    """
    # Latest first, so that a step moved out of one range is tested against those before it.
    for first, last in reversed(ranges):
        if first <= step < last:
            step = first - further
    return max(0, step)
