"""What a GPU needs from the host's cores: the arithmetic by hand."""

import pytest

from pipeline.errors import ConfigError
from pipeline.planning.decode_cores import Need, chosen_peaks, needs
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
