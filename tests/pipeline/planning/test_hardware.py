"""The table of devices, this machine, and the user's prices."""

import pytest
from run_kit import ROOT

from pipeline.cluster.resources import Resources
from pipeline.errors import ConfigError
from pipeline.planning.hardware import (
    accelerators,
    cluster_hardware,
    hardware_named,
    local_hardware,
    read_prices,
    with_measured_peak,
)


def test_every_device_of_the_table_says_where_it_is_from():
    assert {"A100-40", "A100", "H100", "H200", "B200", "L40S"} == set(accelerators())
    for device in accelerators().values():
        assert "data sheet" in device.source
        assert 0 < device.mfu[0] <= device.mfu[1] <= 1
        assert device.peaks["bf16"] > device.peaks["fp32"]
    assert hardware_named("h200").memory_bytes == 141e9


def test_this_machine():
    device = local_hardware(Resources(use_gpu=False))
    assert (device.name, device.kind) == ("CPU", "cpu")
    assert 2**30 < device.memory_bytes < 2**45
    assert device.peaks == {}
    assert with_measured_peak(device, "fp32").peaks["fp32"] > 1e9
    assert with_measured_peak(hardware_named("H100"), "fp32") == hardware_named("H100")
    assert hardware_named("cpu") == device


def test_a_peak_and_a_share_that_somebody_measured_replace_the_table_s():
    given = hardware_named("H100").with_overrides(tflops=700.0, mfu=0.42)
    assert (given.peaks["bf16"], given.mfu) == (700e12, (0.42, 0.42))
    assert hardware_named("H100").with_overrides(tflops=None, mfu=None) == hardware_named("H100")
    for wrong in ({"tflops": -1.0, "mfu": None}, {"tflops": None, "mfu": 40.0}):
        with pytest.raises(ConfigError, match="is not usable: write"):
            hardware_named("H100").with_overrides(**wrong)


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"--hardware K80 is unknown: write one of A100-40, A100, H100, .*CPU"):
        hardware_named("K80")


def test_names_of_ray_s_mean_the_largest_device_that_they_can():
    assert cluster_hardware(["A100-40G"]).memory_bytes == 80e9
    assert cluster_hardware(["H100", "H200"]).name == "H200"
    assert cluster_hardware(["H100", "T4"]) is None
    assert cluster_hardware([]) is None


def test_the_shipped_prices_are_blank_and_complete():
    assert read_prices(ROOT / "jobs/prices.yaml") == {}
    named = {line.split(":")[0] for line in (ROOT / "jobs/prices.yaml").read_text().splitlines() if line[0] != "#"}
    assert named == {*accelerators(), "CPU"}


def test_prices_are_read_and_wrong_ones_refused_with_file_and_entry(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("H100: 2\nCPU: 0.25\nB200: null\n")
    assert read_prices(path) == {"H100": 2.0, "CPU": 0.25}
    for text, words in (
        ("H100: -1", "H100 = -1 is not a price"),
        ("H100: cheap", "H100 = 'cheap' is not a price"),
        ("H100: yes", "H100 = True is not a price"),
        ("K80: 1", "'K80' is unknown: write one of A100-40"),
        ("- 1", "holds no mapping"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            read_prices(path)
        assert str(path) in str(caught.value)
