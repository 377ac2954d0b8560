"""The files that start clusters are what their readers accept: Ray's cluster launcher, Docker, a shell. Kubernetes' have a file
of their own."""

import importlib.util
import json
import mmap
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "infra/ray/aws.yaml"
RAY_ENV = ROOT / "infra/ray/ray.env"
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
TEMPLATES = ROOT / "pipeline/cluster/kubernetes"


def ray_package() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


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


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by the name of their stage, in order; each begins with its FROM."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, arguments in instructions():
        if instruction == "FROM":
            found[arguments.split()[-1]] = []
        if found:
            found[list(found)[-1]].append((instruction, arguments))
    return found


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_runs_mae_as_the_user_of_the_pods_with_the_pinned_versions(target):
    cluster = yaml.safe_load((TEMPLATES / "cluster/raycluster.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    own, node = stages()[target], stages()["node"]
    assert own[0] == ("FROM", f"node AS {target}")
    assert own[-1] == ("USER", str(pod["securityContext"]["runAsUser"]))
    assert json.loads(dict(node)["ENTRYPOINT"]) == ["mae"]
    copied = [arguments.split() for instruction, arguments in node if instruction == "COPY"]
    pins = f"{copied[0][1]}{copied[0][0]}"
    assert f"PIP_CONSTRAINT={pins}" in dict(node)["ENV"]
    (install,) = (arguments for _, arguments in own if "pip install" in arguments)
    assert f"{copied[1][-1]}/*.whl" in install


def test_the_image_that_is_built_without_a_target_is_the_one_for_gpus_with_a_compiler_for_their_kernels():
    assert list(stages())[-1] == "cuda"
    assert any("gcc" in arguments for _, arguments in stages()["cuda"])


def test_images_are_named_after_the_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [DOCKERFILE, CLUSTER, ROOT / "docs/kubernetes.md", *TEMPLATES.rglob("*.yaml")]
    named = {tag for file in files for tag in re.findall(r"mae-pipeline:([\w.-]+)", file.read_text())}
    named |= set(
        re.findall(r"newTag: (\S+?)[},]", (ROOT / "infra/kuberay/overlays/cpu-small/kustomization.yaml").read_text())
    )
    assert named == {version, f"{version}-cpu"}


def test_the_base_image_has_a_python_that_the_project_supports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.search(r"^ARG BASE=python:(\d+\.\d+)-", DOCKERFILE.read_text(), re.MULTILINE)
    assert python is not None
    assert f"Programming Language :: Python :: {python[1]}" in project["classifiers"]


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
    """Every `mae ...` in these files, comments included: the words of the subcommand ("" for mae itself)."""
    pattern = re.compile(r"(?<![\w/-])mae(?:-pipeline:\S+)? ((?:[a-z]+(?![\w./-]) ?)+|--help)")
    found = {
        match.removesuffix("--help").strip()
        for file in (*(ROOT / "infra").rglob("*.yaml"), *TEMPLATES.rglob("*.yaml"), DOCKERFILE, RAY_ENV)
        for match in pattern.findall(file.read_text())
    }
    assert {"run", "job submit"} <= found
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_the_command_line_knows_the_command(command):
    call = [sys.executable, "-m", "jobs.cli", *command.split(), "--help"]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
