"""The checkpoint benchmark as a person starts it: its last line has the promised keys. Times are not tested."""

import json
import subprocess
import sys

import pytest
from run_kit import ROOT, environment

pytestmark = pytest.mark.system


def test_last_line_has_the_promised_keys(tmp_path):
    call = [
        sys.executable,
        "-m",
        "benchmarks.checkpoint",
        "--quick",
        "--turns",
        "1",
        "--store",
        str(tmp_path / "store"),
    ]
    done = subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True, timeout=240)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "checkpoint"
    assert line["bytes"] >= 256 * 2**20
    assert line["stall_vs_copy"] > 0
    assert line["seconds"] > 0
    files = list((tmp_path / "store").rglob("*.safetensors"))
    assert [file.stat().st_size > line["bytes"] for file in files] == [True]  # only the last one is kept
