"""Constants of a model that are neither parameters nor buffers: they stay float32 when its weights are cast.

Copied to a device once, not at every use: such a copy is small, but the host waits for it."""

import torch
from torch import Tensor


class Constants:
    """Tensors, on every device that has asked for them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._on = {torch.device("cpu"): tensors}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors on a device."""
        if device not in self._on:
            self._on[device] = tuple(tensor.to(device) for tensor in self._on[torch.device("cpu")])
        return self._on[device]
