"""What a run may take of the cluster that it has joined: GPUs or not, decode workers, and how many steps side by side."""

from pipeline.cluster.connection import cpus_per_gpu, gpu_inventory, worker_capacity
from pipeline.cluster.device import choose_device
from pipeline.cluster.resources import Resources

MOST_AT_ONCE = 16
"""Steps side by side, however large the cluster is: each has a process on the driver's node that coordinates it."""
PROCESSES_BYTES = 2**30
"""Memory of a step's two processes, the one that coordinates and the worker, before either holds a model."""


def hardware_decided(resources: Resources) -> Resources:
    """Return the resources with `use_gpu` and `decode_workers` decided. What is decided already stays."""
    use_gpu = choose_device(resources, gpus=int(gpu_inventory()[0])).use_gpu
    cpus = cpus_per_gpu(workers=resources.worker_range[1]) if use_gpu else 0.0
    return resources.model_copy(update={"use_gpu": use_gpu}).decided_for(cpus)


def steps_at_once(resources: Resources, *, host_bytes: int) -> int:
    """Return how many steps with these resources the cluster has room for; at least 1.

    `host_bytes`: memory that each worker takes of its node, besides that of its processes."""
    need = resources.per_worker | {"memory": float(PROCESSES_BYTES + host_bytes)}
    _, workers = resources.worker_range
    return max(1, min(MOST_AT_ONCE, worker_capacity(need, of="all") // workers))
