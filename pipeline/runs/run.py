"""One pipeline run: check whatever can be checked in advance, walk the graph, record it in MLflow.

Errors: ConfigError and PipelineError before the first step, including those of MLflow. Once steps run, every failure is an outcome
in the summary, and an error of MLflow is only a warning."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.text import Text

from pipeline import cluster, tracking
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.graph.plan import HISTORY, PlannedStep, plan_graph
from pipeline.graph.runner import GraphRun
from pipeline.runs.checks import (
    check_before_start,
    check_fits_cluster,
    source_problem,
    steps_to_run,
    warn_of_unshared_paths,
)
from pipeline.runs.findings import DataDescription, describe
from pipeline.runs.hooks import Display, RunHooks
from pipeline.runs.summary import RunSummary, summarise
from pipeline.runs.workflow import build
from pipeline.storage import open_store

log = logging.getLogger(__name__)


def plan_run(config: RunConfig) -> tuple[list[PlannedStep], DataDescription]:
    """Return what a run would do with every step, and what is known of its data. Writes nothing."""
    steps = build(config)
    store = open_store(config.store)
    problems = {step.name: problem for step in steps if (problem := source_problem(step))}
    data = describe(config, [step for step in steps if step.name not in problems], store)
    problems |= data.problems
    rows = plan_graph(steps, store=store, unable=problems)
    said = set()
    for row in rows:
        why = str(problems.get(row.step.name, ""))
        if row.state == "blocked" and why and why not in said:  # one problem can block several steps
            said.add(why)
            log.warning("%s is blocked: %s", row.step.name, why)
    return rows, data


def run_pipeline(config: RunConfig, *, executor: Executor, display: Display) -> RunSummary:
    """Run every step that is not finished and return how the run ended."""
    steps = build(config)
    store = open_store(config.store)
    check_before_start(config, steps, store, executor)
    uri = tracking.resolve_tracking_uri(config.tracking.uri, store_uri=store.uri)
    tracking.check_tracking(uri)
    if (
        next(iter(store.list(HISTORY)), None) is None
    ):  # or else a store under a wrong path starts everything again unnoticed
        display.show(Text(f"store {store.uri} is new: no step is finished in it"))
    hooks = RunHooks(uri, config, display, steps)
    on_cluster = executor == "ray" and any(row.state == "to_run" for row in plan_graph(steps, store=store))
    if on_cluster:
        cluster.connect()
        warn_of_unshared_paths(store, uri)
    walk = GraphRun(steps, store=store, executor=executor, hooks=hooks, parallel=config.resources.parallel_steps)
    try:
        if on_cluster and "RAY_ADDRESS" in os.environ:
            check_fits_cluster(config, steps_to_run(steps, store))
        with _stop_on_signals(walk.request_stop, config.resources):
            outcomes = walk.walk()
    except BaseException as error:
        hooks.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        if on_cluster:
            cluster.disconnect()
    summary = summarise(config, outcomes, run_id=hooks.run_id, addresses={"store": store.uri, "tracking": uri})
    hooks.close(summary, store)
    return summary


@contextmanager
def _stop_on_signals(request_stop: Callable[[], None], resources: Resources) -> Iterator[None]:
    """Stop the run on signals: the first SIGINT or SIGTERM lets it save, the second interrupts it, the third kills the process.

    The time limit is a first signal: SIGALRM comes `grace_s` before wall_clock_s."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def handle_all(handler: Any) -> None:
        for number in previous:
            signal.signal(number, handler)

    def save_and_stop(number: int, *_: object) -> None:
        handle_all(interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reason = (
            "asked to stop" if number != signal.SIGALRM else f"wall_clock_s={resources.wall_clock_s:g} is nearly over"
        )
        log.warning("%s: saving what is running; a second signal interrupts it without saving", reason)
        request_stop()

    def interrupt(*_: object) -> None:
        handle_all(signal.SIG_DFL)
        raise KeyboardInterrupt

    handle_all(save_and_stop)
    if resources.wall_clock_s is not None:
        signal.setitimer(signal.ITIMER_REAL, resources.wall_clock_s - resources.grace_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
