"""One pipeline run: check whatever can be checked in advance, walk the graph, record it in MLflow.

Errors: ConfigError and PipelineError before the first step, including those of MLflow. Once steps run, every failure is an outcome
in the summary, and an error of MLflow is only a warning."""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext

from rich.text import Text

from pipeline import cluster, tracking
from pipeline.cluster.tasks import Executor
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.graph.plan import HISTORY, PlannedStep, plan_graph
from pipeline.graph.runner import GraphRun
from pipeline.planning.side_by_side import parallel_steps
from pipeline.runs.checking.before_start import (
    check_before_start,
    check_fits_cluster,
    slow_precision,
    source_problem,
    steps_to_run,
    warn_of_unshared_paths,
)
from pipeline.runs.checking.findings import DataDescription, describe
from pipeline.runs.hooks import Display
from pipeline.runs.stopping import StopSignals
from pipeline.runs.summary import RunSummary
from pipeline.runs.sweeps.graph import Member, all_steps
from pipeline.runs.sweeps.members_hooks import MembersHooks
from pipeline.runs.workflow import build
from pipeline.storage import open_store

log = logging.getLogger(__name__)


def plan_run(config: RunConfig) -> tuple[list[PlannedStep], DataDescription]:
    """Return what a run would do with every step, and what is known of its data. Writes nothing."""
    steps = build(config)
    store = open_store(config.store)
    problems = {step.name: problem for step in steps if (problem := source_problem(step))}
    for problem in problems.values():
        if isinstance(problem, StorageError) and "credentials" in str(problem):
            raise ConfigError(str(problem))  # nothing can be said of any step
    data = describe(config, [step for step in steps if step.name not in problems], store)
    problems |= data.problems
    rows = plan_graph(steps, store=store, unable=problems)
    if advice := slow_precision([row.step for row in rows if row.state == "to_run"], config.resources):
        log.warning(advice)
    said = set()
    for row in rows:
        why = str(problems.get(row.step.name, ""))
        if row.state == "blocked" and why and why not in said:  # one problem can block several steps
            said.add(why)
            log.warning("%s is blocked: %s", row.step.name, why)
    return rows, data


def run_pipeline(
    config: RunConfig, *, executor: Executor, display: Display, signals: StopSignals | None = None
) -> RunSummary:
    """Run every step that is not finished and return how the run ended. `signals`: those that the caller already handles."""
    [summary] = run_members(
        [Member(config=config, steps=build(config))], executor=executor, display=display, signals=signals
    )
    return summary


def run_members(
    members: Sequence[Member], *, executor: Executor, display: Display, signals: StopSignals | None = None
) -> list[RunSummary]:
    """Run every step of several configurations that is not finished, as one graph; return how each run ended.

    All have one store and one tracking server; how many steps run at once, and for how long, the first one says."""
    with nullcontext(signals) if signals else StopSignals() as stop:
        return _run(members, executor, display, stop)


def _run(members: Sequence[Member], executor: Executor, display: Display, stop: StopSignals) -> list[RunSummary]:
    config, steps = members[0].config, all_steps(members)
    with stop.during("waiting for the checks of sources and store; no step has begun"):
        store = open_store(config.store)
        checked: set[str] = set()
        for member in members:
            check_before_start(member.config, member.steps, store, executor, checked=checked)
            checked |= {step.title for step in member.steps}
        uri = tracking.resolve_tracking_uri(config.tracking.uri, store_uri=store.uri)
    # nothing is open in MLflow yet, so there is nothing to close
    if stop.requested:
        raise KeyboardInterrupt
    mlflow = f"MLflow at {tracking.redact_text(uri)}"
    with stop.during("waiting for MLflow to be set up, which takes up to 20 s; no step has begun", setting_up=mlflow):
        if uri:
            tracking.check_tracking(uri)
        # a store under a wrong path would otherwise start everything again unnoticed
        # only the first key is asked for: a bucket's history may be long
        if next(iter(store.list(HISTORY)), None) is None:
            display.show(Text(f"store {store.uri} is new: no step is finished in it"))
        hooks = MembersHooks(uri, members, display)
    walk = GraphRun(
        steps, store=store, executor=executor, hooks=hooks, parallel=parallel_steps(config.resources, steps)
    )
    on_cluster = False
    try:
        # Ray takes seconds to start, so only where a step will run
        if (
            executor == "ray"
            and not stop.requested
            and any(row.state == "to_run" for row in plan_graph(steps, store=store))
        ):
            on_cluster = True
            address = os.environ.get("RAY_ADDRESS")
            with stop.during(
                "waiting for Ray to start, which takes up to 30 s; no step has begun",
                walk.request_stop,
                setting_up=f"Ray at {address}" if address else "Ray on this machine",
            ):
                display.show(f"connecting to Ray at {address}" if address else "starting Ray")
                hooks.starts_on("ray")
                cluster.connect()
                warn_of_unshared_paths(store, uri)
                # only now: what the nodes have is known to the cluster alone
                for member in members:
                    check_fits_cluster(member.config, steps_to_run(member.steps, store))
        resources = config.resources
        if resources.wall_clock_s is not None:
            stop.limit(
                seconds=resources.wall_clock_s - resources.grace_s,
                reason=f"wall_clock_s={resources.wall_clock_s:g} is nearly over",
            )
        with stop.during(walk.waiting_for, walk.request_stop):
            outcomes = walk.walk()
    except BaseException as error:
        with stop.during("waiting for MLflow to note how the run ended"):
            hooks.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        if on_cluster:
            with stop.during("waiting for Ray to end, which takes up to 10 s; what was made is saved"):
                cluster.disconnect()
    with stop.during("waiting for MLflow to note how the run ended; what was made is saved"):
        addresses = {"store": store.uri, "tracking": uri or tracking.NO_TRACKING}
        return hooks.close(outcomes, addresses)
