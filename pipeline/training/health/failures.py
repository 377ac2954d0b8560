"""Classes of failure, and whether a training step is tried again, decided from what the workers raised.

    preempted       the node was taken away, with or without notice          retried, up to max_preemptions in a row
    infrastructure  a process, node or connection was lost                   retried, up to max_failures in a row
    memory          a GPU is too small for the micro-batch                   not retried
    user            the code raised a programming error (KeyError, ...)      not retried
    numeric, data   a PipelineError that the loop raised on all workers      not retried; these never come here

"In a row" means without a new committed checkpoint in between, so a run that makes progress is never given up."""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from pipeline.cluster.resources import Resources
from pipeline.errors import PipelineError, StorageError
from pipeline.graph.step import Attempt
from pipeline.training.checkpoints.format import committed
from pipeline.training.health.watchdog import stack_dump_hint

log = logging.getLogger(__name__)
GOES_ON = "The same command goes on from the last checkpoint"
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


class RestartBudget:
    """Decides, each time that a training's workers have failed, whether they start again."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt, self.failures = attempt, FailureStreak()

    def give_up(self, errors: Sequence[BaseException]) -> PipelineError | None:
        """Count one failure of the workers; return the error that ends the training, or None if they start again."""
        try:
            newest = next(committed(self.attempt.root), "")
        except StorageError as error:
            log.warning("cannot see whether there is a new checkpoint: %s", error)
            # Counts as no progress: a store that is away must not make the budget endless.
            newest = self.failures.newest_checkpoint
        reason = reason_to_give_up(classify(errors), self.failures.count_with(newest), self.attempt.resources)
        if not reason:
            return None
        hint = stack_dump_hint(self.attempt.store)
        return PipelineError(f"{self.attempt.step_name}: {reason}; last error: {last_line(errors[0])}. {hint}{GOES_ON}")


def last_line(error: BaseException) -> str:
    """Return the last line of one of Ray's long error messages, taken from the first worker that reported one."""
    worker_errors = getattr(error, "worker_failures", None)
    reported = next(iter(worker_errors.values())) if worker_errors else error
    lines = [line.strip() for line in str(reported).splitlines() if line.strip()]
    return lines[-1] if lines else type(reported).__name__
