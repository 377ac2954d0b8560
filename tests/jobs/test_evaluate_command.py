"""`mae evaluate` and `mae conformance` as a person meets them: their help, and mistakes in one line with exit code 2."""

import pytest
import torch
from run_kit import mae
from typer.testing import CliRunner

from jobs.cli import app


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "evaluate",
            ("WEIGHTS", "--data", "--protocols", "--num-heads", "--image-size", "--pixel-mean", "--in-process"),
        ),
        ("conformance", ("WEIGHTS", "--imagenet", "--layer-norm-eps", "Exit code 0")),
    ],
)
def test_help_names_the_options(command, words):
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist: give a file of torch.save or safetensors"),
        ({"a.weight": torch.ones(2)}, "are in no known layout"),
        (b"<html>", "is a web page"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, content, words):
    weights = tmp_path / "w.pth"
    if isinstance(content, bytes):
        weights.write_bytes(content)
    elif content is not None:
        torch.save(content, weights)
    done = mae("evaluate", weights, "--data", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mae: {weights}")
    assert words in line
    assert not (tmp_path / ".mae").exists()
