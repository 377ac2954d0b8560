"""Experiment tracking: a run is a family in MLflow, and MLflow can never hurt a training run. The one importer of mlflow.

Family: parent = one pipeline run; child = one step, found again by its fingerprint (tag `mae.fingerprint`) and resumed by later
        attempts. Every parent names all its children, cached ones too: tag `mae.step.<step name>` = run id.
Names:  metrics `train/loss`, `throughput/images_per_s`, ...: MLflow draws one chart group per prefix. The x-axis is `global_step`.
Limits: MLflow takes 1000 metrics or 100 parameters a call, 6000 characters a value, 36 a dataset digest, and deletes nothing.
Errors: TrackingError when the server or database cannot be used; `Tracker.log` alone never raises and never waits.
Importing mlflow takes seconds, so functions import it; the settings it reads at import are set just before."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

FINGERPRINT_TAG = "mae.fingerprint"
PARENT_TAG = "mlflow.parentRunId"
LATER_PARENTS_TAG = "mae.later_parents"
STEP_TAG = "mae.step."

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
PARAM_MAX_CHARS = 6000
TAG_MAX_CHARS = 8000
DIGEST_MAX_CHARS = 36
QUEUE_MAX_POINTS = 50_000

T = TypeVar("T")
log = logging.getLogger(__name__)


class TrackingError(PipelineError):
    """MLflow's server or database cannot be reached, or refuses. After `check_tracking` passed, a warning is answer enough."""


# ---------------------------------------------------------------------------------------------------------------------
# Where the runs are kept


def resolve_tracking_uri(configured: str | None, *, store_uri: str) -> str:
    """The configured address, else MLFLOW_TRACKING_URI, else a SQLite file in the local store, else one under `./.mae/`.

    Relative SQLite paths become absolute: workers and `mae ui` start in other directories."""
    chosen = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        folder = _local_folder(store_uri) or Path.cwd() / ".mae"
        return f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    database = _sqlite_file(chosen)
    return chosen.replace(f":///{database}", f":///{database.absolute()}") if database else chosen


def check_tracking(uri: str) -> None:
    """Opens (and, when new, creates) the tracking store, so that a wrong address is answered before any work is done."""
    if urlsplit(uri).scheme in {"", "file"}:
        raise TrackingError(
            f"tracking {redact_text(uri)!r} is a folder, which MLflow no longer writes: use sqlite:///<absolute path>/mlflow.db"
        )
    database = _sqlite_file(uri)
    if database:
        _check_writable(database)
    with _clear_errors(uri, "opening it"):
        _client(uri).search_experiments(max_results=1)


def _check_writable(database: Path) -> None:
    target = database if database.exists() else database.parent
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise TrackingError(f"tracking database {database}: its folder cannot be made ({cause})") from cause
    if not os.access(target, os.W_OK):
        raise TrackingError(f"tracking database {database}: {target} is not writable; choose another path or its owner")


def artifact_location(uri: str, artifact_root: str | None) -> str | None:
    """Where a new experiment keeps its files: beside a SQLite database, as the server says, else where the caller says.

    Left to itself MLflow would write `./mlruns` into whatever directory the process was started in."""
    database = _sqlite_file(uri)
    if artifact_root or database is None:
        if not artifact_root and urlsplit(uri).scheme not in {"http", "https", "databricks"}:
            raise TrackingError(
                f"tracking {redact_text(uri)} is a bare database: say where artifacts go, or use a server"
            )
        return artifact_root
    return str(database.absolute().parent / "mlartifacts")


def _local_folder(uri: str) -> Path | None:
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _sqlite_file(uri: str) -> Path | None:
    prefix, found, path = uri.partition(":///")
    return Path(path.partition("?")[0]) if found and prefix.startswith("sqlite") else None


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def open_parent(
    uri: str,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    artifact_root: str | None = None,
) -> str:
    """Opens the run of one `mae run`, in an experiment that is made when missing; returns its run id."""
    with _clear_errors(uri, f"opening the run {name!r}"):
        experiment_id = _experiment(uri, experiment, artifact_root=artifact_root)
        run_id = str(_client(uri).create_run(experiment_id, tags=_tags(tags), run_name=name).info.run_id)
    log_params(uri, run_id, params)
    return run_id


