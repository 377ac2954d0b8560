"""The calls that record a run in MLflow: its parent, a child for each step, results, note, model.

Creating a Recorder may fail the run, since it comes before the first step: TrackingError. What goes wrong later is a warning."""

import contextlib
import datetime
import getpass
import json
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence

import yaml

from mae_core.config import size_name
from pipeline import tracking
from pipeline.config import RunConfig
from pipeline.data.dataset.facts import DatasetFacts
from pipeline.errors import PipelineError
from pipeline.graph.receipts import UNKNOWN_REVISION, Receipt, code_revision, installed_versions
from pipeline.graph.runner import Outcome
from pipeline.graph.step import Step
from pipeline.reporting.summaries import as_metrics
from pipeline.runs.recording import naming, results
from pipeline.runs.recording.note import CONFIG_FILE, note
from pipeline.runs.submission import resolved_document
from pipeline.runs.summary import RunSummary
from pipeline.stages.pretrain import HISTORY
from pipeline.stages.report import PAGE, PICTURES
from pipeline.storage import open_store
from pipeline.tracking import names
from pipeline.training.facts import PretrainFacts
from pipeline.weights import ENCODER

log = logging.getLogger(__name__)

_CHILD_ENDS: Mapping[str, tracking.RunStatus] = {"done": "FINISHED", "cached": "FINISHED", "stopped": "KILLED"}
_RUN_ENDS: Mapping[str, tracking.RunStatus] = {"failed": "FAILED", "stopped": "KILLED"}


class Recorder:
    """Records one start of a run. `tags` are added to those of the parent, or replace them (`mae.sweep`, `mae.kind`)."""

    def __init__(self, uri: str, config: RunConfig, *, tags: Mapping[str, str]) -> None:
        self.uri, self.config = uri, config
        self.experiment = naming.experiment_name(config)
        self.worked = False
        """Whether this start made anything."""
        self.metrics: dict[str, float] = {}
        self.parent = tracking.open_parent(
            uri,
            experiment=self.experiment,
            name=naming.run_title(config),
            attempt=uuid.uuid4().hex,
            tags={**parent_tags(config), **tags},
            params=config.model_dump(),
        )
        where = {"store": config.store, "tracking": uri}
        begun = note(config, verdict="running", metrics={}, links={}, addresses=where)
        with failures_as_warnings("note on the run"):
            tracking.set_tags(uri, self.run_id, {names.NOTE_TAG: begun})
            tracking.log_file(uri, self.run_id, _as_yaml(config), CONFIG_FILE)

    @property
    def run_id(self) -> str:
        """Of the parent."""
        return self.parent.run_id

    def open(self, step: Step) -> str:
        """Open the run of a step and return its id."""
        self.worked = True
        return tracking.open_child(
            self.uri,
            experiment=self.experiment,
            parent_run_id=self.run_id,
            name=step.name,
            fingerprint=step.fingerprint,
            tags={"mae.step": step.name, names.KIND_TAG: step.kind},
            params=step.identity()["config"],
        )

    def end(self, outcome: Outcome) -> None:
        """Record how a step ended, and send what MLflow lacks of its curves.

        A cached step can lack some, too: it may have been made while MLflow was down, or for another server."""
        step, receipt = outcome.step, outcome.receipt
        # the step never began
        if not receipt and not outcome.mlflow_run_id:
            return
        # looked up, because a rollback closes the run that the attempt began with and opens another
        run_id = tracking.find_child(self.uri, experiment=self.experiment, fingerprint=step.fingerprint)
        files = receipt.as_input(outcome.uri).store if receipt else None
        # only steps that train keep a journal, and only they have a resume point
        # no run has an empty id, so without a run everything counts as unsent
        has_unsent = bool(files and step.resume_point and tracking.Journal(files).has_unsent(run_id or ""))
        if outcome.state != "cached" or has_unsent:
            run_id = run_id or self.open(step)
            if files and has_unsent:
                tracking.deliver(files, self.uri, run_id)
            self._log_result(outcome, run_id)
            tracking.close_run(self.uri, run_id, _CHILD_ENDS.get(outcome.state, "FAILED"))
        if run_id:
            where = files.uri if files else ""
            tracking.link_child(self.uri, parent_run_id=self.run_id, name=step.name, run_id=run_id, files_uri=where)
        if step.kind == "pretrain" and files:
            tracking.log_curve(self.uri, self.run_id, names.CURVE, results.curve(history_of(outcome)))

    def close(self, summary: RunSummary) -> None:
        """Close the parent with scores, costs, data, report page, pictures, note, and the model."""
        outcomes = summary.outcomes
        with failures_as_warnings("results of the run"):
            self.metrics = as_metrics(summary.scores) | _metrics(self.config, outcomes)
            tracking.log_scores(self.uri, self.run_id, self.metrics)
        with failures_as_warnings("datasets of the run"):
            for used in results.used_datasets(outcomes, data_name=naming.data_label(self.config)):
                tracking.log_dataset(self.uri, self.run_id, **used._asdict())
        with failures_as_warnings("note on the run"):
            tracking.set_tags(self.uri, self.run_id, {names.NOTE_TAG: self._note(summary)})
        with failures_as_warnings("pictures of the run"):
            self._log_page(outcomes)
        with failures_as_warnings("model of the run"):
            self._register(summary)
        with failures_as_warnings("end of the run"):
            status = _RUN_ENDS.get(summary.verdict, "FINISHED")
            tracking.close_parent(self.uri, self.parent, status, worked=self.worked)

    def abandon(self, status: tracking.RunStatus) -> None:
        """Close the parent after the run broke off."""
        tracking.close_parent(self.uri, self.parent, status, worked=True)

    def _log_result(self, outcome: Outcome, run_id: str) -> None:
        if outcome.receipt is None:
            return
        step, facts = outcome.step, outcome.receipt.facts
        numbers = {f"result/{key}": float(value) for key, value in facts.items() if isinstance(value, int | float)}
        settings = facts.get("top1_by_setting", {})
        numbers |= {f"result/top1/{setting}": float(value) for setting, value in settings.items()}
        tracking.log_scores(self.uri, run_id, numbers)
        dataset = next((s for s in (step, *step.inputs.values()) if s.kind in {"shard", "join"}), None)
        digest = _dataset_digest(outcome.receipt)
        if dataset and digest:
            source = str(dataset.config.source)
            tracking.log_dataset(self.uri, run_id, name=dataset.name, digest=digest, source=source, context="training")

    def _log_page(self, outcomes: Sequence[Outcome]) -> None:
        page = next((o for o in outcomes if o.step.kind == "report" and o.receipt), None)
        # a report that was cached is there from the time it was made
        if not page or not page.receipt:
            return
        files = page.receipt.as_input(page.uri).store
        for name in (PAGE, *PICTURES):
            # scores.png is missing where nothing was scored
            if files.exists(name):
                tracking.log_file(self.uri, self.run_id, files.read(name), f"report/{name}")

    def _register(self, summary: RunSummary) -> None:
        made = _pretrained(summary.outcomes)
        if made is None or made.receipt is None or ENCODER not in {file.key for file in made.receipt.files}:
            return
        score = results.linear_score(summary.scores)
        tracking.register_encoder(
            self.uri,
            self.config.name,
            run_id=self.run_id,
            fingerprint=made.step.fingerprint,
            files_uri=made.receipt.as_input(made.uri).store.uri,
            linear=tracking.LinearScore(score.mean, score.dataset) if score else None,
            tags={key: value for key, value in parent_tags(self.config).items() if key in _MODEL_TAGS},
        )

    def _note(self, summary: RunSummary) -> str:
        return note(
            self.config,
            verdict=summary.verdict,
            steps=[(outcome.step.name, outcome.state, outcome.seconds) for outcome in summary.outcomes],
            scores=summary.scores,
            metrics=self.metrics,
            links=tracking.pages_of_children(self.uri, self.run_id),
            addresses=summary.addresses,
        )


