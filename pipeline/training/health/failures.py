"""Classes of failure, and whether a training step is tried again: decided here, from what the workers raised.

    preempted       the node was taken away, with or without notice          again, up to max_preemptions in a row
    infrastructure  a process, node or connection was lost                   again, up to max_failures in a row
    memory          a GPU is too small for the micro-batch                   not again
    user            the code raised what is no accident (KeyError, ...)      not again
    numeric, data   a PipelineError that the loop raised on all workers      not again; they never come here
In a row: without a new committed checkpoint in between. A run that goes forward is never given up."""

from collections.abc import Iterable
from typing import Literal

import torch

from pipeline.cluster.resources import Resources

FailureClass = Literal["preempted", "infrastructure", "memory", "user"]
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError),
    *(SyntaxError, TypeError, ValueError),
)
"""What the same code does again. gloo and NCCL say RuntimeError when a peer is gone, so that one is no fault."""


def classify(errors: Iterable[BaseException]) -> FailureClass:
    """The class of a group's failure, from the errors of its workers: those that met it, and those whose peers were gone."""
    causes = [getattr(error, "health_check_failure", error) for error in errors]
    if any(getattr(cause, "preempted", False) for cause in causes):
        return "preempted"
    if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
        return "memory"
    if any(isinstance(cause, FAULTS) for cause in causes):
        return "user"
    return "infrastructure"


class Restarts:
    """Counts failures since there was a new checkpoint."""

    def __init__(self) -> None:
        self.committed, self.count = "", 0

    def after(self, committed: str) -> int:
        """One more failure, when this was the newest checkpoint; how many these are in a row."""
        self.count = 1 if committed != self.committed else self.count + 1
        self.committed = committed
        return self.count


def verdict(kind: FailureClass, in_a_row: int, resources: Resources) -> str:
    """Why the step is given up, with the way out; empty: it is tried again."""
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
