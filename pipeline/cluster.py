"""The one importer of ray outside training/on_ray.py: connect, run plain functions as tasks, progress, jobs.

Coordinating code reserves 0 CPUs, so that two training workers fit on two cores. In executor `in_process` nothing of
Ray is imported.
Errors: PipelineError when a cluster cannot be reached; a task's own PipelineError comes out as itself."""

import asyncio
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pipeline.errors import PipelineError

T = TypeVar("T")
R = TypeVar("R")

Executor = Literal["ray", "in_process"]
"""`ray`: stages, tasks and workers are Ray's. `in_process`: everything in this process, one worker, a debugger works."""


class Progress(Protocol):
    """Where a stage says how far it is; cheap, may be called often, never fails the stage."""

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        """`done` of `total` units; `fields` are shown beside the bar (loss=0.61, images_per_s=512)."""
        ...


WORKER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker as at the terminal
    # How long a group waits for room before Ray Train counts the nodes anew; it goes on counting one that has just died for 20 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "600",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
PASSED_ON = (
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
)
"""Names (no secrets among them: Ray shows a job's environment to whoever holds its token) copied from the driver to its workers.
Credentials come from each node's own standard chain; on one machine the workers inherit the driver's environment."""
STOP_WITHIN_S = "120"
"""Between SIGTERM and SIGKILL when a job is stopped: time for a checkpoint. Ray's own is 3."""
IN_FLIGHT = 64
"""Tasks handed to Ray at once."""


def connect(*, cpus: int | None = None) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts one on this machine's loopback with `cpus` CPUs (all by default)."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # a cluster of our own for this run: nobody else knows its token, which is in no file
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", _own_token()
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_usage_stats_enabled", "0")
    import ray

    if ray.is_initialized():
        return
    variables = dict(WORKER_ENVIRONMENT, **{name: os.environ[name] for name in PASSED_ON if name in os.environ})
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=200_000_000,
                _node_ip_address="127.0.0.1",
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError) as cause:
        where = address or "on this machine"
        raise PipelineError(f"Ray {where}: cannot connect ({cause}). Unset RAY_ADDRESS to run here") from cause


@cache
def _own_token() -> str:
    """One a process: Ray's client remembers the first, and would be refused by a second cluster with another."""
    return secrets.token_hex(32)


def node_count() -> int:
    """Living machines of the cluster that `connect` joined."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def gpus() -> tuple[float, frozenset[str]]:
    """How many the cluster that `connect` joined has, and what Ray calls them (H100, A100-40G)."""
    import ray

    there = ray.cluster_resources()
    kinds = (name.partition("accelerator_type:")[2] for name in there)
    return float(there.get("GPU", 0)), frozenset(kind for kind in kinds if kind)


def draining() -> set[str]:
    """Ids of nodes that are about to go: a spot notice, a deleted pod, SIGTERM to the node, the autoscaler."""
    from ray._private import state  # Ray says it nowhere else; Ray Train's own watcher asks here

    return set(state.state.get_draining_nodes())


def here_drains() -> bool:
    """Whether the node of this process is about to go."""
    import ray

    return ray.get_runtime_context().get_node_id() in draining()


def room(need: Mapping[str, float], *, of: Literal["all", "free"]) -> int:
    """How many workers that need so much (CPU, GPU) each fit on the nodes that stay, in all or in what is free."""
    from ray._private import state

    nodes = state.total_resources_per_node() if of == "all" else state.available_resources_per_node()
    going = draining()
    staying = (held for node, held in nodes.items() if node not in going)
    return sum(min(int(held.get(kind, 0.0) / amount + 1e-6) for kind, amount in need.items()) for held in staying)


def disconnect() -> None:
    """Leaves the cluster; one that `connect` started ends."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def own_error(error: BaseException) -> BaseException:
    """The error a task raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def map_tasks(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    executor: Executor,
    on_done: Callable[[int, R], None] | None = None,
) -> list[R]:
    """Calls `function` on every item, as Ray tasks of one CPU or one after the other here; results in the order of the items.

    `on_done(index, result)` is called in the caller's process as each one ends. A function must bear being run twice: Ray runs
    it again when a node dies. The first error ends the call and is raised as the function raised it."""
    results: dict[int, R] = {}
    for index, result in _completed(function, items, executor):
        results[index] = result
        if on_done is not None:
            on_done(index, result)
    return [results[index] for index in range(len(items))]


def _completed(function: Callable[[T], R], items: Sequence[T], executor: Executor) -> Iterator[tuple[int, R]]:
    if executor == "in_process":
        for index, item in enumerate(items):
            yield index, function(item)
        return
    import ray

    def call(item: T) -> R:  # ray.remote takes functions only, not partials
        return function(item)

    task = ray.remote(num_cpus=1, max_retries=3)(call)
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < IN_FLIGHT and (following := next(waiting, None)) is not None:
                running[task.remote(following[1])] = following[0]
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    yield running[reference], ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise own_error(error) from None
                del running[reference]
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


@dataclass
class Handle:
    """A function under way: ask `ready` now and then, take `result` once."""

    reference: Any

    def ready(self, *, timeout_s: float) -> bool:
        """Whether it has ended, waiting up to `timeout_s`."""
        import ray

        done, _ = ray.wait([self.reference], timeout=timeout_s)
        return bool(done)

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except ray.exceptions.RayError as error:  # killed, out of memory, its node lost: one line of what Ray says
            what = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise PipelineError(
                f"the process that coordinated the step died ({type(error).__name__}: {what}). Run the same command again"
            ) from None

    def cancel(self) -> None:
        """Cuts it off."""
        import ray

        ray.cancel(self.reference, force=True)


def submit(function: Callable[..., Any], *arguments: Any) -> Handle:
    """Starts a coordinating function on the driver's node, whose fate it shares; it reserves no CPU and is not run again by Ray."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=_beside_us())(function)
    return Handle(task.remote(*arguments))


