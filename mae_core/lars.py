"""LARS: momentum SGD whose matrices each take a step in proportion to their own norm, for very large batches.

Shapes: any; a tensor of more than one dimension is scaled as a whole, vectors and scalars are not scaled.
Units:  lr absolute (mae_core.schedules.scaled_lr), the others plain factors.       Errors: ConfigError for a wrong factor.
Source: You et al. 2017, arXiv 1708.03888; He et al. 2022, arXiv 2111.06377, table 10 (linear probe).

Several algorithms share the name, and the same rate means another run in each. This one:
  u = g + weight_decay * w                            matrices; vectors: u = g
  t = trust_coefficient * |w| / |u|                   matrices, 1 where a norm is 0; vectors: t = 1
  m = momentum * m + t * u
  w = w - lr * m
Algorithm 1 of the first paper multiplies by lr before the momentum, so that a large rate lingers after the schedule has
lowered it, and its ratio is |w| / (|g| + weight_decay * |w|), the same without weight decay."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mae_core.errors import ConfigError


class LARS(torch.optim.Optimizer):
    """The algorithm of the module, for whole parameters: an engine that splits or flattens them (ZeRO) breaks it, because
    neither the number of dimensions nor the norms are those of the parameter any more.

    `params` as in torch.optim.SGD: parameters, or groups with their own lr, weight_decay and so on. The momentum is kept
    in the parameter's dtype. Nothing is read back from the device. Shapes, units, errors and source: the module's.
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
        """Take one more group; what it leaves out has the constructor's value. Errors: the module's. Source: none."""
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
        """Update every parameter that has a gradient; a closure is called first, with gradients, and its loss returned.

        Shapes, errors and source: the module's.
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
                    update = update.add(parameter, alpha=group["weight_decay"])
                    update = update * trust_ratio(parameter, update, coefficient=group["trust_coefficient"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(buffer, alpha=-group["lr"])
        return loss


def trust_ratio(parameter: Tensor, update: Tensor, *, coefficient: float) -> Tensor:
    """coefficient * |parameter| / |update|, or 1 where either norm is zero: a parameter at zero could never leave it.

    Shapes: two of one shape -> a scalar on their device, of float32 or wider. Errors: none. Source: arXiv 1708.03888,
    section 4.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)  # half-precision norms would lose all but 2 or 3 digits
    weight_norm = torch.linalg.vector_norm(parameter, dtype=dtype)
    update_norm = torch.linalg.vector_norm(update, dtype=dtype)
    # `usable` stays a tensor: an `if` would make the host wait for the device
    usable = (weight_norm > 0) & (update_norm > 0)
    return torch.where(usable, coefficient * weight_norm / update_norm, torch.ones_like(weight_norm))
