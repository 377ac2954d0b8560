"""A run as Kubernetes objects: names, sizes that follow from `resources`, and no secret anywhere."""

import json
import re
from typing import Any

import pytest
import yaml

from pipeline.cluster.kubernetes import Pods, rendered
from pipeline.cluster.kubernetes.rendering import NAME_MAX_CHARS, object_name
from pipeline.cluster.resources import Resources

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def objects(
    pods: Pods | None = None, *, settings: dict[str, str] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    resources = Resources(**changes)
    document = {"name": "Run.1", "store": "s3://b/mae", "resources": json.loads(resources.model_dump_json())}
    text = rendered("Run.1", document, resources, pods=pods or Pods(image="r/mae:1"), settings=settings or {})
    assert "&id" not in text  # anchors, which people trip over
    return list(yaml.safe_load_all(text))


def worker_group(**changes: Any) -> dict[str, Any]:
    pods = changes.pop("pods", None)
    (group,) = objects(pods, **changes)[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def limits(group: dict[str, Any]) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


def size_of(group: dict[str, Any], volume: str) -> str:
    return next(v["emptyDir"]["sizeLimit"] for v in group["template"]["spec"]["volumes"] if v["name"] == volume)


@pytest.mark.parametrize(
    ("workers", "per_pod", "range_of_pods"),
    [(1, 1, (1, 1)), ((2, 5), 1, (2, 5)), ((8, 64), 8, (1, 8)), ((9, 10), 8, (2, 2))],
)
def test_pods_hold_the_range_of_workers(workers, per_pod, range_of_pods):
    group = worker_group(workers=workers, pods=Pods(image="r/mae:1", workers_per_pod=per_pod))
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (*range_of_pods, range_of_pods[1])
    assert limits(group)["nvidia.com/gpu"] == str(per_pod)


def test_a_gpu_worker_has_the_cpus_it_asks_for_or_a_gpus_share():
    assert limits(worker_group())["cpu"] == "12"
    assert limits(worker_group(cpus_per_worker=20))["cpu"] == "20"
    assert limits(worker_group(cpus_per_worker=2, decode_workers=6))["cpu"] == "8"


def test_a_cpu_worker_has_no_gpu_and_no_place_on_gpu_nodes():
    group = worker_group(use_gpu=False, cpus_per_worker=1.5)
    assert limits(group) == {"cpu": "1.5", "memory": "8Gi"}
    assert "tolerations" not in group["template"]["spec"]


def test_memory_shared_memory_and_cache_follow_from_what_is_asked_for():
    pods = Pods(image="r/mae:1", workers_per_pod=2, memory_gib=30)
    group = worker_group(pods=pods, cache_max_bytes=100 * 2**30)
    assert limits(group)["memory"] == "60Gi"
    assert (size_of(group, "shm"), size_of(group, "cache")) == ("20Gi", "120Gi")
    run = yaml.safe_load(objects()[0]["data"]["run.yaml"])
    mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
    assert run["resources"]["cache_directory"] in {mount["mountPath"] for mount in mounts}


def test_the_image_is_that_of_every_pod_and_the_queue_is_the_runs():
    *_, job = objects(Pods(image="r/mae:2", queue="team", priority="low"))
    assert set(re.findall(r"'image': '([^']+)'", str(job))) == {"r/mae:2"}
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/priority-class": "low"}
    assert objects()[-1]["metadata"]["labels"] == {}


def test_pods_read_the_runs_own_configuration_and_settings():
    config, settings, job = objects(settings={"AWS_DEFAULT_REGION": "eu-central-1"})
    assert settings["data"] == {"AWS_DEFAULT_REGION": "eu-central-1"}
    cluster = job["spec"]["rayClusterSpec"]
    head, worker = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    for pod in (head, worker):
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in pod["containers"][0]["envFrom"]


@pytest.mark.parametrize("name", ["mae", "Run.1", "2026_sweep", "x" * 64, "-", "a" * 37 + ".b"])
def test_a_name_is_one_that_kuberay_takes(name):
    made = object_name(name, {"store": "s3://b"})
    assert DNS_LABEL.fullmatch(made)
    assert len(made) <= NAME_MAX_CHARS


def test_only_what_a_run_computes_changes_its_name():
    run = {"store": "s3://b", "model": {"size": "base"}, "resources": {"workers": 1}, "tracking": {"uri": None}}
    assert object_name("mae", run) == object_name("mae", run | {"resources": {"workers": 9}, "tracking": {"uri": "x"}})
    assert object_name("mae", run) != object_name("mae", run | {"model": {"size": "huge"}})