_MODEL_TAGS = {names.DATA_TAG, names.SIZE_TAG, names.DIFFERS_TAG, names.COMMIT_TAG}


def parent_tags(config: RunConfig) -> dict[str, str]:
    """Return what a run is found by, grouped by and traced back with."""
    revision = code_revision()
    source = {
        names.SOURCE_TAG: "mae evaluate" if config.weights else "mae run",
        names.SOURCE_TYPE_TAG: "LOCAL",
    }
    if revision != UNKNOWN_REVISION:
        source[names.COMMIT_TAG] = revision.rstrip("+")
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        source[names.USER_TAG] = getpass.getuser()
    return {
        names.RUN_TAG: config.name,
        names.DIGEST_TAG: naming.identity_digest(config),
        names.STORE_TAG: open_store(config.store).uri,
        names.DATA_TAG: naming.data_label(config),
        names.SIZE_TAG: size_name(config.model.encoder),
        names.DIFFERS_TAG: naming.differs_label(config),
        names.KIND_TAG: "evaluate" if config.weights else "run",
        names.STARTED_TAG: datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "git.revision": revision,
        **source,
        **{f"version.{name}": version for name, version in installed_versions().items()},
    }


def history_of(outcome: Outcome) -> results.History:
    """Return the rows of a finished pretraining."""
    if outcome.receipt is None:
        return []
    files = outcome.receipt.as_input(outcome.uri).store
    return [json.loads(line) for line in files.read(HISTORY).splitlines()]


def _metrics(config: RunConfig, outcomes: Sequence[Outcome]) -> dict[str, float]:
    made = _pretrained(outcomes)
    if made is None or made.receipt is None:
        return {}
    history = history_of(made)
    evaluations = [outcome for outcome in outcomes if outcome.step.kind == "evaluate"]
    cost = results.cost_metrics(history, evaluations, config.resources, usd_per_hour=config.tracking.usd_per_hour)
    return results.pretraining_metrics(PretrainFacts.read(made.receipt.facts), history) | cost


def _pretrained(outcomes: Sequence[Outcome]) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome.step.kind == "pretrain" and outcome.receipt), None)


def _dataset_digest(receipt: Receipt) -> str:
    """Digest of the dataset that a step made or was pretrained on, or an empty string."""
    if receipt.kind in {"shard", "join"}:
        return DatasetFacts.read(receipt.facts).digest
    return PretrainFacts.read(receipt.facts).dataset_digest if receipt.kind == "pretrain" else ""


def _as_yaml(config: RunConfig) -> bytes:
    """The whole configuration, with secrets hidden, so that `mae run` can read it."""
    # the text, not by key as for parameters: only addresses hold secrets, and `***` for `tokens: all` could not be read again
    return tracking.redact_text(yaml.safe_dump(resolved_document(config), sort_keys=False, width=math.inf)).encode()


@contextlib.contextmanager
def failures_as_warnings(what: str) -> Iterator[None]:
    """Turn a PipelineError of the block into a logged warning that begins with `what`."""
    try:
        yield
    except PipelineError as error:
        log.warning("%s: %s", what, error)
