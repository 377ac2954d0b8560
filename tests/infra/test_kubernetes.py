"""Kubernetes: the templates, every overlay and what `mae job submit --kubernetes` prints, as KubeRay's API would read them.

KUBERAY_SCHEMAS names a folder with KubeRay's own CRDs, ray.io_rayclusters.yaml and ray.io_rayjobs.yaml (they come with the
operator: ray-operator/config/crd/bases). Overlays are built by kustomize, alone or in kubectl. Without these, the tests that
need them are skipped."""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from run_kit import ROOT

from pipeline.cluster.kubernetes import Pods, rendered
from pipeline.cluster.resources import Resources
from pipeline.config import load_config

KUBERAY = ROOT / "infra/kuberay"
TEMPLATES = ROOT / "pipeline/cluster/kubernetes"
SHAPES = ("cpu-small", "h100-8x8", "spot")
Build = Callable[[str], dict[str, dict[str, Any]]]


# --- what reads them -----------------------------------------------------------------------------------------------------


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as plain JSON schema that refuses what the API server would prune or refuse.

    An object takes the fields it lists, unless it says otherwise; `metadata` at the top is the API server's own.
    """
    schema = copy.deepcopy(schema)

    def close(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                close(item)
        if not isinstance(node, dict):
            return
        for value in node.values():
            close(value)
        if node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        if node.get("x-kubernetes-int-or-string"):
            node.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
        if node.get("nullable") and isinstance(node.get("type"), str):
            node["type"] = [node["type"], "null"]

    close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    """Schema by kind."""
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("KUBERAY_SCHEMAS is not set: name a folder with KubeRay's CRDs to check the manifests")
    found = {}
    for plural in ("rayclusters", "rayjobs"):
        crd = yaml.safe_load((Path(folder) / f"ray.io_{plural}.yaml").read_text())
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        found[crd["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return found


def complaints(document: Any, schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def kustomize() -> list[str]:
    """The command that builds a folder; empty where none is installed that knows components and replacements (4.2, 2021)."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            version = [command[0], "version", *(["--client"] if command[0] == "kubectl" else [])]
            said = subprocess.run(version, capture_output=True, text=True, check=False).stdout
            if re.search(r"v[5-9]\.\d", said):
                return command
    return []


@pytest.fixture(scope="module")
def build() -> Build:
    """Build a folder of infra/kuberay: the objects by kind and name."""
    command = kustomize()
    if not command:
        pytest.skip("neither kustomize 5 nor a kubectl with it is on the PATH")

    @cache
    def built(folder: str) -> dict[str, dict[str, Any]]:
        done = subprocess.run([*command, str(KUBERAY / folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        objects = list(yaml.safe_load_all(done.stdout))
        named = {f"{one['kind']}/{one['metadata']['name']}": one for one in objects}
        assert len(named) == len(objects)
        return named

    return built


def one_of(objects: Mapping[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (one for one in objects.values() if one["kind"] == kind)
    return found


def template(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((TEMPLATES / name).read_text())
    return found


def run_job(**changes: Any) -> dict[str, Any]:
    """The RayJob that the command would print."""
    resources = Resources(**{"workers": (8, 16), "use_gpu": True, **changes})
    document = {"name": "run", "store": "s3://b/mae", "resources": json.loads(resources.model_dump_json())}
    pods = Pods(image="registry/mae:1", workers_per_pod=8, queue="team", priority="mae-low")
    text = rendered("run", document, resources, pods=pods, settings={"AWS_DEFAULT_REGION": "eu-central-1"})
    return one_of({one["metadata"]["name"] + one["kind"]: one for one in yaml.safe_load_all(text)}, "RayJob")


# --- the schemas ----------------------------------------------------------------------------------------------------------


def test_the_template_and_what_the_command_prints_are_accepted_by_kuberays_schemas(schemas):
    assert complaints(template("cluster/raycluster.yaml"), schemas["RayCluster"]) == []
    assert complaints(run_job(), schemas["RayJob"]) == []
    assert complaints(run_job(use_gpu=False, workers=1), schemas["RayJob"]) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_overlay_builds_a_cluster_and_a_run_that_kuberays_schemas_accept(schemas, build, shape):
    assert complaints(one_of(build(f"overlays/{shape}"), "RayCluster"), schemas["RayCluster"]) == []
    assert complaints(one_of(build(f"jobs/{shape}"), "RayJob"), schemas["RayJob"]) == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("backoffLimit",), "two", "$.spec.backoffLimit: 'two' is not of type 'integer'"),
        (("rayClusterSpec", "authOptions", "mode"), "tokens", "is not one of ['disabled', 'token']"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "replica"), 4, "('replica' was unexpected)"),
        (("rayClusterSpec", "headGroupSpec", "template", "spec", "volume"), [], "('volume' was unexpected)"),
        (("rayClusterSpec", "headGroupSpec"), None, "'headGroupSpec' is a required property"),
    ],
)
def test_a_damaged_rayjob_is_refused(schemas, path, value, complaint):
    rayjob = run_job()
    target = rayjob["spec"]
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    assert any(complaint in line for line in complaints(rayjob, schemas["RayJob"]))


def test_the_network_policy_has_the_form_that_kuberay_knows_such_rules_by(schemas):
    # KubeRay's schema embeds Kubernetes' own NetworkPolicy rules; it is the one description of them at hand.
    policy = schemas["RayCluster"]["properties"]["spec"]["properties"]["networkPolicy"]["properties"]
    assert complaints(network_policy()["ingress"], policy["head"]["properties"]["ingressRules"]) == []


# --- pods -----------------------------------------------------------------------------------------------------------------


def network_policy() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERAY / "platform/network-policy.yaml").read_text())["spec"]
    return found


