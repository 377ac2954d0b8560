"""The script for the first owner of a GPU: what it compares, what it runs, and what it says of parts that fail."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from run_kit import ROOT, environment

from benchmarks import step_variants, train_step
from infra.acceptance import correctness, table
from infra.acceptance.correctness import BOUNDS, Step, compared
from infra.acceptance.loop import Stopwatch, command_line
from mae_core import SIZES

FAKE = """
import json, sys

module, options = sys.argv[2], sys.argv[3:]
if module == "infra.acceptance.table":
    sys.argv = [module]
    from infra.acceptance.table import main

    main()
with open({record!r}, "a") as file:
    file.write(json.dumps([module, *options]) + "\\n")
print("a table")
if module == {fails!r}:
    raise SystemExit(5)
line = {{"benchmark": module.rpartition(".")[2], "images_per_s": 100.0, "mfu": 0.5, "workers": 2, "check": "fp32", "ok": True}}
line |= {{key: 1e-7 for key in ("loss_off", "loss_bound", "norm_off", "norm_bound")}}
line |= {{"processes_images_per_s": 7.0, "images_per_s_per_core": 3.0}}
model = options[options.index("--model") + 1] if "--model" in options else "quick"
print(json.dumps(line | {{"model": model}}))
"""
"""A Python whose parts take no time; only the table is the real one."""


def script(folder: Path, *options: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run gpu.sh with parts that only say what they were asked; return the process and the commands."""
    record, fake = folder / "record", folder / "python"
    (folder / "fake.py").write_text(FAKE.format(record=str(record), fails=fails))
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/fake.py "$@"\n')
    fake.chmod(0o755)
    call = ["bash", str(ROOT / "infra/acceptance/gpu.sh"), *options]
    done = subprocess.run(call, env=environment(PYTHON=str(fake)), capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in record.read_text().splitlines()]


def test_every_part_runs_in_its_order_with_options_that_its_module_knows(tmp_path):
    done, commands = script(tmp_path)
    assert done.returncode == 0, done.stderr
    names = [command[0].rpartition(".")[2] for command in commands]
    assert names == ["correctness", *["train_step"] * 3, "loader", *["loop"] * 3, *["usual"] * 3, "step_variants"]
    of_loop = {}
    for module, *options in commands:
        if module == "benchmarks.train_step":
            (plan,) = train_step.plans([*options, "--device", "cpu"])
            assert (plan.whole, plan.ablations) == (False, False)
        elif module == "benchmarks.step_variants":
            read = step_variants.command_line(options)
            assert (read.model, read.quick) == ("large", False)
            assert read.budget < 90
        elif module.endswith(("loop", "usual")):
            read = command_line("loop", options)
            of_loop.setdefault(read.model, []).append(read.batch)
    assert of_loop == {"base": [512, 512], "large": [512, 512], "huge": [256, 256]}


def test_standard_output_is_json_lines_and_then_a_table(tmp_path):
    done, commands = script(tmp_path, "--images", str(tmp_path))
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len([json.loads(line) for line in lines]) == len(commands)
    assert "a table" in done.stderr
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("huge"))
    assert row == ["huge", "100.0", "50.0", "%", "100.0", "50.0", "%", "1.00", "100.0", "1.00", "–", "–"]
    assert all(command[-2:] == ["--images", str(tmp_path)] for command in commands if "step" not in command[0])


def test_a_part_that_fails_is_named_and_the_others_still_run(tmp_path):
    done, commands = script(tmp_path, "--quick", fails="benchmarks.loader")
    assert [command[0].rpartition(".")[2] for command in commands] == [
        "correctness",
        "train_step",
        "step_variants",
        "loader",
        "loop",
        "usual",
    ]
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        "benchmarks.loader --quick --rounds 1 failed (exit code 5); its messages are on standard error"
    )


def test_wheels_are_installed_without_an_index_and_beside_the_checkout(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "one.whl").touch()
    done, (install, *parts) = script(tmp_path, "--quick", "--wheels", str(wheels))
    assert done.returncode == 0, done.stderr
    assert install[:6] == ["pip", "install", "-q", "--no-index", "--no-deps", "--find-links"]
    assert (install[6], install[-1]) == (str(wheels), str(wheels / "one.whl"))
    target = Path(install[install.index("--target") + 1])
    assert not target.is_relative_to(ROOT)
    assert not target.parent.exists()
    assert len(parts) == 6


def test_an_unknown_option_shows_the_usage(tmp_path):
    call = ["bash", str(ROOT / "infra/acceptance/gpu.sh"), "--fast"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "[--wheels DIR] [--images DIR] [--quick]" in done.stderr


def test_steps_pass_within_their_bound_and_never_with_a_loss_that_is_no_number():
    expected = [Step(1.0, 2.0), Step(0.5, 1.0)]
    near = compared("near", [Step(1.000001, 2.0), Step(0.5, 0.99999)], expected, BOUNDS["fp32"])
    assert near["ok"]
    assert near["loss_off"] == pytest.approx(1e-6)
    assert near["norm_off"] == pytest.approx(1e-5)
    assert not compared("far", [Step(1.0, 2.0), Step(0.5002, 1.0)], expected, BOUNDS["fp32"])["ok"]
    assert not compared("nan", [Step(1.0, 2.0), Step(math.nan, 1.0)], expected, BOUNDS["bf16"])["ok"]
    assert not table.succeeded([near, near | {"ok": False}])
    assert not table.succeeded([])


def test_the_stored_steps_are_those_of_a_model_that_learns():
    losses = [step["loss"] for step in json.loads(correctness.STORED.read_text())["steps"]]
    assert len(losses) == correctness.STEPS
    assert losses == sorted(losses, reverse=True)


def test_the_stopwatch_counts_steps_after_the_warm_up_and_then_leaves_the_loop(monkeypatch):
    clock = iter([10.0, 20.0, 23.0, 26.0])
    monkeypatch.setattr("infra.acceptance.loop.time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(warmup_steps=8, seconds=5.0)
    for step in (4, 8, 12):
        stopwatch.log(step, {})
    with pytest.raises(Exception):  # noqa: B017, PT011 - private: the loop's caller catches it
        stopwatch.log(16, {"memory/device_gib": 1.0})
    assert (stopwatch.steps, stopwatch.elapsed_s, stopwatch.row) == (8, 6.0, {"memory/device_gib": 1.0})


def test_quick_measures_a_small_model():
    assert "quick" not in SIZES
    assert command_line("loop", ["--quick"]).model == "quick"
