"""The autoencoder: parity with Hugging Face, what the loss depends on, and float32 where it matters."""

import copy
from dataclasses import replace

import pytest
import torch

from mae_core import (
    ConfigError,
    MAEConfig,
    MaskedAutoencoder,
    ViTConfig,
    base,
    from_hf_vitmae,
    huge,
    patch_basis,
    patchify,
    target_of,
)
from mae_core.patches import gather_patches


def small(**changes):
    encoder = ViTConfig(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    return MAEConfig(
        **{"encoder": encoder, "decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2, **changes}
    )


PARITY = {  # the shapes that are compared
    "16 patches": small(),
    "16 patches, raw": small(target="raw"),
    "25 patches, 6.25 visible": small(encoder=replace(small().encoder, image_size=(20, 20))),
    "9 patches, 3.06 visible": small(encoder=replace(small().encoder, image_size=(12, 12)), mask_ratio=0.66),
    "rectangular": small(encoder=replace(small().encoder, image_size=(16, 24))),
    "huge/14, fewer and narrower blocks": small(
        encoder=huge(image_size=(56, 56), embed_dim=80, depth=2, num_heads=2), decoder_embed_dim=64
    ),
    "base/16, whole": MAEConfig(encoder=base()),
}


@pytest.mark.parametrize("shape", PARITY)
def test_equals_hugging_face(*, shape, draw, generator, hugging_face_peer):
    config = PARITY[shape]
    peer = hugging_face_peer(config)
    model = MaskedAutoencoder(config, generator=generator)
    model.load_state_dict(from_hf_vitmae(peer.state_dict(), config))
    pixels, noise = draw(config.encoder, 3)

    rectangular = config.encoder.grid[0] != config.encoder.grid[1]
    theirs = peer(pixels, noise=noise, interpolate_pos_encoding=rectangular)
    ours = model(pixels, noise)
    assert torch.equal(ours.masked.mask, theirs.mask)
    ids = ours.masked.ids_hidden[..., None].expand_as(ours.prediction)
    # float32 on CPU, sums in another order: worst 2e-6 on predictions of size 1 over 30 draws; bf16 would show as 1e-2
    torch.testing.assert_close(ours.prediction, theirs.logits.gather(1, ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss.mean(), theirs.loss, rtol=1e-5, atol=1e-5)

    theirs.loss.backward()
    ours.loss.mean().backward()
    fixed = {name: value for name, value in peer.state_dict().items() if name.endswith(("embeddings", "pos_embed"))}
    gradients = {name: p.grad for name, p in peer.named_parameters() if p.requires_grad}
    expected = from_hf_vitmae(gradients | fixed, config)
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max()
        assert largest > 1e-4, name
        # relative to the largest entry, because gradients differ in size between layers: worst 5e-6 over 30 draws
        torch.testing.assert_close(parameter.grad / largest, expected[name] / largest, rtol=0, atol=1e-5)


def test_parameter_names_are_pinned(mae_config, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    decoder = {name.removeprefix("decoder.") for name in model.state_dict() if name.startswith("decoder.")}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["embed", *(f"blocks.{i}.{name}" for i in range(2) for name in block), "norm", "head"]
    assert decoder == {"mask_token", *(f"{m}.{kind}" for m in modules for kind in ("weight", "bias"))}


@pytest.mark.parametrize("cls_tokens", [1, 8])
@pytest.mark.parametrize("target", ["raw", "normalised", "pca"])
def test_loss_sees_hidden_targets_only(cls_tokens, target, draw, generator, monkeypatch):
    config = small(encoder=replace(small().encoder, cls_tokens=cls_tokens), target=target, pca_components=7)
    basis = patch_basis(torch.randn(64, 48, generator=generator), components=7)
    model = MaskedAutoencoder(config, generator=generator, basis=basis)
    pixels, noise = draw(config.encoder, 2)
    before = model(pixels, noise)
    tokens = model.encoder(pixels, before.masked.ids_visible)
    # the encoder's tokens are held fixed, so that a perturbed pixel can enter through the target only
    monkeypatch.setattr(model.encoder, "forward", lambda *_: tokens)
    for patch in before.masked.ids_visible[0].tolist():
        row, column = divmod(patch, 4)
        visible = pixels.clone()
        visible[0, 0, 4 * row, 4 * column] += 1.0
        assert torch.equal(model(visible, noise).loss, before.loss)
    for patch in before.masked.ids_hidden[0].tolist():
        row, column = divmod(patch, 4)
        hidden = pixels.clone()
        hidden[0, 0, 4 * row, 4 * column] += 1.0
        changed = model(hidden, noise).loss
        assert changed[0] != before.loss[0]
        assert changed[1] == before.loss[1]


def test_loss_on_all_patches_sees_visible_targets_too(draw, generator):
    config = small(target="raw")
    model = MaskedAutoencoder(config, generator=generator)
    everywhere = MaskedAutoencoder(replace(config, loss_on="all"), generator=torch.Generator().manual_seed(4))
    everywhere.load_state_dict(model.state_dict())
    pixels, noise = draw(config.encoder, 2)
    hidden, all_ = model(pixels, noise), everywhere(pixels, noise)
    # the head is applied to more rows: another blocking of the same float32 products
    torch.testing.assert_close(all_.prediction, hidden.prediction, rtol=0, atol=1e-6)
    assert (all_.loss - hidden.loss).abs().min() > 1e-3
    everywhere.decoder.head.weight.data.zero_()  # every prediction is 0, so the loss is the mean square of the target
    patches = patchify(pixels, 4)
    torch.testing.assert_close(everywhere(pixels, noise).loss, patches.square().mean(dim=(1, 2)), rtol=1e-6, atol=0)


def test_mask_tokens_in_the_encoder_carry_positions_and_no_pixels(draw, generator):
    config = small(encoder_input="all")
    model = MaskedAutoencoder(config, generator=generator)
    assert {name for name, _ in model.named_parameters() if name.endswith("mask_token")} == {"mask_token"}
    pixels, noise = draw(config.encoder, 2)
    output = model(pixels, noise)
    other = model.reconstruct(pixels, output._replace(prediction=output.prediction + 3.0))
    assert not torch.equal(other, pixels)
    assert torch.equal(model(other, noise).prediction, output.prediction)
    seen = []
    model.encoder.norm.register_forward_hook(lambda _module, _inputs, tokens: seen.append(tokens))
    model(pixels, noise)
    assert seen[0].shape == (2, 1 + 16, 16)
    visible = MaskedAutoencoder(small(), generator=generator)
    visible.encoder.norm.register_forward_hook(lambda _module, _inputs, tokens: seen.append(tokens))
    visible(pixels, noise)
    assert seen[1].shape == (2, 1 + 4, 16)


def test_hidden_pixels_do_not_reach_the_prediction(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    output = model(pixels, noise)
    other = model.reconstruct(pixels, output._replace(prediction=output.prediction + 3.0))
    assert not torch.equal(other, pixels)
    assert torch.equal(model(other, noise).prediction, output.prediction)


def test_without_decoder_positions_all_hidden_predictions_are_equal(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    assert model(pixels, noise).prediction.std(dim=1).min() > 1e-4
    model.decoder.positions.zero_()
    prediction = model(pixels, noise).prediction
    # equal tokens through equal sums: only float32 rounding
    torch.testing.assert_close(prediction, prediction[:, :1].expand_as(prediction), rtol=0, atol=1e-6)


def test_a_bfloat16_module_keeps_the_basis_in_float32(draw, generator):
    basis = patch_basis(torch.randn(64, 48, generator=generator), components=7)
    model = MaskedAutoencoder(small(target="pca", pca_components=7), generator=generator, basis=basis).bfloat16()
    assert model.basis_on(torch.device("cpu")).components.dtype == torch.float32
    assert model(*draw(model.config.encoder, 2)).loss.dtype == torch.float32


def test_bfloat16_module_gives_a_float32_loss(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 4)
    full = model(pixels, noise)
    half = copy.deepcopy(model).bfloat16()(pixels, noise)
    assert half.loss.dtype == half.prediction.dtype == torch.float32
    assert torch.equal(half.masked.mask, full.masked.mask)
    # bfloat16 keeps 8 bits: predictions are off by up to 1 % with random signs, over 864 numbers per sample: worst 4e-4
    torch.testing.assert_close(half.loss, full.loss, rtol=2e-3, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(pixels, noise)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss, full.loss, rtol=2e-3, atol=0)
    with pytest.raises(TypeError, match="float32"):
        model(pixels.bfloat16(), noise)


def test_every_parameter_gets_a_gradient(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    model(*draw(mae_config.encoder, 2)).loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_sample_does_not_depend_on_its_batch(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 3)
    # float32, matrix products of another height: rounding of a loss of size 1
    torch.testing.assert_close(model(pixels[1:2], noise[1:2]).loss, model(pixels, noise).loss[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["raw", "normalised", "pca"])
def test_a_perfect_prediction_reconstructs_the_image(target, draw, generator):
    config = small(target=target, pca_components=48)
    basis = patch_basis(torch.randn(64, 48, generator=generator), components=48)
    model = MaskedAutoencoder(config, generator=generator, basis=basis)
    pixels, noise = draw(config.encoder, 2)
    output = model(pixels, noise)
    patches = gather_patches(patchify(pixels, 4), output.masked.ids_hidden)
    shown = model.reconstruct(pixels, output._replace(prediction=target_of(patches, target=target, basis=basis)))
    # one division and one multiplication in float32; for "pca" two products of 48 numbers
    torch.testing.assert_close(shown, pixels, rtol=0, atol=1e-5 if target == "pca" else 1e-6)


def test_reconstruction_leaves_visible_patches_alone(draw, generator):
    model = MaskedAutoencoder(small(target="raw"), generator=generator)
    pixels, noise = draw(model.config.encoder, 2)
    output = model(pixels, noise)
    blank = model.reconstruct(pixels, output._replace(prediction=torch.zeros_like(output.prediction)))
    assert torch.equal((blank == 0).float().mean(dim=(1, 2, 3)), torch.full((2,), 0.75))
    assert torch.equal(blank[blank != 0], pixels[blank != 0])


def test_wrong_arguments_are_refused(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    with pytest.raises(ConfigError, match="one number per patch"):
        model(pixels, noise[:, :-1])
    components = MaskedAutoencoder(small(target="pca", pca_components=5), generator=generator)
    with pytest.raises(ConfigError, match="patch_basis"):
        components(*draw(components.config.encoder, 1))
