"""Mixup and CutMix mix images and labels as timm does for the same draws."""

import numpy as np
import pytest
import timm.data.mixup
import torch
from timm.data.mixup import Mixup

from mae_core.classification.mixing import MIX_UNIFORMS, beta_quantile, mix_plan, mixed, mixed_labels
from mae_core.losses import cross_entropy_per_sample
from mae_core.randomness import uniform_rows

SIZE = (12, 16)


def drawn(count: int) -> np.ndarray:
    return uniform_rows(0, [0] * count, range(count), "mixup", MIX_UNIFORMS)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("seed", range(6))
def test_a_pair_is_mixed_as_timm_mixes_a_batch_of_two(monkeypatch, mixup, cutmix, seed):
    uniforms = drawn(12)[2 * seed : 2 * seed + 2]
    which, share, *centre = uniforms[0]
    places = iter(int(u * side) for u, side in zip(centre, SIZE, strict=True))
    monkeypatch.setattr(timm.data.mixup.np.random, "rand", lambda: which)
    monkeypatch.setattr(timm.data.mixup.np.random, "beta", lambda a, b: float(beta_quantile(np.array([share]), a)[0]))
    monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda low, high, size=None: next(places))
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = torch.randn(2, 3, *SIZE, generator=generator), torch.tensor([1, 3])
    plan = torch.from_numpy(mix_plan(uniforms, mixup=mixup, cutmix=cutmix, size=SIZE))
    ours, targets = mixed(pixels, plan), mixed_labels(labels, plan, num_classes=5)
    oracle = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.1, num_classes=5)
    theirs, soft = oracle(pixels.clone(), labels)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(targets * 0.9 + 0.1 / 5, soft, atol=1e-6)
    logits = torch.randn(2, 5, generator=generator)
    expected = -(soft * logits.log_softmax(dim=1)).sum(dim=1)
    assert torch.allclose(cross_entropy_per_sample(logits, targets, label_smoothing=0.1), expected, atol=1e-6)


def test_shares_and_boxes_are_distributed_as_timms():
    plan = mix_plan(drawn(4000), mixup=0.8, cutmix=1.0, size=(32, 32))
    cut = plan[:, 2] > plan[:, 1]
    assert cut.mean() == pytest.approx(0.5, abs=0.03)
    rng = np.random.default_rng(0)
    assert np.sort(plan[~cut & (plan[:, 0] < 1), 0])[::100] == pytest.approx(
        np.quantile(rng.beta(0.8, 0.8, 50_000), np.linspace(0, 1, (~cut & (plan[:, 0] < 1)).sum())[::100]), abs=0.06
    )
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    theirs = [timm.data.mixup.cutmix_bbox_and_lam((1, 3, 32, 32), rng.beta(1, 1))[1] for _ in range(4000)]
    assert plan[cut, 0].mean() == pytest.approx(np.mean([one for one in theirs if one < 1]), abs=0.03)


@pytest.mark.parametrize("parameter", [0.3, 0.8, 1.0, 4.0])
def test_the_quantiles_are_those_of_the_beta_distribution(parameter):
    special = pytest.importorskip("scipy.special")
    uniforms = np.linspace(0.001, 0.999, 501)
    expected = special.betaincinv(parameter, parameter, uniforms)
    assert beta_quantile(uniforms, parameter) == pytest.approx(expected, abs=2e-3 if parameter < 0.5 else 1e-5)


def test_an_image_without_a_partner_stays_as_it_is():
    pixels, plan = torch.randn(3, 3, *SIZE), torch.from_numpy(mix_plan(drawn(3), mixup=0.8, cutmix=0.0, size=SIZE))
    assert torch.allclose(mixed(pixels, plan)[2], pixels[2])
    assert mixed_labels(torch.tensor([0, 1, 2]), plan, num_classes=3)[2].tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(mixed(pixels[:2], plan[:2]), mixed(pixels, plan)[:2])
