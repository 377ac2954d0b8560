"""What a run may take of a cluster: GPUs, decode workers, steps side by side. The clusters are made up."""

import pytest

from pipeline import cluster
from pipeline.cluster import sharing
from pipeline.cluster.resources import Resources

GIB = 2**30


def made_up(monkeypatch, *nodes):
    """Pretend to be connected to a cluster of these nodes, none of which drains."""
    held = {str(number): {kind: float(amount) for kind, amount in node.items()} for number, node in enumerate(nodes)}
    monkeypatch.setattr("ray._private.state.total_resources_per_node", lambda: held)
    monkeypatch.setattr("pipeline.cluster.connection.draining_nodes", set)
    monkeypatch.setattr(sharing, "gpu_inventory", lambda: (sum(n.get("GPU", 0.0) for n in held.values()), frozenset()))


@pytest.mark.parametrize(
    ("node", "use_gpu", "decode_workers"), [({"CPU": 64, "GPU": 4}, True, 15), ({"CPU": 64}, False, 0)]
)
def test_what_auto_means_is_decided_once(monkeypatch, node, use_gpu, decode_workers):
    made_up(monkeypatch, node)
    decided = cluster.hardware_decided(Resources(workers=4))
    assert (decided.use_gpu, decided.decode_workers) == (use_gpu, decode_workers)
    made_up(monkeypatch, {"CPU": 2})  # the GPUs are taken away
    assert cluster.hardware_decided(decided) == decided


def test_the_cpus_of_a_gpu_are_those_of_the_node_where_each_worker_finds_fewest(monkeypatch):
    made_up(monkeypatch, {"CPU": 64, "GPU": 8}, {"CPU": 96, "GPU": 8}, {"CPU": 4})
    assert [cluster.cpus_per_gpu(workers=workers) for workers in (1, 4, 8, 16)] == [64, 16, 8, 8]
    made_up(monkeypatch)
    assert cluster.cpus_per_gpu(workers=1) == 0


def test_an_evaluation_takes_one_worker_on_cpus_and_all_on_gpus_unless_told():
    assert Resources(workers=8).for_evaluation(on_gpus=False).workers == 1
    assert Resources(workers=8).for_evaluation(on_gpus=True).workers == 8
    assert Resources(workers=(2, 8)).for_evaluation(on_gpus=True).workers == (2, 8)
    for on_gpus in (True, False):
        assert Resources(workers=8, evaluation_workers=2).for_evaluation(on_gpus=on_gpus).workers == 2


@pytest.mark.parametrize(
    ("resources", "host_bytes", "fit"),
    [
        ({}, 0, 10),  # CPUs: 4 + 6
        ({"cpus_per_worker": 4}, 0, 2),  # a worker never spans nodes
        ({"evaluation_workers": 2}, 0, 5),
        ({"evaluation_workers": (1, 3)}, 0, 3),
        ({}, 3 * GIB, 5),  # memory: (8 + 14) GiB, where each takes one more for its processes
        ({}, 100 * GIB, 1),  # what fits nowhere is tried alone
        ({"cpus_per_worker": 0.1}, 0, 16),  # at most
        ({"use_gpu": True, "evaluation_workers": 1}, 0, 2),
    ],
)
def test_as_many_steps_at_once_as_the_nodes_have_room_for(monkeypatch, resources, host_bytes, fit):
    made_up(monkeypatch, {"CPU": 4, "memory": 8 * GIB, "GPU": 2}, {"CPU": 6, "memory": 14 * GIB})
    given = Resources(**{"use_gpu": False, **resources})
    each = given.for_evaluation(on_gpus=bool(given.use_gpu))
    assert cluster.steps_at_once(each, host_bytes=host_bytes) == fit
