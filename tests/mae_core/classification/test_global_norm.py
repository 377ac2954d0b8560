"""GlobalNorm against torch's BatchNorm on the whole batch, whatever the batch is cut into."""

import pytest
import torch

from mae_core import GlobalNorm

DIM = 5


def alone(_: torch.Tensor) -> None:
    """The sum over a single rank."""


def batch_norm() -> torch.nn.BatchNorm1d:
    return torch.nn.BatchNorm1d(DIM, affine=False, eps=1e-6)


@pytest.mark.parametrize("shape", [(12, DIM), (12, 7, DIM)], ids=["features", "tokens"])
@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3), (1,) * 12])
def test_any_cut_of_a_batch_is_normalised_as_the_whole(generator, shape, sizes):
    norm, torchs = GlobalNorm(DIM, eps=1e-6), batch_norm()
    for _ in range(3):
        x = 3 + 0.1 * torch.randn(shape, generator=generator)
        parts = x.split(sizes)
        norm.observe([(part, torch.ones(len(part))) for part in parts], share=alone)
        ours = torch.cat([norm(part) for part in parts])
        norm.update()
        theirs = torchs(x.reshape(-1, DIM)).reshape(shape)
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=2e-5
        )  # values of 3, a deviation of 0.1: 2e-7 * 3 / 0.1, a few times
    torch.testing.assert_close(norm.running_mean.data, torchs.running_mean)
    torch.testing.assert_close(norm.running_var.data, torchs.running_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.eval()(x[:2]), torchs.eval()(x[:2].reshape(-1, DIM)).reshape(x[:2].shape))


def test_padding_does_not_count(generator):
    x = torch.randn(6, DIM, generator=generator)
    norm = GlobalNorm(DIM, eps=1e-6)
    padding = torch.full((1, DIM), 1e6)
    norm.observe([(x, torch.ones(6)), (padding, torch.zeros(1))], share=alone)
    torch.testing.assert_close(norm(x), batch_norm()(x))


def test_statistics_are_those_of_all_ranks(generator):
    """Rank 0's sums are passed to rank 1, as an all-reduce would."""
    x = torch.randn(9, DIM, generator=generator)
    first: list[torch.Tensor] = []
    GlobalNorm(DIM, eps=1e-6).observe([(x[:4], torch.ones(4))], share=lambda sums: first.append(sums.clone()))
    norm = GlobalNorm(DIM, eps=1e-6)
    norm.observe([(x[4:], torch.ones(5))], share=lambda sums: sums.add_(first[0]))
    torch.testing.assert_close(norm(x[4:]), batch_norm()(x)[4:])


def test_the_gradient_goes_through_the_statistics(generator):
    """Of eight samples; a ninth is padding, which has no loss and must not get a gradient through the statistics either."""
    values = torch.randn(9, DIM, generator=generator)
    weight = torch.randn(8, DIM, generator=generator)  # a loss that is not symmetric
    ours, theirs = (part.clone().requires_grad_() for part in (values, values[:8]))
    norm = GlobalNorm(DIM, eps=1e-6)
    norm.observe([(ours, torch.tensor([1.0] * 8 + [0.0]))], share=alone)
    for normalised in (norm(ours)[:8], batch_norm()(theirs)):
        (normalised.sin() * weight).sum().backward()
    torch.testing.assert_close(ours.grad[:8], theirs.grad, rtol=0, atol=2e-6)
    assert not ours.grad[8].any()


def test_running_statistics_move_only_when_told_and_have_names(generator):
    norm = GlobalNorm(DIM, eps=1e-6)
    norm.update()  # nothing was observed
    norm.observe([(torch.randn(6, DIM, generator=generator), torch.ones(6))], share=alone)
    assert torch.equal(norm.running_mean, torch.zeros(DIM))
    assert torch.equal(norm.running_var, torch.ones(DIM))
    norm.update()
    assert not torch.equal(norm.running_mean, torch.zeros(DIM))
    assert {name: p.requires_grad for name, p in norm.named_parameters()} == {
        "running_mean": False,
        "running_var": False,
    }


def test_a_batch_must_be_observed_first():
    with pytest.raises(RuntimeError, match="no batch was observed"):
        GlobalNorm(DIM, eps=1e-6)(torch.zeros(2, DIM))
