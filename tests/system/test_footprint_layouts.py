"""What is predicted_bytes of a worker's memory against real processes of 112 million parameters: within 15 %."""

import pytest
import torch

from benchmarks.footprint import Layout, measured_bytes, predicted_bytes
from mae_core import SIZES, MAEConfig, parameter_count
from pipeline.planning.footprint import MARGIN

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(torch.cuda.is_available(), reason="spawns as many workers as layouts ask for, not GPUs"),
]
BASE = MAEConfig(encoder=SIZES["base"]())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(precision="fp32", zero_stage=1),
        Layout(precision="fp32", zero_stage=2, workers=2),
        Layout(precision="fp32", zero_stage=3, workers=2),
    ],
    ids=lambda layout: layout.name,
)
def test_the_prediction_is_within_the_margin(layout):
    assert parameter_count(BASE) > 100e6
    assert predicted_bytes(layout, BASE) == pytest.approx(measured_bytes(layout, BASE), rel=MARGIN)
