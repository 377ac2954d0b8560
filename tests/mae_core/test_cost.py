"""Costs: published totals, and torch's own counter as the independent reference."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core import (
    SIZES,
    MAEConfig,
    MaskedAutoencoder,
    encoder_flops,
    forward_flops,
    parameter_count,
    training_flops,
)


@pytest.mark.parametrize(("size", "millions"), [("base", 111.9), ("large", 329.5), ("huge", 657.1)])
def test_totals_of_the_paper_s_models(size, millions):
    config = MAEConfig(encoder=SIZES[size]())
    widths = config.encoder.embed_dim + config.decoder_embed_dim
    tables = (config.encoder.num_patches + 1) * widths  # published totals count the fixed position tables
    # published with one decimal
    assert (parameter_count(config) + tables) / 1e6 == pytest.approx(millions, abs=0.05)


def test_encoder_alone():
    assert parameter_count(SIZES["base"]()) / 1e6 == pytest.approx(85.65, abs=0.005)


def test_flops_equal_torch_s_counter(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels, noise)
    assert counter.get_total_flops() == forward_flops(mae_config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder.encode(pixels, pool="none")
    assert counter.get_total_flops() == encoder_flops(mae_config.encoder, visible_patches=24)
    assert training_flops(mae_config) == 3 * forward_flops(mae_config)


def test_hiding_three_quarters_saves_more_than_three_quarters_of_the_encoder():
    config = SIZES["large"]()
    saved = encoder_flops(config, visible_patches=196) / encoder_flops(config, visible_patches=49)
    assert 3.9 < saved < 4.3
