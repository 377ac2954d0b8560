"""The words of `Recipe.precision`: what torch and the engine are told, and that no training leaves it to the next."""

import pytest
import torch

from pipeline.cluster.resources import Resources
from pipeline.planning.hardware import accelerators
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import engine_settings, float32_products


@pytest.mark.parametrize(
    ("precision", "device", "inside"),
    [("tf32", "cuda", "high"), ("tf32", "cpu", "highest"), ("fp32", "cuda", "highest"), ("bf16", "cuda", "highest")],
)
@pytest.mark.parametrize("before", ["highest", "medium"])
def test_products_are_those_of_the_precision_inside_and_as_before_afterwards(precision, device, inside, before):
    torch.set_float32_matmul_precision(before)
    try:
        with float32_products(precision, torch.device(device)):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("precision", "engine"), [("bf16", "bf16"), ("fp32", "fp32"), ("tf32", "fp32")])
def test_the_engine_and_the_plan_know_two_precisions(precision, engine):
    recipe = Recipe(global_batch=8, epochs=1, warmup_epochs=0.0, precision=precision)
    assert engine_settings(recipe, Resources(), workers=1).precision == engine


def test_every_gpu_has_a_peak_in_tf32_between_fp32_and_bf16():
    for device in accelerators().values():
        assert device.peaks["fp32"] < device.peaks["tf32"] < device.peaks["bf16"]
