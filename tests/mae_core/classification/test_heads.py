"""The classifier: what it pools, that every parameter gets a gradient, that drop path keeps the mean."""

from dataclasses import replace

import pytest
import torch

from mae_core import Classifier, ConfigError, ViTEncoder, drop_path_scales


@pytest.fixture
def encoder(vit_config, generator):
    return ViTEncoder(vit_config, generator=generator)


def test_mean_pool_uses_a_fresh_norm_on_unnormed_patch_tokens(encoder, draw, generator):
    pixels, _ = draw(encoder.config, 3)
    classifier = Classifier(encoder, num_classes=5, generator=generator)
    pooled = torch.nn.functional.layer_norm(encoder.tokens(pixels)[:, 1:].mean(dim=1), (16,), eps=1e-6)
    expected = pooled @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(pixels), expected, rtol=0, atol=1e-8)  # logits of 1e-4, rounded in float32
    assert not any(name.startswith("encoder.norm") for name, _ in classifier.named_parameters())
    assert isinstance(encoder.norm, torch.nn.LayerNorm)  # the original encoder is untouched


def test_cls_pool_uses_the_pretrained_norm(encoder, draw, generator):
    pixels, _ = draw(encoder.config, 3)
    classifier = Classifier(encoder, num_classes=5, pool="cls", generator=generator)
    expected = encoder.encode(pixels, pool="cls") @ classifier.head.weight.T
    torch.testing.assert_close(classifier(pixels), expected, rtol=0, atol=1e-8)  # logits of 1e-4, rounded in float32
    assert not any(name.startswith("fc_norm") for name, _ in classifier.named_parameters())


@pytest.mark.parametrize("norm", ["fresh", "pretrained"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("cls_tokens", [1, 8])
def test_pool_reads_its_own_tokens_alone(vit_config, draw, generator, cls_tokens, pool, norm):
    encoder = ViTEncoder(replace(vit_config, cls_tokens=cls_tokens), generator=generator)
    classifier = Classifier(encoder, num_classes=5, pool=pool, norm=norm, generator=generator)
    pixels, _ = draw(encoder.config, 3)
    logits = classifier(pixels)
    tokens = encoder.tokens(pixels)
    assert tokens.shape == (3, cls_tokens + 24, 16)
    for index in range(cls_tokens + 24):
        # after the last block nothing mixes tokens, so a change to a token that is not pooled changes nothing
        def shift(module, arguments, output, index=index):
            return output + torch.eye(output.shape[1])[index][:, None] * torch.randn(16, generator=generator)

        handle = classifier.encoder.blocks[-1].register_forward_hook(shift)
        assert torch.equal(classifier(pixels), logits) == ((index < cls_tokens) != (pool == "cls"))
        handle.remove()


@pytest.mark.parametrize("cls_tokens", [1, 8])
def test_feature_is_pooling_and_norm(vit_config, draw, generator, cls_tokens):
    encoder = ViTEncoder(replace(vit_config, cls_tokens=cls_tokens), generator=generator)
    for part in encoder.norm.parameters():
        torch.nn.init.normal_(part, generator=generator)  # as if trained, so that it differs from a fresh norm
    pixels, _ = draw(encoder.config, 3)
    unnormed = encoder.tokens(pixels)
    means = {"mean": unnormed[:, cls_tokens:].mean(dim=1), "cls": unnormed[:, :cls_tokens].mean(dim=1)}
    for pool, mean in means.items():
        fresh = torch.nn.functional.layer_norm(mean, (16,), eps=1e-6)
        for norm, feature in (("fresh", fresh), ("pretrained", encoder.encode(pixels, pool=pool))):
            classifier = Classifier(encoder, num_classes=5, pool=pool, norm=norm, generator=generator)
            assert (classifier.pool, classifier.norm) == (pool, norm)
            # logits of 1e-4, rounded in float32
            torch.testing.assert_close(classifier(pixels), feature @ classifier.head.weight.T, rtol=0, atol=1e-8)
    defaults = {pool: Classifier(encoder, num_classes=5, pool=pool, generator=generator).norm for pool in means}
    assert defaults == {"mean": "fresh", "cls": "pretrained"}


@pytest.mark.parametrize("norm", ["fresh", "pretrained"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_parameter_gets_a_gradient(encoder, draw, generator, pool, norm):
    classifier = Classifier(encoder, num_classes=5, pool=pool, norm=norm, generator=generator)
    scales = drop_path_scales(torch.ones(2, 2, 2) * 0.9, drop_path=0.5)
    classifier(draw(encoder.config, 2)[0], scales).square().sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_head_starts_near_zero_and_deterministic(encoder, generator):
    heads = [
        Classifier(encoder, num_classes=1000, generator=torch.Generator().manual_seed(1)).head.weight for _ in range(2)
    ]
    assert torch.equal(*heads)
    assert heads[0].std().item() == pytest.approx(2e-5, rel=0.03)  # 16000 draws: standard error 0.6 %, five of them


def test_bfloat16_encoder_gives_float32_logits(encoder, draw, generator):
    classifier = Classifier(encoder.bfloat16(), num_classes=5, generator=generator)
    assert classifier.head.weight.dtype == torch.bfloat16
    assert classifier(draw(encoder.config, 2)[0]).dtype == torch.float32


def test_drop_path_grows_with_depth_and_keeps_the_mean(generator):
    scales = drop_path_scales(torch.rand(20_000, 5, 2, generator=generator), drop_path=0.4)
    dropped = (scales == 0).double().mean(dim=(0, 2))
    # binomial deviation at most sqrt(0.24 / 40000) = 0.0025; four of them
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).double(), rtol=0, atol=0.01)
    torch.testing.assert_close(scales.mean(dim=(0, 2)), torch.ones(5), rtol=0, atol=0.017)
    assert torch.equal(scales[:, 0], torch.ones(20_000, 2))
    assert scales.max().item() == pytest.approx(1 / 0.6)
    assert torch.equal(drop_path_scales(torch.zeros(2, 3, 2), drop_path=0.0), torch.ones(2, 3, 2))


def test_wrong_values_are_refused(encoder, generator):
    with pytest.raises(ConfigError, match=r"drop_path=1.0"):
        drop_path_scales(torch.zeros(1, 1, 2), drop_path=1.0)
    with pytest.raises(ConfigError, match="pool='max'"):
        Classifier(encoder, num_classes=5, pool="max", generator=generator)
    with pytest.raises(ConfigError, match="norm='final'"):
        Classifier(encoder, num_classes=5, norm="final", generator=generator)
    with pytest.raises(ConfigError, match="num_classes=0"):
        Classifier(encoder, num_classes=0, generator=generator)
