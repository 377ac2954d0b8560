"""A run as objects for `kubectl apply`: its configuration, its settings and a RayJob with a cluster of its own.

Pure: from values to YAML. The pods are those of cluster/raycluster.yaml and job/rayjob.yaml, sized by `resources`.
No secret comes in, and none goes out: pods refer to Secrets by name."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from pipeline.cluster.resources import Resources

NAME_MAX_CHARS = 47
"""KubeRay refuses longer names of RayJobs, which it extends for the cluster's."""
CACHE = "/cache"
"""Where the pods mount the volume for shards."""
_DIGEST_CHARS = 8
_GPU_WORKER = {"cpus": 12, "memory_gib": 96}
_CPU_WORKER_MEMORY_GIB = 8
"""What a worker gets unless it is said: of CPUs, a GPU's share of most cloud machines."""
_SHM_SHARE = 3
"""A pod's memory over the size of its /dev/shm, which is part of it: Ray's object store and decoded batches."""
_SETTINGS, _CONFIG = "mae-settings", "mae-run"
"""ConfigMaps that the templates name, and that each run brings under a name of its own."""


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the configuration does not say about the pods."""

    image: str
    workers_per_pod: int = 1
    memory_gib: int | None = None
    """For each worker. None: 96 beside a GPU, 8 without."""
    queue: str | None = None
    """Kueue's LocalQueue. None: the run is not queued."""
    priority: str | None = None
    """Kueue's WorkloadPriorityClass."""

    @property
    def labels(self) -> dict[str, str]:
        """The labels that Kueue reads."""
        found = {"kueue.x-k8s.io/queue-name": self.queue, "kueue.x-k8s.io/priority-class": self.priority}
        return {label: value for label, value in found.items() if value}


def rendered(
    name: str, document: Mapping[str, Any], resources: Resources, *, pods: Pods, settings: Mapping[str, str]
) -> str:
    """Return the YAML of a run: two ConfigMaps and a RayJob, all of one name.

    `document`: the whole configuration. `settings`: environment variables of the pods that are no secrets. The same configuration
    gives the same name, whatever its `resources` and `tracking`, so that applying it twice does not run it twice."""
    called = object_name(name, document)
    document = {**document, "resources": {**document["resources"], "cache_directory": CACHE}}
    job = _job(called, _cluster(called, resources, pods), pods)
    objects = [
        _config_map(called, {"run.yaml": yaml.safe_dump(document, sort_keys=False)}),
        _config_map(f"{called}-env", dict(settings)),
        job,
    ]
    return "---\n".join(yaml.dump(one, Dumper=_Plain, sort_keys=False) for one in objects)


def object_name(name: str, document: Mapping[str, Any]) -> str:
    """Return the run's name as Kubernetes takes it, with a digest of the configuration without `resources` and `tracking`."""
    kept = {key: value for key, value in document.items() if key not in ("resources", "tracking")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:_DIGEST_CHARS]
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    # A name begins with a letter, and a run's need not.
    plain = plain if re.match("[a-z]", plain) else f"mae-{plain}"
    return f"{plain[: NAME_MAX_CHARS - _DIGEST_CHARS - 1].rstrip('-')}-{digest}"


def _job(called: str, cluster: Mapping[str, Any], pods: Pods) -> dict[str, Any]:
    job = _template("job/rayjob.yaml")
    job["metadata"] = {"name": called, "labels": pods.labels}
    job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"] = pods.image
    job["spec"]["rayClusterSpec"] = cluster
    return job


def _cluster(called: str, resources: Resources, pods: Pods) -> dict[str, Any]:
    spec: dict[str, Any] = _template("cluster/raycluster.yaml")["spec"]
    head = spec["headGroupSpec"]["template"]["spec"]
    head["volumes"].append({"name": "config", "configMap": {"name": called}})
    head["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": "/config", "readOnly": True})
    (group,) = spec["workerGroupSpecs"]
    least, most = (math.ceil(workers / pods.workers_per_pod) for workers in resources.worker_range)
    group |= {"replicas": most, "minReplicas": least, "maxReplicas": most}
    _size(group["template"]["spec"], resources, pods)
    for template in (head, group["template"]["spec"]):
        container = template["containers"][0]
        container["image"] = pods.image
        container["envFrom"] = [
            {"configMapRef": {"name": f"{called}-env"}} if _SETTINGS in str(source) else source
            for source in container["envFrom"]
        ]
    return spec


def _size(pod: dict[str, Any], resources: Resources, pods: Pods) -> None:
    """Give a worker's pod what `resources` asks for. `auto` for a GPU means one: pods have what they ask for."""
    on_gpus, workers = resources.use_gpu is not False, pods.workers_per_pod
    cpus = resources.cpus_per_worker + resources.decode_processes
    memory = pods.memory_gib or _CPU_WORKER_MEMORY_GIB
    if on_gpus:
        memory = pods.memory_gib or _GPU_WORKER["memory_gib"]
        cpus = max(cpus, _GPU_WORKER["cpus"]) if resources.decode_workers == "auto" else cpus
    else:
        del pod["tolerations"]
    share = {"cpu": f"{cpus * workers:g}", "memory": f"{memory * workers}Gi"}
    share |= {"nvidia.com/gpu": str(workers)} if on_gpus else {}
    pod["containers"][0]["resources"] = {"requests": share, "limits": dict(share)}
    sizes = {
        "shm": math.ceil(memory * workers / _SHM_SHARE),
        "cache": math.ceil(
            1.2 * resources.cache_max_bytes / 2**30
        ),  # a shard may be fetched before an old one is deleted
    }
    for volume in pod["volumes"]:
        if volume["name"] in sizes:
            volume["emptyDir"]["sizeLimit"] = f"{sizes[volume['name']]}Gi"


def _config_map(name: str, data: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def _template(path: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(files(__package__).joinpath(path).read_text())
    return found


class _Plain(yaml.SafeDumper):
    """Writes equal parts out, without anchors, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: parts that the templates share are written twice."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Plain.add_representer(str, _text)
