"""The connection to a Ray cluster: the one that RAY_ADDRESS names, or one on this machine; its nodes, GPUs and free capacity.

Errors: PipelineError if the cluster cannot be reached."""

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

from pipeline.errors import PipelineError

WORKER_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker as at the terminal
    # How long a worker group waits for resources before Ray Train counts the nodes again. Ray still counts a node that has just
    # died for about 20 s, so a shorter wait would fail on it repeatedly.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "600",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_ANSWER_S = 15.0
_HTTP2_SETTINGS = b"\x04"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0" * 5
"""What a client of gRPC says first: the preface, and a frame of no settings. The server answers with its own settings."""
FORWARDED_VARIABLES = (
    "OMP_NUM_THREADS",
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
)
"""Variables copied from the driver to its workers. Never a secret: Ray shows a job's environment to anyone who holds its token.
Credentials come from each node's own standard chain; on a single machine the workers inherit the driver's environment."""


def connect(*, cpus: int | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine's loopback with `cpus` CPUs (all by default)."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # a private cluster: its token exists only in this process and its children, never in a file
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", _own_token()
    # under `uv run` Ray would otherwise build the project's environment again for every worker
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # a process that reserves no GPU keeps CUDA_VISIBLE_DEVICES as it is; older Rays would empty it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_usage_stats_enabled", "0")
    # a worker process has torch imported, and between two steps it is idle for seconds; Ray would end it after one
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    import ray

    if ray.is_initialized():
        return
    _read_authentication_again()
    if address:
        _await_answer(address)
    variables = dict(
        WORKER_ENVIRONMENT, **{name: os.environ[name] for name in FORWARDED_VARIABLES if name in os.environ}
    )
    # workers' prints would otherwise come out between the lines of the display
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": variables}}
    try:
        with _sigterm_handler_kept(), _processes_in_sessions_of_their_own():
            if address:
                ray.init(address=address, **options)
            else:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    # Ray would take 30 % of the memory
                    object_store_memory=200_000_000,
                    _node_ip_address="127.0.0.1",
                    **options,
                )
    except (OSError, RuntimeError, ValueError) as cause:
        message = " ".join(str(cause).split())
        if address:
            raise PipelineError(
                f"Ray {address}: cannot connect ({message}). Unset RAY_ADDRESS to run on this machine"
            ) from cause
        raise PipelineError(f"Ray cannot start on this machine ({message}). {_way_out(cause)}") from cause


def _read_authentication_again() -> None:
    """Let Ray read RAY_AUTH_MODE and RAY_AUTH_TOKEN now. It reads them once, at its import, which may lie before `connect`."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _way_out(cause: Exception) -> str:
    """Return what to do when this machine's own Ray did not start. It keeps sockets and logs below RAY_TMPDIR, TMPDIR or /tmp."""
    if not isinstance(cause, OSError):
        return "`mae run --in-process` runs without Ray"
    names = [f"{name}={os.environ[name]}" for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)]
    kept = f"where {names[0]} says" if names else "in /tmp/ray, as neither RAY_TMPDIR nor TMPDIR is set"
    return f"It keeps its sockets {kept}. Set RAY_TMPDIR to a short path of your own, such as RAY_TMPDIR=/tmp/mae-{os.getuid()}"


def _await_answer(address: str) -> None:
    """Raise PipelineError if no gRPC server answers at host:port. Ray itself tries again for minutes, in C++, where Ctrl-C is not
    heard."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdecimal():
        return  # `auto`, `local`: Ray knows where to look
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}:  # a handshake would come first
                return
            connection.sendall(_HTTP2_GREETING)
            if connection.recv(9)[3:4] != _HTTP2_SETTINGS:
                raise OSError("what listens there is not Ray")
    # OverflowError: a port above 65535
    except (OSError, OverflowError) as cause:
        raise PipelineError(
            f"Ray {address}: no cluster answers there ({cause}). Start the cluster, correct RAY_ADDRESS, or unset it to run here"
        ) from cause


@contextmanager
def _processes_in_sessions_of_their_own() -> Iterator[None]:
    """Start Ray's processes where a signal to this process's group or session does not reach them.

    `timeout`, batch systems and closing terminals signal a whole group. Ray starts its processes in the driver's group, where they
    would die at once, while the driver still waits for the workers to save. Ray has no option for this, so the class it starts them
    with is replaced meanwhile. The kernel still kills them when this process dies (PR_SET_PDEATHSIG survives setsid). Where the
    kernel cannot (macOS), Ray's reaper kills the driver's group instead, so they have to stay in it."""
    from ray._private import services, utils

    ordinary = services.ConsolePopen
    if utils.detect_fate_sharing_support():
        services.ConsolePopen = partial(ordinary, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = ordinary


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, if it has one: `ray.init` replaces it twice, by handlers that exit."""
    from ray._private import utils

    handler, replace = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    if not callable(handler):
        yield
        return
    # the first one comes from Python, so it can be kept from being set
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = replace
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # the second one comes with Ray's C++ core, unknown to Python


@cache
def _own_token() -> str:
    """One token per process: Ray's client keeps using the first, which a second cluster with another token would refuse."""
    return secrets.token_hex(32)


def node_count() -> int:
    """Return the number of live nodes."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def gpu_inventory() -> tuple[float, frozenset[str]]:
    """Return the number of GPUs in the cluster, and Ray's names for their types (H100, A100-40G)."""
    import ray

    resources = ray.cluster_resources()
    types = (name.partition("accelerator_type:")[2] for name in resources)
    return float(resources.get("GPU", 0)), frozenset(name for name in types if name)


def draining_nodes() -> set[str]:
    """Return the ids of nodes that are about to go: spot notice, deleted pod, SIGTERM to the node, autoscaler."""
    from ray._private import state  # there is no public API; Ray Train's own watcher asks here, too

    return set(state.state.get_draining_nodes())


def this_node_is_draining() -> bool:
    """Return whether the node of this process is about to go."""
    import ray

    return ray.get_runtime_context().get_node_id() in draining_nodes()


def worker_capacity(need: Mapping[str, float], *, of: Literal["all", "free"]) -> int:
    """Return how many workers fit on the nodes that are not draining, in all their resources or in the free ones.

    `need` is what each worker reserves, in Ray's terms (CPU, GPU). A worker cannot span nodes, so they are counted one by one."""
    from ray._private import state

    nodes = state.total_resources_per_node() if of == "all" else state.available_resources_per_node()
    draining = draining_nodes()
    staying = (held for node, held in nodes.items() if node not in draining)
    # 1e-6: amounts are floats, and 0.3 / 0.1 is a little less than 3
    return sum(min(int(held.get(kind, 0.0) / amount + 1e-6) for kind, amount in need.items()) for held in staying)


def cpus_per_gpu(*, workers: int) -> float:
    """Return the CPUs that each of at most `workers` training workers finds on its node, where it finds fewest; 0 without GPUs."""
    from ray._private import state

    nodes = [held for held in state.total_resources_per_node().values() if held.get("GPU", 0.0) >= 1]
    return min((held.get("CPU", 0.0) / min(held["GPU"], workers) for held in nodes), default=0.0)


def disconnect() -> None:
    """Leave the cluster. One that `connect` started ends."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def on_this_node() -> Any:
    """Return the scheduling strategy that places a task or actor on the node of this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
