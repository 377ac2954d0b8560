"""LARS: the update computed by hand, what is scaled, that it can be saved, and that it never waits for the device."""

import copy

import pytest
import torch

from mae_core import LARS, ConfigError, parameter_groups
from mae_core.optimisation.lars import trust_ratio


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def take_step(optimiser, gradients, *, lr):
    for group in optimiser.param_groups:
        group["lr"] = lr
    for tensor, gradient in gradients:
        tensor.grad = torch.tensor(gradient, dtype=torch.float64)
    optimiser.step()


def test_three_steps_by_hand_with_a_changing_rate():
    matrix, bias = parameter([3.0, 4.0]), parameter(1.0, -2.0)
    optimiser = LARS([matrix, bias], lr=0.0, momentum=0.5, weight_decay=0.5, trust_coefficient=0.1)

    # matrix: u = g + w/2 = (3, 4), t = 0.1 * 5 / 5, m = (0.3, 0.4); bias: m = g
    take_step(optimiser, [(matrix, [[1.5, 2.0]]), (bias, [1.0, 1.0])], lr=1.0)
    assert matrix.flatten().tolist() == pytest.approx([2.7, 3.6], abs=1e-12)  # double arithmetic, here and below
    assert bias.tolist() == pytest.approx([0.0, -3.0], abs=1e-12)

    # u = (0, 9), t = 0.1 * 4.5 / 9, m = (0.15, 0.2) + (0, 0.45); with the rate inside m it would move by (0.15, 0.2 + 0.045)
    take_step(optimiser, [(matrix, [[-1.35, 7.2]]), (bias, [0.0, 2.0])], lr=0.1)
    assert matrix.flatten().tolist() == pytest.approx([2.685, 3.535], abs=1e-12)
    assert bias.tolist() == pytest.approx([-0.05, -3.25], abs=1e-12)

    # u = 0, t = 1: the momentum continues, halved
    take_step(optimiser, [(matrix, (-matrix / 2).tolist()), (bias, [0.0, 0.0])], lr=2.0)
    assert matrix.flatten().tolist() == pytest.approx([2.535, 2.885], abs=1e-12)
    assert bias.tolist() == pytest.approx([-0.55, -5.75], abs=1e-12)


@pytest.mark.parametrize(("shape", "factor"), [((3, 4), 1.0), ((1, 3, 4), 1.0), ((12,), 1000.0)])
def test_step_of_a_matrix_does_not_depend_on_the_gradients_scale(generator, shape, factor):
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    moves = []
    for scale in (1.0, 1000.0):
        tensor = torch.nn.Parameter(start.clone())
        tensor.grad = scale * gradient
        LARS([tensor], lr=1.0).step()
        moves.append(start - tensor.detach())
    torch.testing.assert_close(moves[1], factor * moves[0], rtol=1e-9, atol=1e-14)  # differences of doubles near 1
    if factor == 1.0:
        assert moves[0].norm().item() == pytest.approx(0.001 * start.norm().item(), rel=1e-9)  # the default coefficient


def test_a_matrix_at_zero_can_leave_it():
    matrix = parameter([0.0, 0.0])
    take_step(LARS([matrix], lr=0.0), [(matrix, [[1.0, -2.0]])], lr=0.5)
    assert matrix.tolist() == [[-0.5, 1.0]]


def test_ratio_of_half_precision_is_float32():
    half = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    assert trust_ratio(half, half, coefficient=0.001).dtype == torch.float32
    ratio = trust_ratio(half, half * 3, coefficient=0.001).item()
    expected = 0.001 * half.double().norm().item() / (half * 3).double().norm().item()
    assert ratio == pytest.approx(expected, rel=1e-5)  # sums of 1000 in float32; bfloat16 norms are off by 1e-3


def test_nothing_is_read_back_from_the_device():
    # meta tensors have no values, so .item(), float() and bool() raise
    tensors = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 4), (4,))]
    optimiser = LARS(tensors, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for tensor in tensors:
            tensor.grad = torch.empty_like(tensor)
        optimiser.step()
    with pytest.raises(RuntimeError):
        tensors[0].sum().item()


def train(tensors, optimiser, generator, *, steps):
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimiser.step()


def test_state_dict_round_trip_continues_bit_by_bit(generator):
    straight = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]
    first = LARS(straight, lr=0.1, weight_decay=0.1)
    train(straight, first, generator, steps=2)
    resumed, forgetful = ([torch.nn.Parameter(t.detach().clone()) for t in straight] for _ in range(2))
    second = LARS(resumed, lr=7.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["lr"] == 0.1
    for tensors, optimiser in ((straight, first), (resumed, second), (forgetful, LARS(forgetful, lr=0.1))):
        train(tensors, optimiser, torch.Generator().manual_seed(1), steps=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(straight, forgetful, strict=True))  # the momentum matters


def test_groups_closure_and_missing_gradients(generator):
    model = torch.nn.Linear(3, 2)
    idle = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = LARS(parameter_groups(model, weight_decay=0.5), lr=0.1)
    optimiser.add_param_group({"params": [idle], "lr": 0.2})
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.5, 0.0, 0.0]
    assert [group["lr"] for group in optimiser.param_groups] == [0.1, 0.1, 0.2]
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        loss = model(torch.randn(4, 3, generator=generator)).square().mean()
        loss.backward()
        return loss

    assert optimiser.step(closure).item() > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(idle, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"trust_coefficient": 0.0}, r"trust_coefficient=0\.0"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LARS([parameter(1.0)], **{"lr": 0.1, **options})
    with pytest.raises(ConfigError, match=message):
        LARS([{"params": [parameter(1.0)], **options}], lr=0.1)
