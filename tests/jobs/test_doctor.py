"""`mae doctor --data`: the arithmetic by hand, and the command."""

import json

import pytest
from run_kit import mae
from typer.testing import CliRunner

from jobs.cli import app
from jobs.doctor import Need, chosen_peaks, needs
from pipeline.data.images.photos import photos
from pipeline.errors import ConfigError
from pipeline.planning.hardware import accelerators


def test_cores_that_a_gpu_needs_by_hand():
    # 40 % of 300 TFLOP/s is 120e12 a second: 1200 images of 0.1 TFLOP, 12 of 10; a core makes 400
    found = needs({"small": 0.1e12, "big": 10e12}, {"card": 300e12}, share_of_peak=0.4, images_per_core_s=400.0)
    assert found == [
        Need("small", "card", pytest.approx(1200.0), pytest.approx(3.0)),
        Need("big", "card", pytest.approx(12.0), pytest.approx(0.03)),
    ]


@pytest.mark.parametrize("share", [0.0, -0.4, 1.2, 40.0])
def test_a_share_of_the_peak_is_a_fraction(share):
    with pytest.raises(ConfigError, match=rf"the share of the peak is {share}, not in \(0, 1\]"):
        needs({"base": 1e9}, {"card": 1e12}, share_of_peak=share, images_per_core_s=1.0)


def test_peaks_are_named_or_given():
    assert chosen_peaks(["H200", "A100"], None) == {"H200": 989e12, "A100": 312e12}
    assert chosen_peaks([], 165.0) == {"165 TFLOP/s": 165e12}
    assert set(chosen_peaks([], None)) <= set(accelerators())
    with pytest.raises(ConfigError, match="--gpu K80 is unknown here"):
        chosen_peaks(["A100", "K80"], None)
    with pytest.raises(ConfigError, match=r"--tflops -1\.0 is no peak"):
        chosen_peaks([], -1.0)


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


def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(tmp_path):
    for arguments, words in (
        ([], "say what is to be looked at: --data"),
        (["--data", "--images", str(tmp_path)], "holds no upright RGB JPEG"),
    ):
        done = mae("doctor", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
