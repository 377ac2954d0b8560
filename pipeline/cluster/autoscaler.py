"""Nodes that an autoscaler may add: whether there is an autoscaler, and whether it starts the nodes that workers need.

Neither version of Ray's autoscaler tells which node types it may start. So it is asked for them: a placement group that does not
fit is demand to it, and its status says what it does about that. The demand ends with the group, or with the job that made it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def may_grow() -> bool:
    """Return whether an autoscaler may add nodes, so that what the cluster holds now says little about what it can hold."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    if is_autoscaler_v2():
        return True
    types = _report_of_version_1().get("node_type_mapping") or {}
    # without a configuration to take nodes from, the monitor invents a type per node and names it after the node
    return any(kind != f"node_{node}" for node, kind in types.items())


class RoomRequest:
    """Room for workers that the autoscaler has been asked for."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def granted(self, *, timeout_s: float) -> bool:
        """Return whether there is room, waiting for up to `timeout_s`. The workers' places are then taken until the block ends."""
        return bool(self._group.wait(timeout_s))

    def gpus_are_coming(self) -> bool | None:
        """Return whether the autoscaler starts nodes with GPUs; None if that is not known, now or yet."""
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        if is_autoscaler_v2():
            return _gpus_of_version_2()
        # It says nothing of demand that no node type meets; it only starts no node.
        return True if (_report_of_version_1().get("pending_resources") or {}).get("GPU") else None


@contextmanager
def room_asked_for(need: Mapping[str, float], *, workers: int) -> Iterator[RoomRequest]:
    """Ask for room for this many workers, each of which reserves `need`, in Ray's terms (CPU, GPU)."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group([dict(need)] * workers)
    try:
        yield RoomRequest(group)
    finally:
        remove_placement_group(group)


def _report_of_version_1() -> dict[str, Any]:
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
    return status.get("autoscaler_report") or {}


def _gpus_of_version_2() -> bool | None:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    # `ray.autoscaler.v2.sdk.get_cluster_status` leaves out what is infeasible
    state = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state
    bundles = (
        request.resources_bundle
        for gang in state.infeasible_gang_resource_requests
        for request in [*gang.requests, *(one for each in gang.bundle_selectors for one in each.resource_requests)]
    )
    if any("GPU" in bundle for bundle in bundles):
        return False
    return True if state.pending_instance_requests or state.pending_instances else None
