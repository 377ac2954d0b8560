"""The files that start clusters are what their readers accept: KubeRay's API, Ray's cluster launcher, Docker, a shell.

The RayJob is checked against KubeRay's own schema where KUBERAY_SCHEMAS names a folder that holds ray.io_rayjobs.yaml (it
comes with the operator: ray-operator/config/crd/bases).
"""

import copy
import importlib.util
import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAYJOB = ROOT / "infra/kuberay/rayjob.yaml"
CLUSTER = ROOT / "infra/ray/cluster.yaml"
RAY_ENV = ROOT / "infra/ray/ray.env"
DOCKERFILE = ROOT / "infra/docker/Dockerfile"


def documents() -> dict[str, dict[str, Any]]:
    """The objects of rayjob.yaml by kind: one of each."""
    found = list(yaml.safe_load_all(RAYJOB.read_text()))
    by_kind = {document["kind"]: document for document in found}
    assert len(by_kind) == len(found)
    return by_kind


def ray_package() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# --- KubeRay -------------------------------------------------------------------------------------------------------------


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
def rayjob_schema() -> dict[str, Any]:
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("KUBERAY_SCHEMAS is not set: name a folder with KubeRay's ray.io_rayjobs.yaml to check the RayJob")
    crd = yaml.safe_load((Path(folder) / "ray.io_rayjobs.yaml").read_text())
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def complaints(document: Any, schema: dict[str, Any]) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


def test_the_rayjob_is_accepted_by_kuberays_schema(rayjob_schema):
    assert complaints(documents()["RayJob"], rayjob_schema) == []


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
def test_a_damaged_rayjob_is_refused(rayjob_schema, path, value, complaint):
    rayjob = documents()["RayJob"]
    target = rayjob["spec"]
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    assert any(complaint in line for line in complaints(rayjob, rayjob_schema))


def test_the_network_policy_has_the_form_that_kuberay_knows_such_rules_by(rayjob_schema):
    # KubeRay's schema embeds Kubernetes' own NetworkPolicy rules; it is the one description of them at hand.
    cluster = rayjob_schema["properties"]["spec"]["properties"]["rayClusterSpec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"]
    assert complaints(documents()["NetworkPolicy"]["spec"]["ingress"], rules) == []


