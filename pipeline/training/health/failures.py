"""Classes of failure, and whether a training step is tried again, decided from what the workers raised.

    preempted       the node was taken away, with or without notice          retried, up to max_preemptions in a row
    infrastructure  a process, node or connection was lost                   retried, up to max_failures in a row
    memory          a GPU is too small for the micro-batch                   not retried
    user            the code raised a programming error (KeyError, ...)      not retried
    numeric, data   a PipelineError that the loop raised on all workers      not retried; these never come here

"In a row" means without a new committed checkpoint in between, so a run that makes progress is never given up."""

from collections.abc import Iterable
from typing import Literal

import torch

from pipeline.cluster.resources import Resources

FailureClass = Literal["preempted", "infrastructure", "memory", "user"]
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError),
    *(SyntaxError, TypeError, ValueError),
)
"""What the same code would raise again. RuntimeError is missing: gloo and NCCL raise it when a peer is gone."""


def classify(errors: Iterable[BaseException]) -> FailureClass:
    """Return the class of a group's failure from the errors of its workers, most of which only lost their peers."""
    # Ray Train wraps the error of a worker that no longer answers.
    causes = [getattr(error, "health_check_failure", error) for error in errors]
    # First: when a node goes, the errors of the other workers are its consequences.
    if any(getattr(cause, "preempted", False) for cause in causes):
        return "preempted"
    if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
        return "memory"
    if any(isinstance(cause, FAULTS) for cause in causes):
        return "user"
    return "infrastructure"


class FailureStreak:
    """Counts consecutive failures without a new checkpoint in between."""

    def __init__(self) -> None:
        self.newest_checkpoint, self.count = "", 0

    def count_with(self, newest_checkpoint: str) -> int:
        """Count one more failure, at which this was the newest checkpoint; return how many there are in a row."""
        self.count = 1 if newest_checkpoint != self.newest_checkpoint else self.count + 1
        self.newest_checkpoint = newest_checkpoint
        return self.count


def reason_to_give_up(kind: FailureClass, in_a_row: int, resources: Resources) -> str:
    """Return why the step is given up, with the way out, or an empty string if it is tried again."""
    if kind == "memory":
        return (
            f"a worker ran out of GPU memory at micro_batch={resources.micro_batch}, zero_stage={resources.zero_stage}: "
            f"lower resources.micro_batch (the result is the same) or raise resources.zero_stage"
        )
    if kind == "user":
        return "the code of a worker failed, and would fail again"
    name = "max_preemptions" if kind == "preempted" else "max_failures"
    allowed = resources.max_preemptions if kind == "preempted" else resources.max_failures
    if in_a_row <= allowed:
        return ""
    since = f"{in_a_row} times without a new checkpoint, " if in_a_row > 1 else ""
    what = "were taken away" if kind == "preempted" else "failed"
    return f"the workers {what} {since}more often than {name}={allowed} allows"