def open_child(
    uri: str,
    *,
    experiment: str,
    parent_run_id: str,
    name: str,
    fingerprint: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    existing: Literal["resume", "leave"] = "resume",
) -> str:
    """Opens the run of one step: the newest one of this fingerprint, RUNNING again, else a new one; returns its run id.

    `existing="leave"` opens a new child beside it: after a rollback, whose steps have other values than those sent before."""
    run_id = find_child(uri, experiment=experiment, fingerprint=fingerprint) if existing == "resume" else None
    with _clear_errors(uri, f"opening the run of step {name!r}"):
        client = _client(uri)
        if run_id is None:
            family = {FINGERPRINT_TAG: fingerprint, PARENT_TAG: parent_run_id}
            experiment_id = _experiment(uri, experiment)
            run_id = str(client.create_run(experiment_id, tags=_tags({**tags, **family}), run_name=name).info.run_id)
        else:
            client.update_run(run_id, status="RUNNING")
            _log_tags(client, run_id, tags)
    link_child(uri, parent_run_id=parent_run_id, name=name, run_id=run_id)
    log_params(uri, run_id, params)
    return run_id


def find_child(uri: str, *, experiment: str, fingerprint: str) -> str | None:
    """The newest run of a step with this fingerprint, whatever its state; None when nobody tracked it."""
    with _clear_errors(uri, "looking for a step's run"):
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        query = f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'"
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([found.experiment_id], filter_string=query, order_by=order, max_results=1)
        return str(runs[0].info.run_id) if runs else None


def link_child(uri: str, *, parent_run_id: str, name: str, run_id: str) -> None:
    """Names a step's run in its parent; a run that began under another parent (resumed or cached) remembers this one too."""
    with _clear_errors(uri, f"linking step {name!r}"):
        client = _client(uri)
        _log_tags(client, parent_run_id, {f"{STEP_TAG}{_key(name)}": run_id})
        tags = client.get_run(run_id).data.tags
        later = tags.get(LATER_PARENTS_TAG, "").split()
        if tags.get(PARENT_TAG) != parent_run_id and parent_run_id not in later:
            _log_tags(client, run_id, {LATER_PARENTS_TAG: " ".join([*later, parent_run_id][-200:])})


def close_run(uri: str, run_id: str, status: RunStatus) -> None:
    """Sets a run's final state; a later attempt may open it again."""
    with _clear_errors(uri, "closing a run"):
        _client(uri).set_terminated(run_id, status=status)


def _experiment(uri: str, name: str, *, artifact_root: str | None = None) -> str:
    """The experiment's id. Two processes may create it at once: whoever comes second takes the first one's."""
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location(uri, artifact_root)))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(f"experiment {name!r} was deleted in MLflow: restore it there, or choose another name")
    return str(found.experiment_id)


# ---------------------------------------------------------------------------------------------------------------------
# What a run says about itself


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs a nested config as `a.b.c`, secrets hidden, long values cut. Equal repeats are nothing new.

    MLflow never changes a parameter: a new value (more workers in a later attempt) becomes the tag `mae.changed.<key>`."""
    flat = {_key(key): text[:PARAM_MAX_CHARS] for key, text in flatten(redact(params)).items()}
    if not flat:
        return
    with _clear_errors(uri, "logging parameters"):
        from mlflow.entities import Param

        client = _client(uri)
        known = client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for batch in chunks(new, PARAMS_PER_CALL):
            client.log_batch(run_id, params=batch)
        _log_tags(client, run_id, {f"mae.changed.{k}": v for k, v in flat.items() if k in known and known[k] != v})


def log_dataset(uri: str, run_id: str, *, name: str, digest: str, source: str, context: str) -> None:
    """Names the data a run used, without touching it; `context` says for what ("training", "evaluation").

    Stores what MLflow's MetaDataset would. MLflow cuts digests at 36 characters, so the whole one goes into a tag."""
    with _clear_errors(uri, f"logging dataset {name!r}"):
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client = _client(uri)
        where = json.dumps({"uri": redact_text(source)})
        kind = "s3" if source.startswith("s3://") else "local"
        dataset = Dataset(name=name[:500], digest=short_digest(digest), source_type=kind, source=where)
        client.log_inputs(run_id, [DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])])
        _log_tags(client, run_id, {f"mae.dataset.{_key(name)}.digest": digest})


