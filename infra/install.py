"""Installs packages into the environment of the Python that runs it: with uv, and with pip where uv does not get there.

Command: .venv/bin/python infra/install.py -e '.[dev]'      (`make setup` runs it; the arguments are those of `pip install`)

The versions are constraints.txt's, for both. uv knows nothing of pip's settings, so it is told what pip.conf and PIP_*
variables say about where packages come from; what the environment tells uv itself goes before that. Where uv cannot be
installed, finds no index or fails, a line says so and pip does it. Exits with the status of the one that came last.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PIP = (sys.executable, "-m", "pip")
UV = (sys.executable, "-m", "uv")

# pip's setting -> the variables in which uv wants it, and what stands between several values there.
SINGLE = {
    "index-url": ("UV_DEFAULT_INDEX",),
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "default-timeout": ("UV_HTTP_TIMEOUT",),
}
SEVERAL = {
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}


def pip_settings(listing: str) -> dict[str, str]:
    """What `pip config list` prints, as pip install takes it: [install] before [global], and the environment before both."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in sections:
            sections[section][name] = str(ast.literal_eval(value))
    return sections["global"] | sections["install"] | sections[":env:"]


def uv_options(settings: Mapping[str, str]) -> list[str]:
    """pip's settings for which uv has an option and no variable."""
    return ["--no-index"] if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"} else []


def uv_environment(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which uv finds what pip would: `environment` and, where it is silent, pip's settings."""
    # pip takes the best version of all indexes; uv of its own accord takes a package from the first that knows its name.
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for name, variables in SINGLE.items():
        if value := settings.get(name, "").strip():
            found |= dict.fromkeys(variables, value)
    for name, (variable, separator) in SEVERAL.items():
        if values := settings.get(name, "").split():
            found[variable] = separator.join(values)
    return found | dict(environment)


def reason(stderr: str) -> str:
    """Why an installer failed, in its own words on one line."""
    words = " ".join(" ".join(line for line in stderr.splitlines() if not line.lower().startswith("warning")).split())
    return words if len(words) <= 300 else f"{words[:300]}..."


def run(command: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    """The command, with its status for the caller to judge."""
    return subprocess.run(command, env=environment, text=True, check=False, **options)  # noqa: S603


def with_uv(arguments: list[str]) -> str | None:
    """Why uv did not install them; None when it did."""
    settings = pip_settings(run([*PIP, "config", "list"], os.environ, stdout=subprocess.PIPE).stdout)
    constraints = str(CONSTRAINTS)
    pinned = os.environ | {"PIP_CONSTRAINT": constraints}
    got = run([*PIP, "install", "-q", "--no-deps", "uv"], pinned, stderr=subprocess.PIPE)
    if got.returncode:
        return reason(got.stderr)
    # -b: what a source distribution is built with is held to the same versions, as pip does by PIP_CONSTRAINT.
    command = [*UV, "pip", "install", "-q", "--python", sys.executable, "-c", constraints, "-b", constraints]
    if sys.dont_write_bytecode:
        # pip compiles all modules, in half a minute. Python compiles those that are imported, once; told not to keep what it
        # compiled, it would do so in every process, which costs each worker 5 s.
        command.append("--compile-bytecode")
    command += [*uv_options(settings), *arguments]
    # Nobody has to act on uv's warnings, such as that its cache is on another disk than .venv.
    done = run(command, uv_environment(settings, os.environ), stderr=subprocess.PIPE)
    return reason(done.stderr) if done.returncode else None


def with_pip(arguments: list[str]) -> int:
    """pip's exit status."""
    # The variable, and not -c: only it reaches the builds, and it takes the place of the machine's own.
    return run([*PIP, "install", "-q", *arguments], os.environ | {"PIP_CONSTRAINT": str(CONSTRAINTS)}).returncode


def main(arguments: list[str]) -> int:
    """uv's success or pip's exit status."""
    failure = with_uv(arguments)
    if failure is None:
        return 0
    print(f"installing with pip, which takes longer, because uv did not do it: {failure}", file=sys.stderr)
    return with_pip(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
