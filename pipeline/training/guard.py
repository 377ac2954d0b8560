"""May the optimiser move? Decided before it does, from numbers that all ranks have: go on, skip, roll back, or give up.

A step whose loss or gradient norm is not finite is skipped: its samples count as seen, the weights stay as they are. So is, where
the recipe asks for it, a spike: a value far above the median of the accepted steps before it, in units of their median absolute
deviation (robust: one earlier spike hardly moves either). Skips in a row mean that the weights themselves have gone wrong: the
newest checkpoint from before is loaded and the range is stepped over, with some steps before it. All of it is bounded.
The state is a value that travels in checkpoints: a killed run decides again as it did.
Spikes are reported and not acted on unless asked: a recipe of before means what it meant then.
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
"""Of a normal distribution: its deviation in units of its median absolute deviation."""
_FLAT_SHARE = 0.01
"""Least deviation, as a share of the median: a plateau has next to none, and noise on it is no spike."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is not taken. Decides results: part of the recipe."""

    spikes: Literal["report", "skip", "roll_back"] = "report"
    """What a spike of loss or gradient norm leads to; values that are not finite are skipped in any case."""
    deviations: float = 20.0
    """A spike lies so many (robust) standard deviations above the median: rare enough that none is one by chance."""
    window: int = 128
    """Accepted steps that median and deviation are of; before there are so many, nothing is called a spike."""
    skips_in_a_row: int = 3
    """So many skipped steps after each other lead to a roll-back."""
    roll_back_steps: int = 100
    """Steps before the first bad one that are undone and stepped over with it: what damaged the weights came earlier."""
    roll_backs: int = 3
    """More of them end the training."""
    lost_share: float = 0.1
    """Share of all steps that may be skipped or stepped over; more end the training."""

    def __post_init__(self) -> None:
        for name, least in (("window", 8), ("skips_in_a_row", 1), ("roll_back_steps", 0), ("roll_backs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small: write {least} or more")
        if not self.deviations > 0:
            raise ConfigError(f"deviations={self.deviations} is not positive: write 20 to meet gross spikes alone")
        if not 0 <= self.lost_share <= 1:
            raise ConfigError(f"lost_share={self.lost_share} is not in [0, 1]: write 0.1 for a tenth of all steps")


class Seen(NamedTuple):
    """A step before the optimiser moves."""

    step: int
    loss: float
    """Mean over the global batch."""
    grad_norm: float


@dataclass(frozen=True)
class GuardState:
    """What the guard knows at a position."""

    recent: tuple[tuple[float, float], ...] = ()
    """(loss, gradient norm) of the last accepted steps, `window` at most."""
    skipped: tuple[int, ...] = ()
    """Steps whose samples were seen and whose gradients were dropped."""
    stepped_over: tuple[Range, ...] = ()
    """Ranges of steps whose samples were not seen, ascending and apart; one may still lie ahead after a roll-back."""
    roll_backs: int = 0

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GuardState":
        """From a checkpoint's manifest."""
        rows = {name: tuple(map(tuple, body[name])) for name in ("recent", "stepped_over")}
        return cls(**{**body, **rows, "skipped": tuple(body["skipped"])})

    def past_gaps(self, step: int) -> int:
        """The step itself, or where the range ends that it is stepped over in."""
        return next((last for first, last in self.stepped_over if first <= step < last), step)

    def missed(self, step: int) -> int:
        """How many steps before this one were stepped over."""
        return sum(max(0, min(last, step) - first) for first, last in self.stepped_over)


FRESH = GuardState()
"""Of the first step."""


class Judgement(NamedTuple):
    """What to do about a step, and why."""

    verdict: Verdict
    reason: str
    """In words; empty when nothing is wrong."""
    seen: Seen
    before: GuardState
    """What was known when it was judged."""
    state: GuardState
    """What is known afterwards. Of a roll-back: as it will be, but for what the checkpoint gone back to says of its own past."""
    undo: Range = (0, 0)
    """Of a roll-back: go back to where this begins, or before, and step over it."""


def judge(config: GuardConfig, state: GuardState, seen: Seen, total_steps: int) -> Judgement:
    """Decides about a step; pure, and all ranks come to the same."""
    infinite = _not_finite(seen)
    reason = infinite or _spike(config, state.recent, seen)
    if not reason or (not infinite and config.spikes == "report"):
        recent = (*state.recent, (seen.loss, seen.grad_norm))[-config.window :]
        return Judgement("go", reason, seen, state, replace(state, recent=recent))
    skipping = replace(state, skipped=(*state.skipped, seen.step))
    in_a_row = _in_a_row(skipping.skipped)
    if in_a_row < config.skips_in_a_row and (infinite or config.spikes == "skip"):
        return _bounded(config, Judgement("skip", reason, seen, state, skipping), total_steps)
    first_bad = seen.step + 1 - in_a_row
    back_to = _before_gaps(first_bad - config.roll_back_steps, config.roll_back_steps, state.stepped_over)
    undo = (back_to, seen.step + 1)
    there = GuardState(skipped=tuple(step for step in state.skipped if step < back_to))
    judgement = Judgement("roll_back", reason, seen, state, gone_back(state, there, undo), undo)
    return _bounded(config, judgement, total_steps)


def gone_back(state: GuardState, there: GuardState, undo: Range) -> GuardState:
    """What is known once a roll-back has been made: the past of the checkpoint gone back to, and what lies ahead of it."""
    return replace(there, stepped_over=with_range(state.stepped_over, undo), roll_backs=state.roll_backs + 1)


def _bounded(config: GuardConfig, judgement: Judgement, total_steps: int) -> Judgement:
    """The judgement, or the end when it goes too far."""
    lost = len(judgement.state.skipped) + judgement.state.missed(judgement.seen.step + 1)
    most = max(config.skips_in_a_row, int(config.lost_share * total_steps))
    if judgement.state.roll_backs > config.roll_backs:
        why = f"{config.roll_backs} roll-backs have not helped"
    elif lost > most:
        why = f"{lost} of {total_steps} steps would be lost, {most} may be (lost_share={config.lost_share:g})"
    else:
        return judgement
    return judgement._replace(verdict="give_up", reason=f"{judgement.reason}; {why}")


def with_range(ranges: Sequence[Range], added: Range) -> tuple[Range, ...]:
    """Ascending ranges with one more, those that meet it joined to it."""
    first, last = added
    apart = []
    for one in ranges:
        if one[1] < first or last < one[0]:
            apart.append(one)
        else:
            first, last = min(first, one[0]), max(last, one[1])
    return tuple(sorted([*apart, (first, last)]))


def _not_finite(seen: Seen) -> str:
    wrong = [name for name, value in _named(seen) if not math.isfinite(value)]
    return f"{' and '.join(wrong)} not finite" if wrong else ""


def _spike(config: GuardConfig, recent: Sequence[tuple[float, float]], seen: Seen) -> str:
    """In words, how far a value lies above those before it; empty: not so far."""
    if len(recent) < config.window:
        return ""
    for (name, value), before in zip(_named(seen), zip(*recent, strict=True), strict=True):
        middle = median(before)
        deviation = max(_MAD_TO_SIGMA * median(abs(one - middle) for one in before), _FLAT_SHARE * abs(middle))
        if value > middle + config.deviations * deviation:
            return f"{name} {value:.4g} spikes, {middle:.4g} is the median of {len(before)} steps before"
    return ""


def _named(seen: Seen) -> tuple[tuple[str, float], ...]:
    return ("loss", seen.loss), ("gradient norm", seen.grad_norm)


def _in_a_row(skipped: Sequence[int]) -> int:
    """How many of the last ones follow each other."""
    return next((n for n in range(1, len(skipped)) if skipped[-n - 1] != skipped[-n] - 1), len(skipped))


def _before_gaps(step: int, further: int, ranges: Sequence[Range]) -> int:
    """A step from which training can go on: not inside what was stepped over already, then further back."""
    for first, last in reversed(ranges):
        if first <= step < last:
            step = first - further
    return max(0, step)
