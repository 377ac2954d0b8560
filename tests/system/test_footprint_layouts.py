"""What is foreseen of a worker's memory against real processes of 112 million parameters: within 15 %."""

import pytest
import torch

from benchmarks.footprint import Layout, foreseen, held
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
def test_a_worker_holds_what_was_foreseen(layout):
    assert parameter_count(BASE) > 100e6
    assert foreseen(layout, BASE) == pytest.approx(held(layout, BASE), rel=MARGIN)
