"""One pipeline run: checks everything that can be checked before anything is held, walks the graph, keeps MLflow informed.

Tracking never fails a run once it has begun: what MLflow refuses becomes a warning. Errors: ConfigError and PipelineError before
the first step; afterwards every step's outcome is in the summary."""

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline import cluster, tracking
from pipeline.cluster import Executor
from pipeline.config import Resources, RunConfig
from pipeline.data.sources import list_source
from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.receipts import versions
from pipeline.graph.runner import Outcome, PlanRow, Run, plan_graph
from pipeline.graph.step import Step
from pipeline.hardware import here, of_cluster
from pipeline.planning import refuse_what_cannot_fit, workers_of
from pipeline.reporting.rows import Score, as_metrics
from pipeline.stages.report import PAGE, PICTURES, ReportConfig, collect_scores
from pipeline.storage import Store, open_store, probe
from pipeline.workflow import build

log = logging.getLogger(__name__)

EXIT_CODES: Mapping[str, int] = {"done": 0, "failed": 1, "stopped": 3, "warned": 4}


class Display(Protocol):
    """Where a run shows how far it is."""

    def update(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        """A step under way."""
        ...

    def step_state(self, step_name: str, state: Any, *, detail: str = "") -> None:
        """A step began or ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    run_id: str
    outcomes: Sequence[Outcome]
    scores: Sequence[Score]
    addresses: Mapping[str, str]
    bad_share: float
    """Share of unreadable images, of the worst dataset."""
    verdict: Literal["done", "failed", "stopped", "warned"]

    @property
    def exit_code(self) -> int:
        """0 done, 1 failed, 3 stopped and resumable, 4 done with more quarantined images than data.bad_share_warn."""
        return EXIT_CODES[self.verdict]


def plan(config: RunConfig) -> list[PlanRow]:
    """What a run would do; writes nothing."""
    steps = build(config)
    store = open_store(config.store)
    problems = {step.name: problem for step in steps if (problem := _source_problem(step))}
    rows = plan_graph(steps, store=store, unable=problems)
    for row in rows:
        if row.state == "blocked" and row.step.name in problems:
            log.warning("%s is blocked: %s", row.step.name, problems[row.step.name])
    return rows


def run(config: RunConfig, *, executor: Executor, display: Display) -> RunSummary:
    """Runs all that is not done."""
    steps = build(config)
    store = open_store(config.store)
    _check_before(config, steps, store, executor)
    uri = tracking.resolve_tracking_uri(config.tracking.uri, store_uri=store.uri)
    tracking.check_tracking(uri)
    family = _Family(uri, config, display)
    on_cluster = executor == "ray" and any(row.state == "to_run" for row in plan_graph(steps, store=store))
    if on_cluster:
        cluster.connect()
        _warn_of_folders(store, uri)
    walk = Run(steps, store=store, executor=executor, hooks=family, parallel=config.resources.parallel_steps)
    try:
        if on_cluster and "RAY_ADDRESS" in os.environ:
            _check_fits_cluster(config, _waiting(steps, store))
        with _stop_when_told(walk.request_stop, config.resources):
            outcomes = walk.walk()
    except BaseException as error:
        family.abandon("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        if on_cluster:
            cluster.disconnect()
    summary = _summarise(config, family, outcomes, store)
    family.close(summary, store)
    return summary


class _Family:
    """The runner's hooks: a parent run in MLflow with a child for each step, and the terminal."""

    def __init__(self, uri: str, config: RunConfig, display: Display) -> None:
        self.tracking_uri, self.config, self.display = uri, config, display
        self.open_children: dict[str, str] = {}
        self.untold: list[Outcome] = []
        """What MLflow could not be told when it happened."""
        self.run_id = tracking.open_parent(
            uri,
            experiment=config.tracking.experiment,
            name=config.name,
            tags={"git.revision": git_revision(), **{f"version.{name}": v for name, v in versions().items()}},
            params=config.model_dump(),
        )

    def begin(self, step: Step) -> str:
        self.display.step_state(step.name, "running")
        with _warned(f"tracking of {step.name}"):
            self.open_children[step.name] = self._open(step)
        return self.open_children.get(step.name, "")

    def progress(self, step_name: str, done: int, total: int, unit: str, fields: Mapping[str, float]) -> None:
        self.display.update(step_name, done, total, unit, fields)

    def end(self, outcome: Outcome) -> None:
        self.open_children.pop(outcome.step.name, None)
        self.display.step_state(outcome.step.name, outcome.state, detail=detail_of(outcome))
        with _warned(f"tracking of {outcome.step.name}"):
            self.untold.append(outcome)
            self._tell(outcome)
            self.untold.remove(outcome)

    def close(self, summary: RunSummary, store: Store) -> None:
        """Scores, the page and its pictures on the parent run; and what could not be told before."""
        for outcome in self.untold:
            with _warned(f"tracking of {outcome.step.name}"):
                self._tell(outcome)
        with _warned("tracking of the run"):
            tracking.log_scores(self.tracking_uri, self.run_id, as_metrics(summary.scores))
            page = next((o for o in summary.outcomes if o.step.name == "report" and o.receipt), None)
            if page and page.receipt:
                files = page.receipt.as_input(page.uri).store
                for name in (PAGE, *PICTURES):
                    if files.exists(name):
                        tracking.log_figure(self.tracking_uri, self.run_id, files.read(name), f"report/{name}")
            ended: Mapping[str, tracking.RunStatus] = {"failed": "FAILED", "stopped": "KILLED"}
            tracking.close_run(self.tracking_uri, self.run_id, ended.get(summary.verdict, "FINISHED"))

    def abandon(self, status: tracking.RunStatus) -> None:
        """The walk broke off: no run is left that says RUNNING."""
        for run_id in (*self.open_children.values(), self.run_id):
            with _warned("tracking of the run"):
                tracking.close_run(self.tracking_uri, run_id, status)

    def _open(self, step: Step) -> str:
        return tracking.open_child(
            self.tracking_uri,
            experiment=self.config.tracking.experiment,
            parent_run_id=self.run_id,
            name=step.name,
            fingerprint=step.fingerprint,
            tags={"mae.step": step.name},
            params=step.identity()["config"],
        )

    def _tell(self, outcome: Outcome) -> None:
        """How a step ended, and what of its curve MLflow lacks: a cached one may have been made while MLflow was away."""
        step, receipt = outcome.step, outcome.receipt
        if not receipt and not outcome.mlflow_run_id:  # it did not begin
            return
        # asked for: a rollback opens another run than the one that the attempt began with
        run_id = tracking.find_child(
            self.tracking_uri, experiment=self.config.tracking.experiment, fingerprint=step.fingerprint
        )
        files = receipt.as_input(outcome.uri).store if receipt and step.resume_point else None
        waits = files is not None and tracking.Journal(files).waits_for(run_id or "")
        if run_id:
            tracking.link_child(self.tracking_uri, parent_run_id=self.run_id, name=step.name, run_id=run_id)
        if outcome.state == "cached" and not waits:
            return
        run_id = run_id or self._open(step)
        if files and waits:
            tracking.deliver(files, self.tracking_uri, run_id)
        self._log_result(outcome, run_id)
        status: Mapping[str, tracking.RunStatus] = {"done": "FINISHED", "cached": "FINISHED", "stopped": "KILLED"}
        tracking.close_run(self.tracking_uri, run_id, status.get(outcome.state, "FAILED"))

    def _log_result(self, outcome: Outcome, run_id: str) -> None:
        if outcome.receipt is None:
            return
        facts = outcome.receipt.facts
        numbers = {f"result/{key}": float(value) for key, value in facts.items() if isinstance(value, int | float)}
        tracking.log_scores(self.tracking_uri, run_id, numbers)
        datasets = (s for s in (outcome.step, *outcome.step.inputs.values()) if s.name.startswith(("shard", "join")))
        shards = next(datasets, None)
        digest = facts.get("dataset_digest") or facts.get("digest")
        if shards and digest:
            tracking.log_dataset(
                self.tracking_uri,
                run_id,
                name=shards.name,
                digest=str(digest),
                source=str(shards.config.source),
                context="training",
            )


def detail_of(outcome: Outcome) -> str:
    """One line on why a step is not simply done."""
    if outcome.error is not None:
        text = str(outcome.error) or type(outcome.error).__name__
        return (
            text
            if isinstance(outcome.error, PipelineError | ConfigError)
            else f"{type(outcome.error).__name__}: {text}"
        )
    if outcome.receipt is not None and outcome.receipt.facts.get("skipped"):
        return f"not evaluated: {outcome.receipt.facts['skipped']}"
    if outcome.receipt is not None and (found := _found_in_images(outcome.receipt.facts)):
        return found
    if outcome.receipt is not None and outcome.receipt.facts.get("substituted"):
        facts = outcome.receipt.facts
        worst = ", ".join(source for _, source, _ in facts["substituted"][:3])
        return f"{facts['substitutions']} times another image stood in for one that could not be read: {worst}" + (
            f" and {len(facts['substituted']) - 3} more" if len(facts["substituted"]) > 3 else ""
        )
    if outcome.state == "blocked":
        return "an input is missing"
    return ""


def _found_in_images(facts: Mapping[str, Any]) -> str:
    """What a shard or join step says of the images that a person should know."""
    said = [f"{facts['quarantined']} images quarantined"] if facts.get("quarantined") else []
    near = facts.get("near_duplicates_across_splits")
    if near and near["held_out"]:
        said.append(
            f"{near['held_out']} of {near['compared']} images of val and test look like one of train (mae shards inspect shows)"
        )
    return "; ".join(said)


def git_revision() -> str:
    """The commit of the code that runs, with `+` when the tree has changes; `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if changed else "")


def _check_before(config: RunConfig, steps: Sequence[Step], store: Store, executor: Executor) -> None:
    """Whatever can be refused before GPUs are held, or anything is written."""
    waiting = _waiting(steps, store)
    for step in waiting:
        if problem := _source_problem(step):
            raise problem
    low = workers_of(config.resources)
    needed, there = low * config.resources.cpus_per_worker, os.cpu_count() or 1
    if executor == "ray" and "RAY_ADDRESS" not in os.environ and needed > there:
        raise ConfigError(
            f"resources.workers={low} at cpus_per_worker={config.resources.cpus_per_worker} need {needed} CPUs, this machine has "
            f"{there}: write fewer workers, or cpus_per_worker={there / low:.2f}"
        )
    if executor == "in_process" or "RAY_ADDRESS" not in os.environ:
        alone = config.resources.model_copy(update={"workers": 1}) if executor == "in_process" else config.resources
        refuse_what_cannot_fit(waiting, alone, here(workers=workers_of(alone), use_gpu=alone.use_gpu))
    probe(store)


def _waiting(steps: Sequence[Step], store: Store) -> list[Step]:
    """Those that a run would run."""
    return [row.step for row in plan_graph(steps, store=store) if row.state == "to_run"]


def _check_fits_cluster(config: RunConfig, waiting: Sequence[Step]) -> None:
    """Refuses what the cluster's GPUs cannot hold, by what Ray calls them; a cluster of CPUs, or of others, is not judged."""
    count, kinds = cluster.gpus()
    resources = config.resources
    if resources.use_gpu is not False and count >= workers_of(resources) and (device := of_cluster(kinds)):
        refuse_what_cannot_fit(waiting, resources, device)


def _warn_of_folders(store: Store, tracking_uri: str) -> None:
    """On a cluster of several machines a folder of this one is not where the others look."""
    nodes = cluster.node_count()
    if store.local_path("x") and nodes > 1:
        log.warning(
            "store %s is a folder and the cluster has %d nodes: every one must see it under this path", store.uri, nodes
        )
    if tracking_uri.startswith("sqlite") and (nodes > 1 or ("RAY_ADDRESS" in os.environ and not store.local_path("x"))):
        log.warning(
            "tracking %s is a file of the machine that drives the run: other nodes cannot write to it, and it goes when that "
            "machine goes. Set tracking.uri or MLFLOW_TRACKING_URI to a server; the report and history.jsonl in the store "
            "hold the curves either way",
            tracking.redact_text(tracking_uri),
        )


def _source_problem(step: Step) -> PipelineError | ConfigError | None:
    if not step.name.startswith("snapshot"):
        return None
    try:
        labels = step.config.labels
        if labels is not None:
            folder, _, name = labels.rpartition("/")
            if not open_store(folder or "/").exists(name):
                return ConfigError(
                    f"data.labels={labels!r} does not exist. Write the address of a .csv, .jsonl or .parquet file"
                )
        next(item for item in list_source(step.config.source, besides=labels) if item.role != "ignored")
    except (PipelineError, ConfigError) as problem:
        return problem
    return None


def _summarise(config: RunConfig, family: _Family, outcomes: Sequence[Outcome], store: Store) -> RunSummary:
    page = next(outcome for outcome in outcomes if outcome.step.name == "report")
    scored = page.step.config.scored if isinstance(page.step.config, ReportConfig) else ()
    finished = {o.step.name: o.receipt.as_input(o.uri) for o in outcomes if o.receipt}
    shares = [float(o.receipt.facts["bad_share"]) for o in outcomes if o.receipt and "bad_share" in o.receipt.facts]
    bad_share = max(shares, default=0.0)
    states = {outcome.state for outcome in outcomes}
    verdict: Literal["done", "failed", "stopped", "warned"] = "done"
    if "failed" in states:
        verdict = "failed"
    elif "stopped" in states:
        verdict = "stopped"
    elif bad_share > config.data.bad_share_warn:
        verdict = "warned"
    addresses = {"store": store.uri, "tracking": family.tracking_uri}
    if page.receipt:
        files = page.receipt.as_input(page.uri).store
        addresses["report"] = str(files.local_path(PAGE) or f"{files.uri}/{PAGE}")
    pretrained = finished.get("pretrain")
    if pretrained:
        addresses["encoder"] = f"{pretrained.store.uri}/encoder.safetensors"
    return RunSummary(
        run_id=family.run_id,
        outcomes=outcomes,
        scores=collect_scores(tuple(one for one in scored if one.input in finished), finished),
        addresses=addresses,
        bad_share=bad_share,
        verdict=verdict,
    )


@contextmanager
def _warned(what: str) -> Iterator[None]:
    try:
        yield
    except PipelineError as error:
        log.warning("%s: %s", what, error)


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
