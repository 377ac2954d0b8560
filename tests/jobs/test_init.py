"""`mae init`, `mae config` and `mae --version`: the way to a first configuration."""

import json

import pytest
from run_kit import mae, write_images
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.planning.hardware import cpu_computes_bf16
from pipeline.runs import starter
from pipeline.runs.workflow import build


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_written_file_loads_and_fits_the_images(tmp_path):
    write_images(tmp_path / "my pictures: 1", 60)
    done = CliRunner().invoke(app, ["init", "my pictures: 1", "--out", "x.yaml"])
    assert done.exit_code == 0, done.output
    config = load_config(tmp_path / "x.yaml")
    assert config.data.source == str(tmp_path / "my pictures: 1")
    assert config.name == "my-pictures--1"
    assert config.model.encoder.image_size == (16, 16)  # the size of the pictures
    assert config.pretrain.epochs * 54 <= starter.PRETRAIN_IMAGES
    assert config.pretrain.precision == "fp32"
    assert len(build(config)) == 8
    text = (tmp_path / "x.yaml").read_text()
    assert "60 image files, the short side 16 pixels" in text
    assert "mae run x.yaml" in text


def test_without_a_source_and_with_a_remote_one_the_file_loads_too(tmp_path):
    for number, source in enumerate(("", "s3://bucket/images")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(starter.starter_config(source, file=path.name))
        assert load_config(path).data.source == (source or "/path/to/images")
        assert load_config(path).model.encoder.image_size == (64, 64)


def test_more_images_mean_fewer_epochs():
    epochs = [starter._epochs(starter.PRETRAIN_IMAGES, images, most=300) for images in (10, 1000, 20_000, 1_000_000)]
    assert epochs == [300, 20, 1, 1]


def test_a_file_is_never_overwritten_and_a_missing_source_is_named(tmp_path):
    (tmp_path / "mae.yaml").write_text("mine")
    done = mae("init", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mae: mae.yaml exists: write another name with --out, or delete it\n"
    assert (tmp_path / "mae.yaml").read_text() == "mine"
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        starter.starter_config("nowhere", file="x.yaml")


def test_bf16_arithmetic_is_read_from_the_flags_of_the_cpu(tmp_path):
    for flags, expected in (
        ("flags\t\t: fpu avx512f avx512_bf16 vnni", True),
        ("flags : fpu amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
        assert cpu_computes_bf16(tmp_path / "cpuinfo") is expected
    assert cpu_computes_bf16(tmp_path / "missing")


def test_config_prints_a_section_a_field_and_json():
    runner = CliRunner()
    shown = runner.invoke(app, ["config", "pretrain"]).stdout
    assert "pretrain.epochs  whole number  = 800\n    How often every training image is seen." in shown
    assert "evaluation" not in shown
    whole = runner.invoke(app, ["config", "--json"]).stdout.splitlines()
    assert {"store", "pretrain.guard.window", "resources.workers"} <= {json.loads(line)["name"] for line in whole}
    unknown = runner.invoke(app, ["config", "pretrian"])
    assert isinstance(unknown.exception, ConfigError)
    assert "pretrian is not a field" in str(unknown.exception)


def test_the_version_is_printed():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout.split()[0]) == (0, "mae-pipeline")
