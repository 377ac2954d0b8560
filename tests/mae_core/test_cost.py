"""Costs against published totals, and against torch's FLOP counter and saved-tensor hooks as independent references."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mae_core import (
    SIZES,
    AttentiveProbe,
    Classifier,
    EfficientProbe,
    LinearProbe,
    MAEConfig,
    MaskedAutoencoder,
    ViTConfig,
    ViTEncoder,
    activation_bytes,
    attentive_probe_flops,
    classifier_training_flops,
    decoder_flops,
    efficient_probe_flops,
    encoder_activation_bytes,
    encoder_flops,
    forward_flops,
    linear_probe_flops,
    parameter_count,
    training_flops,
)
from mae_core.classification.heads import freeze_below

WIDE = ViTConfig(image_size=(24, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
TALL = ViTConfig(image_size=(64, 32), patch_size=8, embed_dim=48, depth=3, num_heads=4, mlp_ratio=3.0, cls_tokens=4)
VARIANTS = {
    "wide": MAEConfig(encoder=WIDE, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2),
    "tall": MAEConfig(encoder=TALL, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4, decoder_mlp_ratio=2.0),
    "all tokens": MAEConfig(
        encoder=TALL, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, encoder_input="all"
    ),
    "loss on all": MAEConfig(encoder=TALL, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, loss_on="all"),
    "everything": MAEConfig(
        encoder=replace(WIDE, cls_tokens=8, positions="learned"),
        decoder_embed_dim=8,
        decoder_depth=3,
        decoder_num_heads=2,
        mask_ratio=0.4,
        encoder_input="all",
        loss_on="all",
    ),
}


def of_every_variant(test):
    return pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())(test)


def step_flops(config: MAEConfig, *, backward: bool) -> int:
    """FLOPs per image that torch counts for two images on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model = MaskedAutoencoder(config, generator=torch.Generator("cpu"))
        pixels = torch.empty(2, config.encoder.in_channels, *config.encoder.image_size)
        noise = torch.empty(2, config.encoder.num_patches)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not all counted
        loss = model(pixels, noise).loss.mean()
        if backward:
            loss.backward()
    return counter.get_total_flops() // 2


