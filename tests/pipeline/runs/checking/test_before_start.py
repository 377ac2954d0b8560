"""Checks before a run: what a cluster has room for."""

from typing import Any

import pytest
from run_kit import document

from pipeline import cluster
from pipeline.cluster import device
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.runs.checking import before_start
from pipeline.runs.checking.before_start import check_before_start, check_fits_cluster
from pipeline.runs.workflow import build
from pipeline.storage import open_store


def on_a_cluster(monkeypatch: Any, *, cpus: int, gpus: int, grows: bool) -> None:
    """Pretend to be connected to a cluster of one node."""
    held = {"CPU": cpus, "GPU": gpus}
    monkeypatch.setattr(cluster, "gpu_inventory", lambda: (float(gpus), frozenset()))
    monkeypatch.setattr(cluster, "node_count", lambda: 1)
    monkeypatch.setattr(cluster, "may_grow", lambda: grows)
    monkeypatch.setattr(cluster, "worker_capacity", lambda need, of: min(int(held[k] / n) for k, n in need.items()))


def configured(tmp_path: Any, **resources: Any) -> Any:
    content = document(tmp_path / "store", tmp_path / "images")
    content["resources"] |= resources
    return RunConfig.model_validate(content)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"workers": 64}, "room for 3 of 64, each of which reserves 1 CPU[.]"),
        ({"workers": (4, 8)}, "resources.workers=4: "),
        ({"cpus_per_worker": 4}, "room for 0 of 1, each of which reserves 4 CPU and 1 GPU"),
        (
            {"workers": 2, "use_gpu": True},
            "use_gpu=true needs 2 GPUs for resources.workers=2, but this cluster has 1 GPU[.] .* Nothing was claimed",
        ),
    ],
)
def test_a_cluster_without_room_is_refused_before_anything_is_claimed(tmp_path, monkeypatch, resources, words):
    config = configured(tmp_path, **resources)
    on_a_cluster(monkeypatch, cpus=3, gpus=1, grows=False)
    with pytest.raises(ConfigError, match=words):
        check_fits_cluster(config, build(config))
    check_fits_cluster(config, [])  # all is finished
    on_a_cluster(monkeypatch, cpus=3, gpus=1, grows=True)
    check_fits_cluster(config, build(config))


def test_gpus_that_this_machine_lacks_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(device, "local_gpu_count", lambda: 0)
    monkeypatch.setattr(before_start, "source_problem", lambda step: None)
    config = configured(tmp_path, use_gpu=True)
    steps, store = build(config), open_store(config.store)
    for executor in ("in_process", "ray"):
        with pytest.raises(ConfigError, match=r"resources.use_gpu=true needs 1 GPU .* but this machine has no GPU"):
            check_before_start(config, steps, store, executor)
    check_before_start(configured(tmp_path, use_gpu=False), steps, store, "in_process")


def test_a_cluster_with_room_for_the_fewest_workers_is_taken(tmp_path, monkeypatch):
    on_a_cluster(monkeypatch, cpus=3, gpus=0, grows=False)
    config = configured(tmp_path, workers=(2, 64))
    check_fits_cluster(config, build(config))
