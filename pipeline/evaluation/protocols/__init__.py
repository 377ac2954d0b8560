"""Evaluation protocols by name. A new one is a module here and its name in `ProtocolName`."""

from importlib import import_module
from typing import Literal, get_args

from pipeline.evaluation.protocol import EvaluationProtocol

ProtocolName = Literal["linear", "finetune"]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


def protocol_named(name: ProtocolName) -> EvaluationProtocol:
    """Return the protocol that the module of this name declares."""
    protocol: EvaluationProtocol = import_module(f"{__name__}.{name}").PROTOCOL
    return protocol
