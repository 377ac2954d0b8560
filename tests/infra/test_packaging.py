"""What is shipped: the wheel holds the three packages and nothing else, and the pins hold every version still."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def dependencies(*lines: str) -> list[Requirement]:
    """Requirements of other projects; an extra of this one, named in another, is replaced by what it holds."""
    found = []
    for requirement in map(Requirement, lines):
        own = canonicalize_name(requirement.name) == PROJECT["name"]
        inner = [line for extra in sorted(requirement.extras) for line in EXTRAS[extra]] if own else []
        found += dependencies(*inner) if own else [requirement]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    # From a copy: setuptools writes beside the sources, and would pack what an earlier build left there.
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "mlruns", "mlflow.db")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "source"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    info = f"mae_pipeline-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {"mae_core", "pipeline", "jobs", info}
    # compared with the tree, so that a module without an __init__.py beside it, or data left undeclared, is noticed
    for package in ("mae_core", "pipeline", "jobs"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        data = {
            str(path.relative_to(ROOT))
            for kind in ("*.yaml", "*.html", "*.css")
            for path in (ROOT / package).rglob(kind)
        }
        assert {name for name in wheel.namelist() if name.startswith(f"{package}/")} == sources | data


def test_the_wheel_carries_the_licence_and_the_command(wheel):
    info = f"mae_pipeline-{PROJECT['version']}.dist-info"
    licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert "Apache License" in licence
    assert "Copyright 2026 The mae-pipeline authors" in licence
    assert "mae = jobs.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def pins() -> dict[str, str]:
    """Version by canonical name; every line that is no comment must be an exact pin."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([\w.-]+)==([\w.!+]+)(?:  # .+)?", line)
        assert pin is not None, f"constraints.txt: {line!r} is not an exact pin"
        found[canonicalize_name(pin[1])] = pin[2]
    return found


def test_constraints_hold_names_and_versions_without_addresses():
    assert not re.search(r"@|://|^-", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert not {"pip", "setuptools", "wheel", "mae-pipeline"} & pins().keys()


def test_every_dependency_of_the_project_is_pinned_within_its_range():
    pinned = pins()
    for dependency in dependencies(*PROJECT["dependencies"], *EXTRAS["dev"]):
        version = pinned.get(canonicalize_name(dependency.name))
        assert version is not None, f"constraints.txt pins no {dependency.name}: run `make constraints`"
        assert dependency.specifier.contains(version, prereleases=True), (
            f"{dependency}, but constraints.txt says {version}"
        )


def test_nothing_that_is_installed_for_the_project_floats():
    wanted = dependencies(*PROJECT["dependencies"], *EXTRAS["dev"])
    seen: set[tuple[str, str]] = set()
    while wanted:
        dependency = wanted.pop()
        name = canonicalize_name(dependency.name)
        for extra in ("", *sorted(dependency.extras)):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in importlib.metadata.distribution(name).requires or []:
                further = Requirement(line)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    wanted.append(further)
    assert {name for name, _ in seen} - pins().keys() - {"setuptools", "wheel", "pip"} == set()