def pods_of(job: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a RayJob by their role."""
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    head = cluster["headGroupSpec"]["template"]
    return {"submitter": job["spec"]["submitterPodTemplate"], "head": head, "worker": workers["template"]}


def every_job(build: Build) -> Iterator[dict[str, Any]]:
    yield run_job()
    for shape in SHAPES:
        yield one_of(build(f"jobs/{shape}"), "RayJob")


def test_no_pod_has_more_rights_than_it_needs_or_a_secret_in_clear(build):
    for job in every_job(build):
        for name, pod in pods_of(job).items():
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"], name
            assert spec["automountServiceAccountToken"] is False, name
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
            (container,) = spec["containers"]
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "env" not in container, f"{name}: values come from ConfigMaps and Secrets"


def test_every_pod_has_limits_equal_to_its_requests_and_ray_pods_have_probes_shm_and_a_cache(build):
    for job in every_job(build):
        for name, pod in pods_of(job).items():
            (container,) = pod["spec"]["containers"]
            sizes = container["resources"]
            assert name == "submitter" or sizes["limits"] == sizes["requests"]
            assert {"cpu", "memory"} <= sizes["limits"].keys()
            if name != "submitter":
                assert container["readinessProbe"]["httpGet"] == container["livenessProbe"]["httpGet"]
                volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
                mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
                assert mounts.keys() == volumes.keys()
                assert mounts["shm"] == "/dev/shm"
                assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
                assert ("/cache" in mounts.values()) == (name == "worker")


def test_probes_ask_where_ray_answers_without_a_token():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for name, pod in pods_of(run_job()).items():
        if name != "submitter":
            asked = pod["spec"]["containers"][0]["livenessProbe"]["httpGet"]
            assert asked["path"] in PUBLIC_EXACT_PATHS
            assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_a_pod_is_given_longer_to_end_than_its_node_takes_to_drain(build):
    ray_env = (ROOT / "infra/ray/ray.env").read_text()
    drain = re.search(r"^RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=(\d+)$", ray_env, re.MULTILINE)
    assert drain is not None
    for job in every_job(build):
        for name, pod in pods_of(job).items():
            assert name == "submitter" or pod["spec"]["terminationGracePeriodSeconds"] > int(drain[1])


def test_what_pods_refer_to_is_built_with_them_or_made_by_the_commands_of_the_page(build):
    page = (ROOT / "docs/kubernetes.md").read_text()
    made = set(re.findall(r"kubectl create (?:configmap|secret generic) (\S+)", page))
    for shape in SHAPES:
        objects = build(f"jobs/{shape}")
        job = one_of(objects, "RayJob")
        known = made | {one["metadata"]["name"] for one in objects.values()}
        assert job["spec"]["rayClusterSpec"]["authOptions"]["secretName"] in made
        for pod in pods_of(job).values():
            spec = pod["spec"]
            assert spec.get("serviceAccountName", "mae") in known
            sources = [
                source
                for volume in spec.get("volumes", [])
                for source in (volume.get("secret"), volume.get("configMap"))
            ]
            sources += [next(iter(source.values())) for source in spec["containers"][0].get("envFrom", [])]
            named = {source.get("name") or source["secretName"] for source in sources if source}
            assert named <= known


def test_the_settings_of_ray_are_those_of_the_other_clusters(build):
    lines = [
        line for line in (ROOT / "infra/ray/ray.env").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert build("platform")["ConfigMap/mae-ray-env"]["data"] == dict(line.split("=", 1) for line in lines)


def test_the_network_policy_selects_the_pods_of_the_cluster_and_admits_its_submitter():
    policy, templates = network_policy(), pods_of(run_job())
    selected = policy["podSelector"]["matchLabels"]
    for name, pod in templates.items():
        assert (selected.items() <= pod["metadata"]["labels"].items()) == (name != "submitter"), name
    admitted = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert templates["submitter"]["metadata"]["labels"] in admitted


# --- clusters and runs of one shape ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_has_the_cluster_of_its_overlay_and_its_configuration_fits_it(build, shape, tmp_path):
    cluster, objects = one_of(build(f"overlays/{shape}"), "RayCluster"), build(f"jobs/{shape}")
    job = one_of(objects, "RayJob")
    assert "RayCluster/mae" not in objects
    spec = copy.deepcopy(job["spec"]["rayClusterSpec"])
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["volumes"].pop() == {"name": "config", "configMap": {"name": "mae-run"}}
    assert head["containers"][0]["volumeMounts"].pop()["mountPath"] == "/config"
    assert spec == cluster["spec"]
    assert job["metadata"]["labels"] == cluster["metadata"]["labels"]
    assert len({pod["spec"]["containers"][0]["image"] for pod in pods_of(job).values()}) == 1

    text = objects["ConfigMap/mae-run"]["data"]["run.yaml"]
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("BUCKET", "bucket"))
    resources = load_config(path).resources
    (group,) = spec["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    per_pod = int(limits.get("nvidia.com/gpu", 1))
    assert resources.worker_range == (group["minReplicas"] * per_pod, group["maxReplicas"] * per_pod)
    assert resources.use_gpu is ("nvidia.com/gpu" in limits)
    mounted = {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert resources.cache_directory in mounted
    assert resources.cache_max_bytes < cache_bytes(group["template"]["spec"]["volumes"])


def cache_bytes(volumes: list[dict[str, Any]]) -> int:
    (volume,) = (volume for volume in volumes if volume["name"] == "cache")
    claim = volume.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec", {})
    text = claim["resources"]["requests"]["storage"] if claim else volume["emptyDir"]["sizeLimit"]
    number, unit = re.fullmatch(r"(\d+)([GT]i)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 2**30, "Ti": 2**40}[unit]


@pytest.mark.parametrize("shape", SHAPES)
def test_queue_and_priority_are_objects_that_the_administrator_is_given(build, shape):
    given = build("kueue")
    labels = one_of(build(f"overlays/{shape}"), "RayCluster")["metadata"]["labels"]
    assert f"LocalQueue/{labels['kueue.x-k8s.io/queue-name']}" in given
    assert f"WorkloadPriorityClass/{labels['kueue.x-k8s.io/priority-class']}" in given
    queue = one_of(given, "ClusterQueue")
    assert one_of(given, "LocalQueue")["spec"]["clusterQueue"] == queue["metadata"]["name"]


def test_spot_runs_are_preempted_first_and_only_their_workers_are_on_spot_machines(build):
    given = build("kueue")
    values = {
        shape: given[f"WorkloadPriorityClass/{labels['kueue.x-k8s.io/priority-class']}"]["value"]
        for shape in SHAPES
        for labels in [one_of(build(f"overlays/{shape}"), "RayCluster")["metadata"]["labels"]]
    }
    assert values["spot"] < values["h100-8x8"]
    spec = one_of(build("overlays/spot"), "RayCluster")["spec"]
    (workers,) = spec["workerGroupSpecs"]
    kinds = [
        group["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"]
        for group in (spec["headGroupSpec"], workers)
    ]
    assert kinds == ["on-demand", "spot"]
    assert [group["labels"]["ray.io/market-type"] for group in (spec["headGroupSpec"], workers)] == kinds


def test_the_ray_of_the_manifest_is_the_ray_of_the_image():
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert template("cluster/raycluster.yaml")["spec"]["rayVersion"] == pin[1]


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0), (137, 137)])
def test_the_entrypoint_is_retried_only_where_a_retry_helps(tmp_path, code, ended):
    # 3: stopped, or fenced by another run, which must not be claimed back; 4: done with a warning
    (tmp_path / "mae").write_text(f'#!/bin/sh\ntest "$*" = "run /config/run.yaml" && exit {code}\n')
    (tmp_path / "mae").chmod(0o755)
    entrypoint = template("job/rayjob.yaml")["spec"]["entrypoint"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert subprocess.run(entrypoint, shell=True, env={"PATH": path}, check=False).returncode == ended
