"""The table of devices, what this machine says of itself, and a person's prices."""

import pytest
from run_kit import ROOT

from pipeline.errors import ConfigError
from pipeline.planning.hardware import accelerators, hardware, here, measured, of_cluster, prices


def test_every_device_of_the_table_says_where_it_is_from():
    assert {"A100-40", "A100", "H100", "H200", "B200", "L40S"} == set(accelerators())
    for device in accelerators().values():
        assert "data sheet" in device.source
        assert 0 < device.mfu[0] <= device.mfu[1] <= 1
        assert device.peaks["bf16"] > device.peaks["fp32"]
    assert hardware("h200").memory_bytes == 141e9


def test_this_machine():
    device = here(workers=1, use_gpu=False)
    assert (device.name, device.kind) == ("CPU", "cpu")
    assert 2**30 < device.memory_bytes < 2**45
    assert device.peaks == {}
    assert measured(device, "fp32").peaks["fp32"] > 1e9
    assert measured(hardware("H100"), "fp32") == hardware("H100")
    assert hardware("cpu") == device


def test_a_peak_and_a_share_that_somebody_measured_replace_the_table_s():
    given = hardware("H100").as_measured(tflops=700.0, mfu=0.42)
    assert (given.peaks["bf16"], given.mfu) == (700e12, (0.42, 0.42))
    assert hardware("H100").as_measured(tflops=None, mfu=None) == hardware("H100")
    for wrong in ({"tflops": -1.0, "mfu": None}, {"tflops": None, "mfu": 40.0}):
        with pytest.raises(ConfigError, match="is not usable: write"):
            hardware("H100").as_measured(**wrong)


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--hardware K80 is unknown: write one of A100-40, A100, H100, .*CPU"):
        hardware("K80")


def test_names_of_ray_s_mean_the_largest_device_that_they_can():
    assert of_cluster(["A100-40G"]).memory_bytes == 80e9
    assert of_cluster(["H100", "H200"]).name == "H200"
    assert of_cluster(["H100", "T4"]) is None
    assert of_cluster([]) is None


def test_the_shipped_prices_are_blank_and_complete():
    assert prices(ROOT / "jobs/prices.yaml") == {}
    named = {line.split(":")[0] for line in (ROOT / "jobs/prices.yaml").read_text().splitlines() if line[0] != "#"}
    assert named == {*accelerators(), "CPU"}


def test_prices_are_read_and_wrong_ones_refused_with_file_and_entry(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("H100: 2\nCPU: 0.25\nB200: null\n")
    assert prices(path) == {"H100": 2.0, "CPU": 0.25}
    for text, words in (
        ("H100: -1", "H100 = -1 is no price"),
        ("H100: cheap", "H100 = 'cheap' is no price"),
        ("H100: yes", "H100 = True is no price"),
        ("K80: 1", "'K80' is unknown: write one of A100-40"),
        ("- 1", "holds no mapping"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            prices(path)
        assert str(path) in str(caught.value)
