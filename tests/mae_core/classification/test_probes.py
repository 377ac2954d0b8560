"""Probes: what they compute, whose statistics they standardise by, how they are initialised."""

import pytest
import torch
from torch.nn import functional as F

from mae_core import AttentiveProbe, ConfigError, EfficientProbe, LinearProbe

BATCH_NORM_BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def attentive(generator, *, dim=12, num_classes=5, num_heads=3, num_queries=2):
    return AttentiveProbe(dim, num_classes, num_heads=num_heads, num_queries=num_queries, generator=generator)


def efficient(generator, *, dim=12, num_classes=5, num_queries=3):
    return EfficientProbe(dim, num_classes, num_queries=num_queries, generator=generator)


def features(generator, *shape):
    """Features around 0.1 with standard deviation 0.003, so a variance of nine times the 1e-6 that is added to it."""
    return 0.1 + 0.003 * torch.randn(shape, generator=generator)


def standardised(values, *, mean, variance):
    return (values - mean) / (variance + 1e-6).sqrt()


def test_linear_probe_in_train_mode_uses_the_batch_and_updates_the_running_statistics(generator):
    probe = LinearProbe(8, 5, generator=generator)
    torch.nn.init.normal_(probe.head.bias, generator=generator)
    x = features(generator, 6, 8)
    expected = standardised(x, mean=x.mean(0), variance=x.var(0, correction=0)) @ probe.head.weight.T + probe.head.bias
    # standardised values of 3, times 0.01: rounding of the mean 0.1 in float32, 1e-8 of a deviation of 0.003
    torch.testing.assert_close(probe(x), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(probe.norm.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(probe.norm.running_var, 0.9 + 0.1 * x.var(0))


def test_linear_probe_in_eval_mode_uses_the_running_statistics_alone(generator):
    probe = LinearProbe(8, 5, generator=generator)
    x = features(generator, 6, 8)
    probe(x)
    probe.eval()
    mean, variance = probe.norm.running_mean.clone(), probe.norm.running_var.clone()
    expected = standardised(x, mean=mean, variance=variance) @ probe.head.weight.T
    torch.testing.assert_close(probe(x), expected, rtol=0, atol=1e-7)  # logits of 1e-3, rounded in float32
    torch.testing.assert_close(probe(x[:1]), expected[:1], rtol=0, atol=1e-7)  # an image does not depend on its batch
    assert torch.equal(probe.norm.running_mean, mean)
    assert torch.equal(probe.norm.running_var, variance)


def test_running_statistics_converge_to_those_of_the_split(generator):
    probe, split = LinearProbe(8, 5, generator=generator), features(generator, 64, 8)
    for _ in range(200):  # 0.9 ** 200 = 7e-10 of the initial value remains
        probe(split)
    torch.testing.assert_close(probe.norm.running_mean, split.mean(0))
    torch.testing.assert_close(probe.norm.running_var, split.var(0), rtol=1e-3, atol=0)


def test_linear_probe_starts_normal_and_trains_the_linear_layer_alone(generator):
    probe = LinearProbe(400, 100, generator=generator)
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}
    assert {name for name, _ in probe.named_buffers()} == BATCH_NORM_BUFFERS
    weight = probe.head.weight
    # 40000 draws: standard errors of the mean and of the deviation are 5e-5 and 3.5e-5; four of them
    assert weight.mean().item() == pytest.approx(0.0, abs=2e-4)
    assert weight.std().item() == pytest.approx(0.01, abs=1.4e-4)
    assert weight.abs().max().item() > 0.035  # the tail of a normal at 3.5 deviations; a uniform would end at 1.73
    assert torch.equal(probe.head.bias, torch.zeros(100))


def test_attentive_probe_equals_attention_written_out(generator):
    probe = attentive(generator).double()
    for part in probe.parameters():
        torch.nn.init.normal_(part, generator=generator)  # scores and values of size 1, so that every part counts
    x = features(generator, 4, 7, 12).double()
    flat = x.reshape(-1, 12)
    normed = standardised(x, mean=flat.mean(0), variance=flat.var(0, correction=0))  # over images and tokens
    keys, values = normed @ probe.keys.weight.T, normed @ probe.values.weight.T
    pooled = torch.zeros(4, 12, dtype=torch.float64)
    for query in probe.queries:
        for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
            shares = (keys[..., head] @ query[head] / 4**0.5).softmax(dim=1)  # [B, T]
            pooled[:, head] += (shares[..., None] * values[..., head]).sum(dim=1) / 2
    expected = pooled @ probe.head.weight.T + probe.head.bias
    # logits of size 10, rounded to float32 at the end
    torch.testing.assert_close(probe(x), expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(probe.norm.running_mean, 0.1 * flat.mean(0))
    torch.testing.assert_close(probe.norm.running_var, 0.9 + 0.1 * flat.var(0))


def test_attentive_probe_reads_a_set_of_tokens_of_each_image_alone_in_eval_mode(generator):
    probe = attentive(generator).eval()
    x = torch.randn(4, 7, 12, generator=generator)
    logits = probe(x)
    torch.testing.assert_close(probe(x[:, torch.randperm(7, generator=generator)]), logits)
    torch.testing.assert_close(probe(x[2:3]), logits[2:3])
    assert torch.equal(probe.norm.running_mean, torch.zeros(12))


def test_attentive_probe_is_initialised_as_documented_and_every_parameter_gets_a_gradient(generator):
    probe = attentive(generator, dim=256, num_classes=100, num_heads=4, num_queries=64)
    shapes = {name: tuple(parameter.shape) for name, parameter in probe.named_parameters()}
    assert shapes == {
        "queries": (64, 256),
        "keys.weight": (256, 256),
        "values.weight": (256, 256),
        "head.weight": (100, 256),
        "head.bias": (100,),
    }
    # n draws of a normal: standard errors of mean and deviation are s / sqrt(n) and s / sqrt(2 n); five of them
    for weight, deviation in ((probe.queries, 0.02), (probe.head.weight, 0.01)):
        assert weight.mean().item() == pytest.approx(0.0, abs=5 * deviation / weight.numel() ** 0.5)
        assert weight.std().item() == pytest.approx(deviation, rel=5 / (2 * weight.numel()) ** 0.5)
        assert weight.abs().max().item() > 3.5 * deviation
    bound = (6 / 512) ** 0.5  # xavier: uniform within sqrt(6 / (256 + 256)), 65536 draws come within 0.1 % of its ends
    for weight in (probe.keys.weight, probe.values.weight):
        assert 0.999 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert weight.mean().item() == pytest.approx(0.0, abs=5 * bound / 3**0.5 / 256)
    assert not torch.equal(probe.keys.weight, probe.values.weight)
    F.cross_entropy(probe(torch.randn(4, 7, 256, generator=generator)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in probe.parameters())


def test_efficient_probe_equals_its_source_which_projects_every_token(generator):
    probe = efficient(generator).double()
    for part in probe.parameters():
        torch.nn.init.normal_(part, generator=generator)
    x = torch.randn(4, 7, 12, generator=generator).double()
    values = x @ probe.values.weight.T  # [B, T, D]
    pooled = torch.empty(4, 12, dtype=torch.float64)
    for number, query in enumerate(probe.queries):
        shares = (x @ query / 12**0.5).softmax(dim=1)  # [B, T]: the tokens are the keys
        block = slice(4 * number, 4 * number + 4)
        pooled[:, block] = (shares[..., None] * values[..., block]).sum(dim=1)
    torch.testing.assert_close(probe.pool(x), pooled)
    normed = standardised(pooled, mean=pooled.mean(0), variance=pooled.var(0, correction=0))
    expected = normed @ probe.head.weight.T + probe.head.bias
    torch.testing.assert_close(probe(x), expected.float(), rtol=1e-5, atol=1e-5)  # rounded to float32 at the end
    assert {name: tuple(p.shape) for name, p in probe.named_parameters()} == {
        "queries": (3, 12),
        "values.weight": (12, 12),
        "head.weight": (5, 12),
        "head.bias": (5,),
    }
    F.cross_entropy(probe(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in probe.parameters())


def test_efficient_probe_is_initialised_as_its_source(generator):
    probe = efficient(generator, dim=256, num_classes=100, num_queries=64)
    assert probe.queries.std().item() == pytest.approx(0.02, rel=0.03)  # 16384 draws
    assert probe.head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    bound = 256**-0.5
    assert 0.999 * bound < probe.values.weight.abs().max().item() <= bound
    assert probe.values.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


@pytest.mark.parametrize("build", [lambda g: LinearProbe(12, 5, generator=g), attentive, efficient])
def test_initial_weights_come_from_the_generator_alone(build):
    before = torch.get_rng_state()
    first, again, other = (build(torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = set(first) - BATCH_NORM_BUFFERS - {"head.bias"}
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert all(tensor.isfinite().all() for tensor in first.values())


@pytest.mark.parametrize(("build", "shape"), [(LinearProbe, (4, 12)), (attentive, (4, 7, 12)), (efficient, (4, 7, 12))])
def test_logits_are_float32_whatever_the_features(generator, build, shape):
    probe = build(12, 5, generator=generator) if build is LinearProbe else build(generator)
    x = torch.randn(shape, generator=generator).bfloat16()
    assert torch.equal(probe.train()(x), probe(x.float()))  # bfloat16 features, float32 arithmetic
    assert probe.bfloat16()(x).dtype == torch.float32


def test_batch_norm_can_be_made_synchronous(generator):
    for probe in (LinearProbe(12, 5, generator=generator), attentive(generator)):
        assert isinstance(torch.nn.SyncBatchNorm.convert_sync_batchnorm(probe).norm, torch.nn.SyncBatchNorm)


def test_wrong_values_are_refused(generator):
    with pytest.raises(ConfigError, match="dim=12 is not divisible by num_heads=5"):
        attentive(generator, num_heads=5)
    with pytest.raises(ConfigError, match="dim=12 is not divisible by num_queries=5"):
        efficient(generator, num_queries=5)
    with pytest.raises(ConfigError, match=r"\(2, 12\).*do not pool"):
        efficient(generator)(torch.zeros(2, 12))
    with pytest.raises(ConfigError, match="num_queries=0"):
        attentive(generator, num_queries=0)
    with pytest.raises(ConfigError, match="num_heads=0"):
        attentive(generator, num_heads=0)
    with pytest.raises(ConfigError, match="num_classes=0"):
        LinearProbe(12, 0, generator=generator)
    with pytest.raises(ConfigError, match="dim=0"):
        LinearProbe(0, 5, generator=generator)
    # as many tokens as dimensions: BatchNorm by itself would silently take tokens for features
    with pytest.raises(ConfigError, match=r"\(2, 12, 12\).*pool the tokens"):
        LinearProbe(12, 5, generator=generator)(torch.zeros(2, 12, 12))
    with pytest.raises(ConfigError, match=r"\(2, 12\).*do not pool"):
        attentive(generator)(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="more than 1 value"):
        LinearProbe(12, 5, generator=generator)(torch.zeros(1, 12))
