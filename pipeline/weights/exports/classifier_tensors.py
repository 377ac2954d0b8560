"""A fine-tuned classifier's tensors, seen as an encoder and a head.

The norm of the pooled feature, `fc_norm`, stands where the encoder's last norm would: other layouts have one place for both."""

from collections.abc import Mapping

from torch import Tensor


def as_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of ViTEncoder with `fc_norm` as its last norm."""
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    norm = {name.removeprefix("fc_"): value for name, value in weights.items() if name.startswith("fc_norm.")}
    return encoder | norm


def head_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weight and bias of the linear head."""
    return {name.removeprefix("head."): value for name, value in weights.items() if name.startswith("head.")}
