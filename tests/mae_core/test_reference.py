"""The fast path equals the paper's simple implementation in every variant."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, base, patch_basis, reference_forward

ENCODER = ViTConfig(image_size=(24, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
SMALL = MAEConfig(encoder=ENCODER, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2, pca_components=5)


def both(config, generator, *, dtype):
    """Yield (output, gradients by name) of the fast path, then of the reference, with the same weights, images and noise."""
    count = config.encoder.num_patches
    pixels = torch.randn(3, 3, *config.encoder.image_size, generator=generator).to(dtype)
    noise = torch.rand(3, count, generator=generator)
    basis = patch_basis(torch.randn(200, config.encoder.patch_dim, generator=generator), components=5)
    model = MaskedAutoencoder(config, generator=generator, basis=basis).to(dtype)
    for compute in (model, lambda *batch: reference_forward(model, *batch)):
        model.zero_grad()
        output = compute(pixels, noise)
        output.loss.mean().backward()
        yield output, {name: parameter.grad for name, parameter in model.named_parameters()}


def error(gradients, expected):
    """Distance of two lists of gradients relative to the norm of the second."""
    ours, theirs = (torch.cat([gradient.flatten() for gradient in some]) for some in (gradients, expected))
    return (ours - theirs).norm() / theirs.norm()


@pytest.mark.parametrize("positions", ["sine_cosine", "learned"])
@pytest.mark.parametrize(
    ("encoder_input", "loss_on", "target"), product(["visible", "all"], ["hidden", "all"], ["raw", "normalised", "pca"])
)
def test_the_fast_path_equals_the_reference(encoder_input, loss_on, target, positions, generator):
    encoder = replace(ENCODER, positions=positions, cls_tokens=1 if positions == "learned" else 3)
    config = replace(SMALL, encoder=encoder, encoder_input=encoder_input, loss_on=loss_on, target=target)
    (fast, fast_gradients), (slow, slow_gradients) = both(config, generator, dtype=torch.float32)
    assert torch.equal(fast.masked.mask, slow.masked.mask)
    # float32, sums in another order
    torch.testing.assert_close(fast.loss, slow.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.prediction, slow.prediction, rtol=0, atol=2e-6)
    assert error(fast_gradients.values(), slow_gradients.values()) < 1e-6
    # with float64 weights only prediction and loss are float32, so each parameter's gradient can be compared by itself
    (fast, fast_gradients), (slow, slow_gradients) = both(config, generator, dtype=torch.float64)
    assert fast_gradients.keys() == slow_gradients.keys()
    for name, gradient in fast_gradients.items():
        assert error([gradient], [slow_gradients[name]]) < 1e-6, name


@pytest.mark.parametrize("masking", ["block", "grid", "cell"])
def test_the_fast_path_equals_the_reference_for_every_masking(masking, generator):
    (fast, _), (slow, _) = both(replace(SMALL, masking=masking), generator, dtype=torch.float32)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=0, atol=1e-6)


def test_at_the_size_of_the_paper_s_base_model(generator):
    config = MAEConfig(encoder=base(depth=2), decoder_depth=1)
    (fast, fast_gradients), (slow, slow_gradients) = both(config, generator, dtype=torch.float32)
    torch.testing.assert_close(fast.loss, slow.loss, rtol=0, atol=1e-6)
    assert error(fast_gradients.values(), slow_gradients.values()) < 1e-6
