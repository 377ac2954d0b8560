"""Attentive probes on a frozen encoder's tokens: the full one, and Efficient Probing at a tenth of its cost.

MAE spreads what it knows over its patch tokens, of which a linear probe sees one or their mean; these probes learn which tokens
to read. Both are trained on random crops through the training loop, with LARS. What they leave behind: `probe.safetensors` and
the rest of `pipeline.evaluation.online_probes`.
Source: El-Nouby et al. 2024, arXiv 2401.08541, section 4 (full); Psomas et al. 2025, arXiv 2506.10178 (efficient; the recipe)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pipeline.evaluation.online_probes import Heads, OnlineSettings, train_probe
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import resume_point

VERSION = 1
QUERIES = {"full": 1, "efficient": 32}
"""Those of the sources."""


class AttentiveSettings(OnlineSettings):
    """Attention pooling and a linear classifier on a frozen encoder's tokens (arXiv 2401.08541, 2506.10178)."""

    kind: Literal["full", "efficient"] = "efficient"
    """full: keys and values are projections of every token. efficient: keys are the tokens themselves, and each query pools a part
    of the values, which costs a twentieth at ViT-B."""
    tokens: Literal["patches", "all"] = "patches"
    """What the probe reads, after the encoder's final norm: the patch tokens, or the class token as well."""
    num_queries: int | None = Field(None, ge=1)
    """Learnt queries. If left out: 1 for full and 32 for efficient, where it must divide the encoder's width."""
    num_heads: int | None = Field(None, ge=1)
    """Attention heads of kind full; if left out, as many as the encoder has. efficient has one."""
    global_batch: int = Field(4096, ge=1)
    """Images per update, over all workers, at most as many as are trained on. Workers hold the tokens of their part of it."""


@dataclass(frozen=True, kw_only=True)
class AttentiveConfig(ProtocolConfig):
    """Everything that decides the score."""

    probe: AttentiveSettings


def step_config(common: ProtocolConfig, settings: AttentiveSettings) -> AttentiveConfig:
    """Return the config of the step."""
    return AttentiveConfig(**vars(common), probe=settings)


def attentive(config: AttentiveConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train attentive heads on the labelled part of the training split and score the chosen one."""
    probe = config.probe
    heads = Heads(
        kind=probe.kind,
        reads=probe.tokens,
        num_heads=probe.num_heads,
        num_queries=probe.num_queries or QUERIES[probe.kind],
    )
    return train_probe(config, probe, inputs, attempt, heads)


PROTOCOL = EvaluationProtocol(
    settings=AttentiveSettings, step_config=step_config, evaluate=attentive, resume_point=resume_point
)