def kept_bytes(model: nn.Module, compute) -> int:
    """Bytes that autograd keeps while `compute` runs: each storage counts once, parameters and position tables do not."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that its address is not reused
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    del output
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(("size", "millions"), [("base", 111.9), ("large", 329.5), ("huge", 657.1)])
def test_totals_of_the_paper_s_models(size, millions):
    config = MAEConfig(encoder=SIZES[size]())
    widths = config.encoder.embed_dim + config.decoder_embed_dim
    tables = (config.encoder.num_patches + 1) * widths  # published totals count the fixed position tables
    # published with one decimal
    assert (parameter_count(config) + tables) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("config", [WIDE, TALL], ids=["wide", "tall"])
def test_flops_of_fine_tuning_equal_torch_s_counter(config):
    with torch.device("meta"):
        encoder = ViTEncoder(config)
        model = Classifier(encoder, num_classes=10, generator=torch.Generator("cpu"))
        pixels = torch.empty(2, config.in_channels, *config.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels).mean().backward()
    assert counter.get_total_flops() // 2 == classifier_training_flops(config, num_classes=10)


@pytest.mark.parametrize("config", [WIDE, TALL], ids=["wide", "tall"])
def test_flops_of_partial_fine_tuning_equal_torch_s_counter(config):
    for trained_blocks in (0, 0.5, 1, 1.5, config.depth):
        with torch.device("meta"):
            model = Classifier(ViTEncoder(config), num_classes=10, generator=torch.Generator("cpu"))
            pixels = torch.empty(2, config.in_channels, *config.image_size)
        freeze_below(model, trained_blocks=trained_blocks)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(pixels).mean().backward()
        expected = classifier_training_flops(config, num_classes=10, trained_blocks=trained_blocks)
        assert counter.get_total_flops() // 2 == expected


BASE_PROBE = {"tokens": 196, "dim": 768, "num_classes": 1000}
"""Sizes of a probe of ViT-B on ImageNet."""


def test_flops_of_probes_equal_torch_s_counter():
    tokens, dim, classes = BASE_PROBE.values()
    with torch.device("meta"):
        drawn = {"num_classes": classes, "generator": torch.Generator("cpu")}
        cases = [
            (LinearProbe(dim, **drawn), (2, dim), linear_probe_flops(dim=dim, num_classes=classes)),
            (
                AttentiveProbe(dim, num_heads=12, num_queries=3, **drawn),
                (2, tokens, dim),
                attentive_probe_flops(num_queries=3, **BASE_PROBE),
            ),
            (
                EfficientProbe(dim, num_queries=32, **drawn),
                (2, tokens, dim),
                efficient_probe_flops(num_queries=32, **BASE_PROBE),
            ),
        ]
        for probe, shape, flops in cases:
            x = torch.empty(shape)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                probe(x)
            assert flops == counter.get_total_flops() // 2


def test_efficient_probing_takes_less_than_a_tenth_of_the_full_probe():
    full, efficient = (
        attentive_probe_flops(num_queries=1, **BASE_PROBE),
        efficient_probe_flops(num_queries=32, **BASE_PROBE),
    )
    assert full / efficient == pytest.approx(21.1, abs=0.1)


def test_encoder_alone():
    assert parameter_count(SIZES["base"]()) / 1e6 == pytest.approx(85.65, abs=0.005)


@of_every_variant
def test_flops_of_a_training_step_equal_torch_s_counter(config):
    assert step_flops(config, backward=True) == training_flops(config)
    assert step_flops(config, backward=False) == forward_flops(config)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("encoder_input", ["visible", "all"])
def test_flops_of_the_paper_s_models_equal_torch_s_counter(size, encoder_input):
    config = MAEConfig(encoder=SIZES[size](), encoder_input=encoder_input)
    assert step_flops(config, backward=True) == training_flops(config)


def test_flops_of_whole_images_equal_torch_s_counter(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, _ = draw(mae_config.encoder, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder.encode(pixels, pool="none")
    assert counter.get_total_flops() == encoder_flops(mae_config.encoder, visible_patches=24)


@pytest.mark.parametrize(("size", "percent", "times"), [("base", 55, 2.37), ("large", 26, 3.24), ("huge", 15, 3.60)])
def test_share_of_the_decoder_and_what_the_asymmetry_saves(size, percent, times):
    config = MAEConfig(encoder=SIZES[size]())
    # shares stated in whole percent
    assert 100 * decoder_flops(config) / forward_flops(config) == pytest.approx(percent, abs=0.5)
    symmetric = replace(config, encoder_input="all")
    # the paper gives 3.3 for L, by its own count of operations (table 1c)
    assert training_flops(symmetric) / training_flops(config) == pytest.approx(times, abs=0.005)


def test_hiding_three_quarters_saves_more_than_three_quarters_of_the_encoder():
    config = SIZES["large"]()
    saved = encoder_flops(config, visible_patches=196) / encoder_flops(config, visible_patches=49)
    assert 3.9 < saved < 4.3


@of_every_variant
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_bytes_equal_what_autograd_keeps(config, dtype, size, draw, generator):
    model = MaskedAutoencoder(config, generator=generator).to(dtype)
    pixels, noise = draw(config.encoder, 3)
    kept = kept_bytes(model, lambda: model(pixels, noise).loss) / 3
    # In float32 exact but for the indices of learned positions (0.15 % here). In bfloat16 the CPU keeps the norms'
    # statistics as bfloat16, where CUDA and the estimate have float32: 2.3 % at a width of 8.
    assert activation_bytes(config, bytes_per_value=size) == pytest.approx(kept, rel=0.03)
    if dtype == torch.float32 and config.encoder.positions == "sine_cosine":
        assert activation_bytes(config, bytes_per_value=size) == kept


@pytest.mark.parametrize("visible", [8, 32])
def test_activation_bytes_of_an_encoder_equal_what_autograd_keeps(visible, generator, draw):
    model = MaskedAutoencoder(MAEConfig(encoder=TALL), generator=generator)
    pixels, noise = draw(TALL, 2)
    ids = noise.argsort(dim=1)[:, :visible]
    kept = kept_bytes(model, lambda: model.encoder(pixels, ids)) / 2
    assert encoder_activation_bytes(TALL, visible_patches=visible, bytes_per_value=4) == kept


def test_recomputed_blocks_hold_their_inputs_and_one_block(generator, draw):
    config = VARIANTS["loss on all"]
    model = MaskedAutoencoder(config, generator=generator)
    pixels, noise = draw(config.encoder, 2)
    tokens = torch.randn(2, config.encoder.cls_tokens + config.encoder.num_patches, config.decoder_embed_dim)
    tokens.requires_grad_()
    block = model.decoder.blocks[0]
    one_block = kept_bytes(block, lambda: block(tokens)) - tokens.nbytes

    for part in (*model.encoder.blocks, *model.decoder.blocks):
        part.forward = lambda x, drop_scale=None, forward=part.forward: checkpoint(
            forward, x, drop_scale, use_reentrant=False
        )
    kept = kept_bytes(model, lambda: model(pixels, noise).loss)
    # exact, because the decoder's block is the larger one and the first to be recomputed
    assert activation_bytes(config, bytes_per_value=4, recompute="blocks") == (kept + one_block) / 2
