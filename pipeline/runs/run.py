"""One pipeline run: checks everything that can be checked before anything is held, walks the graph, keeps MLflow informed.

Tracking never fails a run once it has begun: what MLflow refuses becomes a warning. Errors: ConfigError and PipelineError before
the first step; afterwards every step's outcome is in the summary."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import cluster, tracking
from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.graph.runner import GraphRun, PlannedStep, plan_graph
from pipeline.runs.checks import check_before, check_fits_cluster, source_problem, steps_to_run, warn_of_folders
from pipeline.runs.hooks import Display, RunFamily
from pipeline.runs.summary import RunSummary, summarise
from pipeline.runs.workflow import build
from pipeline.storage import open_store

log = logging.getLogger(__name__)


def plan_run(config: RunConfig) -> list[PlannedStep]:
    """What a run would do; writes nothing."""
    steps = build(config)
    store = open_store(config.store)
    problems = {step.name: problem for step in steps if (problem := source_problem(step))}
    rows = plan_graph(steps, store=store, unable=problems)
    for row in rows:
        if row.state == "blocked" and row.step.name in problems:
            log.warning("%s is blocked: %s", row.step.name, problems[row.step.name])
    return rows


def run_pipeline(config: RunConfig, *, executor: Executor, display: Display) -> RunSummary:
    """Runs all that is not done."""
    steps = build(config)
    store = open_store(config.store)
    check_before(config, steps, store, executor)
    uri = tracking.resolve_tracking_uri(config.tracking.uri, store_uri=store.uri)
    tracking.check_tracking(uri)
    family = RunFamily(uri, config, display)
    on_cluster = executor == "ray" and any(row.state == "to_run" for row in plan_graph(steps, store=store))
    if on_cluster:
        cluster.connect()
        warn_of_folders(store, uri)
    walk = GraphRun(steps, store=store, executor=executor, hooks=family, parallel=config.resources.parallel_steps)
    try:
        if on_cluster and "RAY_ADDRESS" in os.environ:
            check_fits_cluster(config, steps_to_run(steps, store))
        with _stop_when_told(walk.request_stop, config.resources):
            outcomes = walk.walk()
    except BaseException as error:
        family.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        if on_cluster:
            cluster.disconnect()
    summary = summarise(config, outcomes, run_id=family.run_id, addresses={"store": store.uri, "tracking": uri})
    family.close(summary, store)
    return summary


@contextmanager
def _stop_when_told(request_stop: Callable[[], None], resources: Resources) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to save and stop; a second one cuts it off, a third one ends the process.
    The wall clock is a first one (SIGALRM, in good time)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def on_both(handler: Any) -> None:
        for number in before:
            signal.signal(number, handler)

    def ask(number: int, *_: object) -> None:
        on_both(cut_off)
        signal.setitimer(signal.ITIMER_REAL, 0)
        asked = (
            "asked to stop" if number != signal.SIGALRM else f"wall_clock_s={resources.wall_clock_s:g} is nearly over"
        )
        log.warning("%s: what is under way is saved first; asked once more, it is cut off", asked)
        request_stop()

    def cut_off(*_: object) -> None:
        on_both(signal.SIG_DFL)
        raise KeyboardInterrupt

    on_both(ask)
    if resources.wall_clock_s is not None:
        signal.setitimer(signal.ITIMER_REAL, resources.wall_clock_s - resources.grace_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
