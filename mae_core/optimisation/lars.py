"""LARS, an optimiser for very large batches: momentum SGD in which every matrix steps in proportion to its own norm.

Several algorithms share this name, and one learning rate gives a different run in each. This one computes, for a weight w
with gradient g:

    u = g + weight_decay * w               matrices;  vectors: u = g
    t = trust_coefficient * |w| / |u|      matrices (1 where a norm is 0);  vectors: t = 1
    m = momentum * m + t * u
    w = w - lr * m

Algorithm 1 of You et al. differs in two ways. It multiplies by lr before the momentum, so a large rate lingers after the
schedule has lowered it; and its ratio is |w| / (|g| + weight_decay * |w|), which is the same only without weight decay.

Shapes: any. A tensor of two or more dimensions counts as one matrix; vectors and scalars are not scaled.

Units: lr is the absolute rate (see `scaled_lr`); the other options are plain factors.

Source: You et al. 2017, arXiv 1708.03888; He et al. 2022, arXiv 2111.06377, table 10 (linear probe)."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mae_core.errors import ConfigError


class LARS(torch.optim.Optimizer):
    """Optimise with LARS: SGD with momentum, where each matrix's step is scaled by a trust ratio.

    `params` is what torch.optim.SGD takes: parameters, or groups with their own lr, weight_decay and so on. The momentum
    is stored in the parameter's dtype, and a step never waits for the device.

    The parameters must be whole. An engine that splits or flattens them, as ZeRO does, changes their norms and their
    number of dimensions, and with them the algorithm.

    Raises:
        ConfigError: An option of the constructor or of a group is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it does not set keep the constructor's values.

        Raises:
            ConfigError: An option of the group is out of range.
        """
        # checked with the defaults filled in; torch fills them in only afterwards
        group = {**self.defaults, **param_group}
        if not group["lr"] >= 0.0:
            raise ConfigError(f"lr={group['lr']} is negative: write 0 or more")
        if not 0.0 <= group["momentum"] < 1.0:
            raise ConfigError(f"momentum={group['momentum']} is not in [0, 1): write 0.9, or 0 for none")
        if not group["weight_decay"] >= 0.0:
            raise ConfigError(f"weight_decay={group['weight_decay']} is negative: write 0 for none")
        if not group["trust_coefficient"] > 0.0:
            raise ConfigError(f"trust_coefficient={group['trust_coefficient']} is not positive: write 0.001")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        A closure is called first, with gradients enabled, and its loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])  # not in place: .grad stays as it is
                    update = update * trust_ratio(parameter, update, coefficient=group["trust_coefficient"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                # the rate enters below and not in the momentum, so that a lowered rate acts at once
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(buffer, alpha=-group["lr"])
        return loss


def trust_ratio(parameter: Tensor, update: Tensor, *, coefficient: float) -> Tensor:
    """Return coefficient * |parameter| / |update|, or 1 where either norm is zero.

    Without that exception a parameter at zero could never leave it.

    Shapes: two tensors of one shape -> a scalar on their device, float32 or wider.

    Source: arXiv 1708.03888, section 4.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)  # half-precision norms would lose all but 2 or 3 digits
    weight_norm = torch.linalg.vector_norm(parameter, dtype=dtype)
    update_norm = torch.linalg.vector_norm(update, dtype=dtype)
    # a tensor rather than an `if`, which would make the host wait for the device
    usable = (weight_norm > 0) & (update_norm > 0)
    return torch.where(usable, coefficient * weight_norm / update_norm, torch.ones_like(weight_norm))
