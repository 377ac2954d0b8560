"""Evaluation protocols by name. To add one, write a module here (see `pipeline.evaluation.protocol`) and add its name to
`ProtocolName`."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, get_args

from pipeline.evaluation.protocol import EvaluationProtocol

ProtocolName = Literal[
    "linear", "finetune", "partial", "scratch", "linear_online", "attentive", "knn", "ridge", "rankme", "own_head"
]
PROTOCOL_NAMES: tuple[ProtocolName, ...] = get_args(ProtocolName)


def protocol_named(name: ProtocolName) -> EvaluationProtocol:
    """Return the `PROTOCOL` of the module with this name."""
    protocol: EvaluationProtocol = import_module(f"{__name__}.{name}").PROTOCOL
    return protocol


def protocol_of(stage: Callable[..., Any]) -> EvaluationProtocol:
    """Return the protocol whose stage a function is."""
    protocol: EvaluationProtocol = import_module(stage.__module__).PROTOCOL
    return protocol