def pod_templates() -> dict[str, dict[str, Any]]:
    spec = documents()["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    return {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }


def test_no_pod_has_more_rights_than_it_needs_or_a_secret_in_clear():
    for name, template in pod_templates().items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert "privileged" not in container["securityContext"], name
            assert "env" not in container, f"{name}: values come from the ConfigMap and the Secret"


def test_what_the_pods_refer_to_is_in_the_file_or_made_by_the_commands_at_its_top():
    by_kind = documents()
    header = RAYJOB.read_text().split("apiVersion", maxsplit=1)[0]
    made = set(re.findall(r"kubectl create (?:configmap|secret generic) (\S+)", header)) | {"mae-run"}
    assert by_kind["ConfigMap"]["metadata"]["name"] == "mae-run"
    assert by_kind["RayJob"]["spec"]["rayClusterSpec"]["authOptions"]["secretName"] in made
    for template in pod_templates().values():
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        assert spec.get("serviceAccountName", "mae") == by_kind["ServiceAccount"]["metadata"]["name"]
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes.keys()
            assert {next(iter(source.values()))["name"] for source in container.get("envFrom", [])} <= made
        assert all(volume["configMap"]["name"] in made for volume in volumes.values() if "configMap" in volume)


def test_the_network_policy_selects_the_pods_of_the_cluster_and_admits_its_submitter():
    policy, templates = documents()["NetworkPolicy"]["spec"], pod_templates()
    selected = policy["podSelector"]["matchLabels"]
    for name, template in templates.items():
        assert (selected.items() <= template["metadata"]["labels"].items()) == (name != "submitter"), name
    admitted = [peer["podSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"]]
    assert templates["submitter"]["metadata"]["labels"] in admitted


def test_the_ray_of_the_manifest_is_the_ray_of_the_image():
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert documents()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pin[1]


# --- ray up --------------------------------------------------------------------------------------------------------------


def cluster_complaints(cluster: dict[str, Any]) -> list[str]:
    schema = json.loads((ray_package() / "autoscaler/ray-schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(cluster)]


def test_the_cluster_file_is_accepted_by_rays_schema():
    cluster = yaml.safe_load(CLUSTER.read_text())
    assert cluster_complaints(cluster) == []
    node_types = cluster["available_node_types"]
    assert cluster["head_node_type"] in node_types
    assert sum(kind.get("min_workers", 0) for kind in node_types.values()) <= cluster["max_workers"]


def test_a_damaged_cluster_file_is_refused():
    cluster = yaml.safe_load(CLUSTER.read_text())
    assert cluster_complaints({**cluster, "max_workers": "4"}) == ["'4' is not of type 'integer'"]
    assert "'max_worker' was unexpected" in cluster_complaints({**cluster, "max_worker": 4})[0]


def test_the_cluster_file_mounts_files_that_exist_and_starts_ray_with_the_shared_settings():
    cluster = yaml.safe_load(CLUSTER.read_text())
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert local == [str(RAY_ENV.relative_to(ROOT))]
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for role in ("head", "worker"):
        (start,) = (line for line in cluster[f"{role}_start_ray_commands"] if "ray start" in line)
        assert ". ~/ray.env" in start
        subprocess.run(["bash", "-n", "-c", start], check=True)
        assert ("--dashboard-host=127.0.0.1" in start) == (role == "head")


# --- ray.env, used by both ----------------------------------------------------------------------------------------------------


def ray_env() -> dict[str, str]:
    lines = [line for line in RAY_ENV.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", maxsplit=1) for line in lines)


def test_a_shell_reads_the_same_settings_as_kubectl():
    script = f"set -a; . '{RAY_ENV}'; exec '{sys.executable}' -c 'import os, json; print(json.dumps(dict(os.environ)))'"
    read = subprocess.run(["bash", "-c", script], check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    assert ray_env().items() <= json.loads(read.stdout).items()


def test_a_pod_is_given_longer_to_end_than_its_node_takes_to_drain():
    seconds = float(ray_env()["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    for name, template in pod_templates().items():
        assert name == "submitter" or template["spec"]["terminationGracePeriodSeconds"] > seconds


def test_ray_knows_every_setting():
    # Ray ignores a variable that it does not know, so a slip of the pen would quietly bring its defaults back. Core settings
    # are read by the C++ part under their name without RAY_, the others by Python under the full name.
    core = [name for name in ray_env() if re.fullmatch(r"RAY_[a-z_]+", name)]
    gcs_server = ray_package() / "core/src/ray/gcs/gcs_server"
    with gcs_server.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        assert [name for name in core if binary.find(name.removeprefix("RAY_").encode()) < 0] == []
        assert binary.find(b"health_check_perod_ms") < 0
    others = set(ray_env()) - set(core)
    sources = [
        ray_package() / "dashboard/modules/job/job_supervisor.py",
        ray_package() / "_private/authentication/authentication_token_setup.py",
        ray_package() / "_private/ray_constants.py",
        ray_package() / "_common/usage/usage_constants.py",
    ]
    text = "".join(source.read_text() for source in sources)
    assert {name for name in others if f'"{name}"' not in text} == set()


# --- Docker ------------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order, comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_image_starts_mae_as_an_ordinary_user():
    last = dict(instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["mae"]
    assert last["USER"] == str(pod_templates()["head"]["spec"]["securityContext"]["runAsUser"])


def test_the_image_copies_what_exists_and_the_ignore_file_lets_in():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for instruction, arguments in instructions()
        if instruction == "COPY" and "--from=" not in arguments
        for source in arguments.split()[:-1]
    }
    assert copied == let_in
    assert [source for source in copied if not (ROOT / source).exists()] == []


# --- the commands that all of them name ------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every `mae ...` in the three files, comments included: the words of the subcommand ("" for mae itself)."""
    pattern = re.compile(r"(?<![\w/-])mae(?:-pipeline:\S+)? ((?:[a-z]+(?![\w./-]) ?)+|--help)")
    found = {
        match.removesuffix("--help").strip()
        for file in (RAYJOB, CLUSTER, DOCKERFILE, RAY_ENV)
        for match in pattern.findall(file.read_text())
    }
    assert {"run", "job submit"} <= found
    return sorted(found)


def test_a_run_is_started_by_the_same_command_everywhere():
    assert "mae run /config/run.yaml" in documents()["RayJob"]["spec"]["entrypoint"]
    assert "run.yaml" in documents()["ConfigMap"]["data"]


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0), (137, 137)])
def test_the_entrypoint_is_retried_only_where_a_retry_helps(tmp_path, code, ended):
    # 3: stopped, or fenced by another run, which must not be claimed back; 4: done with a warning
    (tmp_path / "mae").write_text(f'#!/bin/sh\ntest "$*" = "run /config/run.yaml" && exit {code}\n')
    (tmp_path / "mae").chmod(0o755)
    entrypoint = documents()["RayJob"]["spec"]["entrypoint"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert subprocess.run(entrypoint, shell=True, env={"PATH": path}, check=False).returncode == ended


@pytest.mark.parametrize("command", commands())
def test_the_command_line_knows_the_command(command):
    call = [sys.executable, "-m", "jobs.cli", *command.split(), "--help"]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