def log_scores(uri: str, run_id: str, scores: Mapping[str, float]) -> None:
    """Logs final numbers (`score/linear/digits/pretrained`); those the run already has are not sent again."""
    with _clear_errors(uri, "logging scores"):
        from mlflow.entities import Metric

        client = _client(uri)
        known = client.get_run(run_id).data.metrics
        new = {k: v for k, v in scores.items() if math.isfinite(v) and known.get(_key(k)) != v}
        for batch in chunks([Metric(_key(k), v, _now_ms(), 0) for k, v in new.items()], METRICS_PER_CALL):
            client.log_batch(run_id, metrics=batch)


def log_text(uri: str, run_id: str, text: str, name: str) -> None:
    """Keeps a text as the artifact `name`."""
    _log_artifact(uri, run_id, text.encode(), name)


def log_figure(uri: str, run_id: str, png: bytes, name: str) -> None:
    """Keeps a picture as the artifact `name` (`figures/curve.png`)."""
    _log_artifact(uri, run_id, png, name)


def log_file(uri: str, run_id: str, path: Path, *, folder: str | None = None) -> None:
    """Keeps a file under its own name, in `folder` of the run's artifacts. Large files stay in the store: log their address."""
    with _clear_errors(uri, f"keeping {path}"):
        _client(uri).log_artifact(run_id, str(path), artifact_path=folder)


def _log_artifact(uri: str, run_id: str, content: bytes, name: str) -> None:
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / base
        path.write_bytes(content)
        log_file(uri, run_id, path, folder=folder or None)


# ---------------------------------------------------------------------------------------------------------------------
# Pure helpers

_SECRET_KEY = re.compile(r"password|passwd|secret|token|accesskey|apikey|credential")
_USERINFO = re.compile(r"(?<=://)[^/\s?#]*@")
_SECRET_QUERY = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|access_?key|signature|credential)[^=&\s]*=)[^&\s]+", re.I
)
HIDDEN = "***"


def redact(value: Any, *, key: str = "") -> Any:
    """A copy of a config in which secrets read `***`: texts under telling keys, and user:password in addresses.

    Numbers stay (`num_tokens: 196` is no secret), and so does an empty text, which says "not set"."""
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): redact(v, key=f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key=key) for item in value]
    if value is None or isinstance(value, (bool, int, float)) or value == "":
        return value
    secret = _SECRET_KEY.search(re.sub(r"[_\-\s]", "", key.lower()))
    return HIDDEN if secret else redact_text(str(value))


def redact_text(text: str) -> str:
    """A text in which addresses have lost user, password and signed query values."""
    return _SECRET_QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))


def flatten(config: Any, *, prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": [1, {"c": None}]}}` -> `{"a.b.0": "1", "a.b.1.c": "null"}`; lists without mappings stay one value."""
    if isinstance(config, Mapping):
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, (list, tuple)) and any(isinstance(item, Mapping) for item in config):
        items = [(str(index), value) for index, value in enumerate(config)]
    else:
        return {prefix: config if isinstance(config, str) else json.dumps(config, default=str)}
    flat: dict[str, str] = {}
    for key, value in items:
        flat |= flatten(value, prefix=f"{prefix}.{key}" if prefix else key)
    return flat