def _beside_us() -> Any:
    """Placement on the node of this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class _Board:
    """The actor that holds the newest word of every step under way."""

    def __init__(self) -> None:
        self.words: dict[str, tuple[int, int, str, Mapping[str, float]]] = {}

    def put(self, step: str, word: tuple[int, int, str, Mapping[str, float]]) -> None:
        self.words[step] = word

    def take(self) -> dict[str, tuple[int, int, str, Mapping[str, float]]]:
        words, self.words = self.words, {}
        return words


class ProgressBoard:
    """Carries progress from wherever a stage runs to the terminal of the driver."""

    def __init__(self) -> None:
        import ray

        self.actor = ray.remote(num_cpus=0, scheduling_strategy=_beside_us())(_Board).remote()

    def writer(self, step_name: str) -> Progress:
        """What the stage of this step is handed."""
        return _BoardWriter(self.actor, step_name)

    def take(self) -> dict[str, tuple[int, int, str, Mapping[str, float]]]:
        """The words since the last call: step -> (done, total, unit, fields); none when the board does not answer."""
        import ray

        try:
            return dict(ray.get(self.actor.take.remote(), timeout=10))
        except ray.exceptions.RayError:
            return {}


class _BoardWriter:
    """A stage's end of the board; at most five words a second, the last one always."""

    def __init__(self, actor: Any, step_name: str) -> None:
        self.actor, self.step_name, self.sent_at = actor, step_name, 0.0

    def update(self, done: int, total: int, *, unit: str, **fields: float) -> None:
        now = time.monotonic()
        if now - self.sent_at >= 0.2 or done >= total:
            self.sent_at = now
            self.actor.put.remote(self.step_name, (done, total, unit, fields))


def submit_run(name: str, config_text: str, *, address: str) -> str:
    """Starts `mae run` of a checked configuration as a Ray job; returns its id. One that is under way is not started again."""
    stem = f"{name}-{hashlib.sha256(config_text.encode()).hexdigest()[:12]}"
    with _jobs(address) as client, tempfile.TemporaryDirectory(prefix="mae-submit-") as folder:
        earlier = [job for job in client.list_jobs() if (job.submission_id or "").startswith(f"{stem}-")]
        for job in earlier:
            if not job.status.is_terminal():
                return str(job.submission_id)
        (Path(folder) / "run.yaml").write_text(config_text)
        job = {
            "entrypoint": "mae run run.yaml --json || test $? -eq 4",  # 4: done, with a warning
            "submission_id": f"{stem}-{len(earlier) + 1}",
            "runtime_env": {"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WITHIN_S}},
            "metadata": {"run": name},
        }
        return _submitted(client, job, within_s=60.0)


def _submitted(client: Any, job: Mapping[str, Any], *, within_s: float) -> str:
    """A cluster that has only just begun has a dashboard before it can take jobs: asks again until it can."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def job_status(job: str, *, address: str) -> dict[str, str]:
    """Where a job stands."""
    with _jobs(address) as client:
        return _row(client.get_job_info(job))


def job_logs(job: str, *, address: str, until: Literal["now", "end"]) -> Iterator[str]:
    """A job's output, as it comes when followed."""
    with _jobs(address) as client:
        if until == "now":
            yield str(client.get_job_logs(job))
            return
        client.get_job_info(job)
        lines = client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        try:
            while True:
                yield str(loop.run_until_complete(anext(lines)))
        except StopAsyncIteration:
            return
        finally:
            loop.close()


def stop_job(job: str, *, address: str) -> dict[str, str]:
    """Asks a job to stop and waits until it has."""
    with _jobs(address) as client:
        client.stop_job(job)
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(0.5)
        return _row(info)


def list_runs(*, address: str) -> list[dict[str, str]]:
    """All jobs the cluster remembers."""
    with _jobs(address) as client:
        return [_row(job) for job in client.list_jobs()]


def _row(job: Any) -> dict[str, str]:
    first, _, _ = str(job.message or "").partition("\n")  # what follows is the end of the log
    return {"job": str(job.submission_id), "status": str(job.status.value), "message": first}


@contextmanager
def _jobs(address: str) -> Iterator[Any]:
    """A client of the cluster's job API; what it refuses is one clear line."""
    import aiohttp
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as cause:
        raise PipelineError(
            f"{address}: the cluster refuses the token: does RAY_AUTH_TOKEN hold the cluster's token, and is RAY_AUTH_MODE=token?"
        ) from cause
    except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as cause:
        lines = str(cause).strip().splitlines()
        first = (lines[0] if lines else type(cause).__name__).rstrip(".")
        unknown = "does not exist" in str(cause)
        hint = (
            "`mae job list` names those there are" if unknown else "Is this the dashboard's address (http://head:8265)?"
        )
        raise PipelineError(f"{address}: {first}. {hint}") from cause
