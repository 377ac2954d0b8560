"""Actions that the loop repeats at step boundaries: profile, log, save.

An action runs before or after a step, every `every_steps` steps. Actions run in the order of their list, each in its own
watchdog phase. A step that ends in a rollback has no "after": the position has jumped, and the steps that led here are not
part of the training any more. What is due is a function of the position alone, so every rank comes to the same answer and
an action may use collectives."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from pipeline.training.checkpoints.position import Position
from pipeline.training.meters.step_clocks import Phase

Moment = Literal["before_step", "after_step"]


@dataclass(frozen=True, kw_only=True)
class PeriodicAction:
    """One thing that the loop does regularly."""

    phase: Phase
    """What the watchdog calls it; also its name."""
    act: Callable[[Position], None]
    """Gets the position at the boundary: the global batches consumed so far are `position.global_step`."""
    every_steps: int = 1
    also_at_end: bool = False
    """Whether it also runs after the last step, whatever the interval."""
    moment: Moment = "after_step"

    def is_due(self, moment: Moment, global_step: int, total_steps: int) -> bool:
        """Whether the action runs at this boundary."""
        # A boundary is both after one step and before the next; without this an action would run twice.
        if moment != self.moment:
            return False
        return global_step % self.every_steps == 0 or (self.also_at_end and global_step == total_steps)


def run_due(
    actions: Sequence[PeriodicAction],
    moment: Moment,
    position: Position,
    *,
    total_steps: int,
    phase: Callable[[Phase], AbstractContextManager[None]],
) -> None:
    """Run the actions that are due at this boundary, in the order of the list."""
    for action in actions:
        if action.is_due(moment, position.global_step, total_steps):
            with phase(action.phase):
                action.act(position)