def short_digest(digest: str) -> str:
    """What MLflow's 36 characters can hold of a digest: all of a short one, the first 32 hex digits of a SHA-256."""
    return digest if len(digest) <= DIGEST_MAX_CHARS else digest.removeprefix("sha256:")[:32]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _key(name: str) -> str:
    """A name that MLflow accepts for a metric, parameter or tag."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:200]


def _tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {_key(key): redact_text(str(value))[:TAG_MAX_CHARS] for key, value in tags.items()}


def _log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for batch in chunks([RunTag(key, value) for key, value in _tags(tags).items()], PARAMS_PER_CALL):
        client.log_batch(run_id, tags=batch)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _client(uri: str) -> Any:
    """MLflow's client for one address; sets nothing global but the defaults of its environment variables."""
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it announces each retry of each call
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


_MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 takes four minutes to say that a server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; 120 by default
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # or a new database is announced table by table
}


def _words(error: BaseException) -> str:
    """What went wrong at the bottom: "Connection refused" rather than three layers of retries around it."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return redact_text(" ".join(str(error).split()))[:300]


@contextlib.contextmanager
def _clear_errors(uri: str, doing: str) -> Iterator[None]:
    """Turns whatever MLflow, SQLAlchemy or requests raise into one sentence that names the address and the way out."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as cause:
        words = _words(cause)
        hint = (
            "is the server up, and the address right?" if uri.startswith("http") else "is the path right and writable?"
        )
        if re.search(r"\b403\b", words):
            hint = "the server refuses this host name: start it with --allowed-hosts"
        raise TrackingError(f"tracking {redact_text(uri)}: {doing} failed ({words}); {hint}") from cause


# ---------------------------------------------------------------------------------------------------------------------
# Metrics while training


class Point(NamedTuple):
    """What was measured at one step. The time travels with it: MLflow stores a repeated call with equal times once."""

    step: int
    time_ms: int
    metrics: Mapping[str, float]


class Unsent(NamedTuple):
    """What a closed tracker could not deliver. The journal in the store has all of it; the next attempt's replay sends it."""

    points: tuple[Point, ...] = ()
    thinned: int = 0
    """Points given up because the queue was full for too long."""
    reason: str = ""


class Tracker(Protocol):
    """Where the training loop says what it measures; costs microseconds, never fails it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands over what was measured at `step`."""
        ...

    def close(self) -> Unsent:
        """Sends what is left, within a time bound; returns what could not be sent."""
        ...


