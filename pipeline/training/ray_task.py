"""The loop as a plain Ray task: a training with one worker, without Ray Train's controller and helpers.

Those are seven processes that each import torch; a task runs in a process that Ray keeps for the next one. What Ray Train does for
a group is done here for one worker: a task that fails is started again, on any node with room, and the loop then starts from the
newest checkpoint in the store. It is given up as a group is, by `failures.reason_to_give_up`.
Errors: PipelineError when the training is given up."""

import logging
from collections.abc import Callable

import torch

from pipeline import cluster
from pipeline.graph.step import Attempt
from pipeline.training.health.failures import RestartBudget, last_line
from pipeline.training.health.stop_reasons import sigterm_stops
from pipeline.training.spec.train_spec import TrainSpec
from pipeline.training.world import leave_launcher

log = logging.getLogger(__name__)
WorkerFunction = Callable[[TrainSpec, Attempt], None]


def fit(run_worker: WorkerFunction, spec: TrainSpec, attempt: Attempt) -> None:
    """Run `run_worker` as a task until it returns, again after a failure as far as the budget allows."""
    budget = RestartBudget(attempt)
    # ZeRO-3 leaves DeepSpeed's own linear layers behind in a process, which round differently.
    own_process = attempt.resources.zero_stage == 3
    while True:
        try:
            return cluster.call_reserved(
                train_alone, run_worker, spec, attempt, need=attempt.resources.per_worker, own_process=own_process
            )
        except Exception as error:
            if problem := budget.give_up([error]):
                raise problem from error
            log.warning(
                "%s: the worker failed (%s) and starts again from the newest checkpoint",
                attempt.step_name,
                last_line(error),
            )


def train_alone(run_worker: WorkerFunction, spec: TrainSpec, attempt: Attempt) -> None:
    """Run `run_worker` in this process, which trained before and will again: what is set for this call is set back."""
    logging.getLogger().setLevel(logging.WARNING)
    leave_launcher()
    threads = torch.get_num_threads()
    try:
        # Its own share: tasks that each started a thread per core would crowd each other out.
        if not attempt.resources.use_gpu:
            torch.set_num_threads(max(1, int(attempt.resources.cpus_per_worker)))
        with sigterm_stops():
            run_worker(spec, attempt)
    finally:
        torch.set_num_threads(threads)
