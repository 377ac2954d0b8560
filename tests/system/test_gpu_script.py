"""The script for the first owner of a GPU, in its quick shape: every part runs on this machine, without Ray, MLflow and boto3."""

import json
import subprocess

import pytest
from run_kit import ROOT, bare_site, environment

pytestmark = pytest.mark.system


def test_the_quick_script_checks_and_measures_everything(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "infra/acceptance/gpu.sh"), "--quick"],
        env=environment(PYTHONPATH=str(bare_site(tmp_path)), PYTHON="python"),
        capture_output=True,
        text=True,
        check=False,
        timeout=1300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    checks = {line["check"]: line["ok"] for line in lines if line["benchmark"] == "correctness"}
    assert set(checks) >= {*(f"{precision} ZeRO-{stage}" for precision in ("fp32", "bf16") for stage in (1, 2, 3))}
    assert all(checks.values())
    speeds = {line["benchmark"]: line for line in lines if line["benchmark"] != "correctness"}
    assert set(speeds) == {"train_step", "step_variants", "loader", "loop", "usual"}
    assert all(
        speeds[name]["images_per_s"] > 0 and speeds[name]["model"] == "quick"
        for name in ("train_step", "loop", "usual")
    )
    assert speeds["loop"]["foreseen_gib"] > 0
