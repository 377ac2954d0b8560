"""`mae doctor --data` as a user types it."""

import json

import pytest
from run_kit import mae
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.data.images.photos import photos


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


def test_wrong_options_are_one_line_and_exit_code_2(tmp_path):
    for arguments, words in (
        ([], "name what to check. There is one check so far: --data"),
        (["--data", "--images", str(tmp_path)], "holds no upright RGB JPEG"),
    ):
        done = mae("doctor", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
