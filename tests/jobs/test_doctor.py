"""`mae doctor --data` as a user types it."""

import json
from pathlib import Path

import pytest
from run_kit import mae
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.data.images.photos import photos
from pipeline.errors import PipelineError
from pipeline.runs.checking import machine


def test_the_command_prints_a_table_and_ends_with_a_json_line(tmp_path):
    for number, data in enumerate(photos(None, count=3).files):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    arguments = ["--data", "--images", str(tmp_path), "--gpu", "A100", "--mfu", "0.5", "--seconds", "0.05", "--json"]
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    by_model = {need["model"]: need for need in line["needs"]}
    assert set(by_model) == {"small", "base", "large", "huge"}
    rate = line["all_cores"]["images_per_core_s"]
    for model, need in by_model.items():
        assert f"ViT {model}" in done.stdout
        assert need["cores"] == pytest.approx(need["images_per_s"] / rate)
    # 58.0 GFLOP an image (docs/performance.md): 156e12 / 58.0e9
    assert by_model["base"]["images_per_s"] == pytest.approx(2690, rel=0.01)
    assert line["one_thread"]["threads"] == 1


def test_alone_it_checks_this_machine_with_one_line_each():
    done = mae("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["python", "torch", "cores", "bf16", "disk", "/dev/shm", "ray"]
    assert lines[-1].startswith("✓ ray")
    assert done.stderr == "checking this machine\n"


def test_what_a_run_cannot_do_without_is_exit_code_1(monkeypatch):
    def no_ray() -> None:
        raise PipelineError("Ray on this machine: cannot connect (no port)")

    monkeypatch.setattr(machine, "_ray", lambda: machine._finding("ray", False, "cannot connect", "unset RAY_ADDRESS"))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines()[-7:])}
    assert found["ray"] == {"name": "ray", "state": "wrong", "text": "cannot connect: unset RAY_ADDRESS"}
    monkeypatch.undo()
    assert "works without it" in machine._ray(connect=no_ray).text
    assert machine._shared_memory(Path("/nowhere")).state == "wrong"
    monkeypatch.setattr(machine, "cpu_computes_bf16", lambda: False)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert machine._bf16().state == "warning"
    trained = (
        "evaluation.finetune, evaluation.partial, evaluation.scratch, evaluation.linear_online, evaluation.attentive"
    )
    assert machine._bf16().text.endswith(f"write precision: fp32 in pretrain, {trained}")


def test_wrong_options_are_one_line_and_exit_code_2(tmp_path):
    for arguments, words in ((["--data", "--images", str(tmp_path)], "holds no upright RGB JPEG"),):
        done = mae("doctor", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