class NullTracker:
    """For ranks above 0 and runs without tracking."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> Unsent:
        """Nothing to send, nothing unsent."""
        return Unsent()


class MlflowTracker:
    """Sends metrics from one background thread in few, large calls; the training loop only appends to a queue.

    A replay after a resume leaves no duplicates: the server is asked once up to which step it has each metric, and only later
    steps are sent. When it is away the queue fills; once full, every second point is given up, so that the curve gets
    coarser and goes on. NaN and infinity, which would spoil MLflow's charts, become the tag `mae.nonfinite.<metric>`."""

    def __init__(
        self,
        uri: str,
        run_id: str,
        *,
        every_s: float = 2.0,
        close_within_s: float = 30.0,
        queue_max_points: int = QUEUE_MAX_POINTS,
    ) -> None:
        self._uri, self._run_id = uri, run_id
        self._every_s, self._close_within_s, self._queue_max_points = every_s, close_within_s, queue_max_points
        self._lock = threading.Lock()
        self._queue: deque[Point] = deque()
        self._in_flight: list[Point] = []
        self._nonfinite: dict[str, str] = {}
        self._sent_up_to: dict[str, int] | None = None
        self._thinned = 0
        self._failures = 0
        self._reason = ""
        self._deadline = math.inf
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="mlflow-writer", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """Calls that failed so far; each is tried again."""
        return self._failures

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues what was measured at `step`."""
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            for key in metrics.keys() - finite.keys():
                self._nonfinite[f"mae.nonfinite.{key}"] = f"{metrics[key]} at step {step}"
            if len(self._queue) >= self._queue_max_points:
                kept = list(self._queue)[::2]
                self._thinned += len(self._queue) - len(kept)
                self._queue = deque(kept)
            self._queue.append(Point(step, _now_ms(), finite))

    def close(self) -> Unsent:
        """Sends what is left for at most `close_within_s`; returns what could not be sent."""
        self._deadline = time.monotonic() + self._close_within_s
        self._closing.set()
        self._thread.join(self._close_within_s)
        with self._lock:
            return Unsent((*self._in_flight, *self._queue), self._thinned, self._reason)

    def _write(self) -> None:
        pause = self._every_s
        while not self._closing.wait(pause):
            pause = self._every_s if self._send_queued() else min(2 * pause, 15 * self._every_s)
        while not self._send_queued() and time.monotonic() + self._every_s < self._deadline:
            time.sleep(self._every_s)

    def _send_queued(self) -> bool:
        """Sends until the queue is empty; False when a call failed and what it held is back in the queue."""
        while time.monotonic() < self._deadline:
            self._take_batch()
            if not self._in_flight and not self._nonfinite:
                return True
            try:
                self._send(self._in_flight)
            except Exception as cause:  # noqa: BLE001 - whatever MLflow raises, training goes on
                self._note_failure(cause)
                with self._lock:
                    self._queue.extendleft(reversed(self._in_flight))
                    self._in_flight = []
                return False
            with self._lock:
                self._in_flight = []
        return False

    def _take_batch(self) -> None:
        """Moves points from the queue, up to 1000 metrics of them (a point with more than that goes alone)."""
        count = 0
        with self._lock:
            while self._queue and (not self._in_flight or count + len(self._queue[0].metrics) <= METRICS_PER_CALL):
                count += len(self._queue[0].metrics)
                self._in_flight.append(self._queue.popleft())

    def _send(self, points: Sequence[Point]) -> None:
        client = _client(self._uri)
        from mlflow.entities import Metric

        if self._sent_up_to is None:
            self._sent_up_to = _last_steps(client, self._run_id)
        floor = self._sent_up_to
        new = [
            Metric(_key(key), value, point.time_ms, point.step)
            for point in points
            for key, value in point.metrics.items()
            if point.step > floor.get(_key(key), -1)
        ]
        for batch in chunks(new, METRICS_PER_CALL):
            client.log_batch(self._run_id, metrics=batch, synchronous=True)
        tags = dict(self._nonfinite)
        _log_tags(client, self._run_id, tags)
        with self._lock:
            self._nonfinite = {key: text for key, text in self._nonfinite.items() if tags.get(key) != text}

    def _note_failure(self, cause: Exception) -> None:
        self._failures += 1
        self._reason = _words(cause)
        if self._failures == 1:
            log.warning(
                "tracking %s does not answer (%s); training goes on, metrics wait and are sent when it is back",
                redact_text(self._uri),
                self._reason,
            )


def _last_steps(client: Any, run_id: str) -> dict[str, int]:
    """For each metric of a run the highest step the server has: MLflow keeps that point as the metric's latest."""
    return {metric.key: metric.step for metric in client.get_run(run_id).data.to_proto().metrics}


def open_tracker(uri: str, run_id: str) -> Tracker:
    """The tracker for an attempt's address and run; both empty means no tracking."""
    return MlflowTracker(uri, run_id) if uri and run_id else NullTracker()


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it


def serve_command(uri: str, *, port: int) -> list[str]:
    """The server over a local tracking store, seen by this machine alone, its files beside the database."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri]
    database = _sqlite_file(uri)
    return command + (["--artifacts-destination", str(database.absolute().parent / "mlartifacts")] if database else [])


def serve(uri: str, *, port: int) -> None:
    """Shows a tracking store in the browser until Ctrl-C; one that is a server already is only named."""
    if uri.startswith(("http://", "https://")):
        sys.stderr.write(f"MLflow is served at {redact_text(uri)}\n")
        return
    check_tracking(uri)
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as cause:
            raise TrackingError(f"port {port} is taken on this machine ({cause}): choose another") from cause
    sys.stderr.write(f"MLflow over {redact_text(uri)}\nopen http://127.0.0.1:{port} in a few seconds; Ctrl-C ends it\n")
    sys.stderr.flush()
    environment = {**_MLFLOW_SETTINGS, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execve(sys.executable, serve_command(uri, port=port), environment)  # noqa: S606 - this process becomes the server
