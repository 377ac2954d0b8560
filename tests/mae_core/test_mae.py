"""The autoencoder: parity with Hugging Face, what the loss depends on, float32 where it matters."""

import copy
from dataclasses import replace

import pytest
import torch

from mae_core import ConfigError, MAEConfig, MaskedAutoencoder, ViTConfig, from_hf_vitmae, reconstruct, targets
from mae_core.patches import gather_patches


@pytest.mark.parametrize("target", ["raw", "normalised"])
@pytest.mark.parametrize(("side", "mask_ratio"), [(16, 0.75), (20, 0.75), (12, 0.66)])  # 4 of 16, 6.25 of 25, 3.06 of 9
def test_equals_hugging_face(*, target, side, mask_ratio, draw, generator, hugging_face_peer):
    encoder = ViTConfig(image_size=(side, side), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    config = MAEConfig(
        encoder=encoder,
        decoder_embed_dim=8,
        decoder_depth=2,
        decoder_num_heads=2,
        mask_ratio=mask_ratio,
        target=target,
    )
    peer = hugging_face_peer(config)
    model = MaskedAutoencoder(config, generator=generator)
    model.load_state_dict(from_hf_vitmae(peer.state_dict(), config))
    pixels, noise = draw(encoder, 3)

    theirs = peer(pixels, noise=noise)
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
        # relative to the largest entry, as gradients differ in size between layers: worst 5e-6 over 30 draws
        torch.testing.assert_close(parameter.grad / largest, expected[name] / largest, rtol=0, atol=1e-5)


def test_parameter_names_are_pinned(mae_config, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    decoder = {name.removeprefix("decoder.") for name in model.state_dict() if name.startswith("decoder.")}
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    modules = ["embed", *(f"blocks.{i}.{name}" for i in range(2) for name in block), "norm", "head"]
    assert decoder == {"mask_token", *(f"{m}.{kind}" for m in modules for kind in ("weight", "bias"))}


@pytest.mark.parametrize("target", ["raw", "normalised"])
def test_loss_sees_hidden_targets_alone(mae_config, target, draw, generator, monkeypatch):
    model = MaskedAutoencoder(replace(mae_config, target=target), generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    before = model(pixels, noise)
    tokens = model.encoder(pixels, before.masked.ids_visible)
    # the encoder's view is held fixed, so that a perturbed pixel can enter through the target alone
    monkeypatch.setattr(model.encoder, "forward", lambda *_: tokens)
    row, column = divmod(int(before.masked.ids_visible[0, 0]), 4)
    visible = pixels.clone()
    visible[0, 0, 4 * row, 4 * column] += 1.0
    assert torch.equal(model(visible, noise).loss, before.loss)
    row, column = divmod(int(before.masked.ids_hidden[0, 0]), 4)
    hidden = pixels.clone()
    hidden[0, 0, 4 * row, 4 * column] += 1.0
    changed = model(hidden, noise).loss
    assert changed[0] != before.loss[0]
    assert changed[1] == before.loss[1]


def test_hidden_pixels_do_not_reach_the_prediction(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    output = model(pixels, noise)
    other = reconstruct(pixels, output._replace(prediction=output.prediction + 3.0), patch_size=4, mode="raw")
    assert not torch.equal(other, pixels)
    assert torch.equal(model(other, noise).prediction, output.prediction)


def test_without_decoder_positions_all_hidden_predictions_are_one(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    assert model(pixels, noise).prediction.std(dim=1).min() > 1e-4
    model.decoder.positions.zero_()
    prediction = model(pixels, noise).prediction
    # equal tokens through equal sums: rounding of float32 alone
    torch.testing.assert_close(prediction, prediction[:, :1].expand_as(prediction), rtol=0, atol=1e-6)


def test_bfloat16_module_gives_a_float32_loss(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 4)
    full = model(pixels, noise)
    half = copy.deepcopy(model).bfloat16()(pixels, noise)
    assert half.loss.dtype == half.prediction.dtype == torch.float32
    assert torch.equal(half.masked.mask, full.masked.mask)
    # bfloat16 keeps 8 bits: each prediction is off by up to 1 %, with random sign, over 864 numbers a sample: worst 4e-4
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


@pytest.mark.parametrize(("target", "mode"), [("raw", "raw"), ("normalised", "true_stats")])
def test_a_perfect_prediction_reconstructs_the_image(mae_config, draw, generator, target, mode):
    pixels, noise = draw(mae_config.encoder, 2)
    output = MaskedAutoencoder(replace(mae_config, target=target), generator=generator)(pixels, noise)
    perfect = gather_patches(targets(pixels, patch_size=4, target=target), output.masked.ids_hidden)
    shown = reconstruct(pixels, output._replace(prediction=perfect), patch_size=4, mode=mode)
    torch.testing.assert_close(shown, pixels, rtol=0, atol=1e-6)  # divided and multiplied once in float32
    blank = reconstruct(pixels, output._replace(prediction=torch.zeros_like(perfect)), patch_size=4, mode="raw")
    share = (blank == 0).float().mean(dim=(1, 2, 3))
    assert torch.equal(share, torch.full((2,), 0.75))


def test_wrong_arguments_are_answered(mae_config, draw, generator):
    model = MaskedAutoencoder(mae_config, generator=generator)
    pixels, noise = draw(mae_config.encoder, 2)
    with pytest.raises(ConfigError, match="one number a patch"):
        model(pixels, noise[:, :-1])
    with pytest.raises(ConfigError, match="mode='mean'"):
        reconstruct(pixels, model(pixels, noise), patch_size=4, mode="mean")
