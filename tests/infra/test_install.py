"""infra/install.py: uv finds packages where pip's settings say, and pip installs what uv does not."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from infra.install import pip_settings, reason, uv_environment, uv_options

ROOT = Path(__file__).parents[2]
BEST_MATCH = {"UV_INDEX_STRATEGY": "unsafe-best-match"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An environment in which pip has no settings, and knows of nothing but what a test tells it."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return monkeypatch


def pip_config_list() -> str:
    return subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout


def test_settings_are_read_as_pip_install_reads_them(machine, tmp_path):
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://global/simple\nextra-index-url =\n  https://one/simple\n  https://two/simple\n"
        "timeout = 5\ncert = /global.pem\n[install]\ntimeout = 6\ncert = /install.pem\n[download]\ntimeout = 7\n"
    )
    machine.setenv("PIP_CONFIG_FILE", str(file))
    machine.setenv("PIP_CERT", "/it's.pem")
    settings = pip_settings(pip_config_list())
    assert settings["index-url"] == "https://global/simple"
    assert settings["extra-index-url"].split() == ["https://one/simple", "https://two/simple"]
    assert settings["timeout"] == "6"
    assert settings["cert"] == "/it's.pem"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"index-url": ""}, {}),
        ({"index-url": "https://a/simple"}, {"UV_DEFAULT_INDEX": "https://a/simple"}),
        (
            {"extra-index-url": "\nhttps://a/simple\nhttps://b/simple"},
            {"UV_INDEX": "https://a/simple https://b/simple"},
        ),
        ({"find-links": "/wheels https://a/wheels"}, {"UV_FIND_LINKS": "/wheels,https://a/wheels"}),
        ({"trusted-host": "a b:8080"}, {"UV_INSECURE_HOST": "a b:8080"}),
        ({"cert": "/ca.pem", "client-cert": "/me.pem"}, {"SSL_CERT_FILE": "/ca.pem", "SSL_CLIENT_CERT": "/me.pem"}),
        ({"proxy": "http://p:1"}, {"HTTP_PROXY": "http://p:1", "HTTPS_PROXY": "http://p:1"}),
        ({"default-timeout": "180"}, {"UV_HTTP_TIMEOUT": "180"}),
        ({"no-index": "true", "disable-pip-version-check": "1"}, {}),
    ],
)
def test_uv_is_told_what_pip_is_set_to(settings, expected):
    assert uv_environment(settings, {}) == BEST_MATCH | expected


def test_what_the_environment_tells_uv_goes_before_pip_s_settings():
    environment = {"UV_DEFAULT_INDEX": "https://uv/simple", "UV_INDEX_STRATEGY": "first-index", "HOME": "/home/me"}
    assert uv_environment({"index-url": "https://pip/simple"}, environment) == environment


@pytest.mark.parametrize(
    ("value", "options"), [("1", ["--no-index"]), ("True", ["--no-index"]), ("0", []), ("false", [])]
)
def test_no_index_is_an_option(value, options):
    assert uv_options({"no-index": value}) == options
    assert uv_options({}) == []


def test_a_failure_is_one_line_without_warnings():
    told = reason("WARNING: Retrying\n  × No solution\n  ╰─▶ Because there is\n      no tiny\nwarning: the cache\n")
    assert told == "× No solution ╰─▶ Because there is no tiny"
    assert reason("word " * 1000).count("\n") == 0
    assert len(reason("word " * 1000)) < 310


# ---------------------------------------------------------------------------------------------------------------------
# With uv itself, which `make setup` leaves in .venv


def write_wheel(folder: Path, version: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"tiny_thing-{version}.dist-info"
    with zipfile.ZipFile(folder / f"tiny_thing-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-thing\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"tiny_thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return f"tiny_thing-{version}-py3-none-any.whl"


def write_index(folder: Path, version: str | None) -> str:
    """An index in a folder, with that version of tiny-thing or with nothing; its address."""
    (folder / "tiny-thing").mkdir(parents=True)
    if version:
        name = write_wheel(folder / "tiny-thing", version)
        (folder / "tiny-thing" / "index.html").write_text(
            f'<!DOCTYPE html><html><body><a href="{name}">{name}</a></body></html>'
        )
    return folder.as_uri()


def install(target: Path, python: str = sys.executable) -> tuple[str, str, str]:
    """(version, installer, what was said) of tiny-thing, installed into a folder."""
    command = [python, str(ROOT / "infra/install.py"), "--target", str(target), "tiny-thing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (info,) = target.glob("tiny_thing-*.dist-info")
    return info.name.split("-")[1].removesuffix(".dist"), (info / "INSTALLER").read_text().strip(), done.stderr


@pytest.mark.parametrize("place", ["find-links", "index-url", "extra-index-url"])
def test_uv_installs_from_where_pip_would(machine, tmp_path, place):
    pytest.importorskip("uv")
    if place == "find-links":
        write_wheel(tmp_path / "wheels", "1.0")
        machine.setenv("PIP_NO_INDEX", "1")
        machine.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    elif place == "index-url":
        machine.setenv("PIP_INDEX_URL", write_index(tmp_path / "index", "1.0"))
    else:  # both know the name: pip takes the newest of all
        machine.setenv("PIP_INDEX_URL", write_index(tmp_path / "index", "1.0"))
        machine.setenv(
            "PIP_EXTRA_INDEX_URL", f"{write_index(tmp_path / 'a', '0.9')} {write_index(tmp_path / 'b', '1.1')}"
        )
    version = "1.1" if place == "extra-index-url" else "1.0"
    assert install(tmp_path / "target") == (version, "uv", "")


@pytest.mark.parametrize("why", ["uv finds no index", "pip finds no uv"])
def test_pip_installs_what_uv_does_not(machine, tmp_path, why):
    write_wheel(tmp_path / "wheels", "1.0")
    machine.setenv("PIP_NO_INDEX", "1")
    machine.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    python = sys.executable
    if why == "uv finds no index":
        pytest.importorskip("uv")
        machine.setenv("UV_FIND_LINKS", str(tmp_path / "nowhere"))
    else:
        venv.create(tmp_path / "bare", with_pip=True)
        python = str(tmp_path / "bare/bin/python")
    version, installer, said = install(tmp_path / "target", python)
    assert (version, installer) == ("1.0", "pip")
    assert said.startswith("installing with pip, which takes longer, because uv did not do it: ")
    assert said.count("\n") == 1
