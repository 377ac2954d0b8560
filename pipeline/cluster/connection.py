"""The one importer of ray outside training/on_ray.py: connect, run plain functions as tasks, progress, jobs.

Coordinating code reserves 0 CPUs, so that two training workers fit on two cores. In executor `in_process` nothing of
Ray is imported.
Errors: PipelineError when a cluster cannot be reached; a task's own PipelineError comes out as itself."""

import os
import secrets
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pipeline.errors import PipelineError

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


def beside_us() -> Any:
    """Placement on the node of this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
