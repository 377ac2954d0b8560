"""The linear probe as the paper trains it: on random crops, through the training loop, with LARS.

Unlike `linear`, which runs the encoder once per image, this one runs it once per image and epoch. What it leaves behind, and how
it differs from the official code: `pipeline.evaluation.online_probes`.
Source: He et al. 2022, arXiv 2111.06377, A.1 and table 10."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluation.features import Pool
from pipeline.evaluation.online_probes import Heads, OnlineSettings, train_probe
from pipeline.evaluation.protocol import EvaluationProtocol, ProtocolConfig
from pipeline.graph.step import Attempt, StageInput, StageResult
from pipeline.training.checkpoints.format import resume_point

VERSION = 1


class LinearOnlineSettings(OnlineSettings):
    """A linear classifier on a frozen encoder's features of random crops (arXiv 2111.06377, table 10)."""

    pool: Pool = "cls"
    """The feature of an image: its class token or the mean of its patch tokens, both after the encoder's final norm."""


@dataclass(frozen=True, kw_only=True)
class LinearOnlineConfig(ProtocolConfig):
    """Everything that decides the score."""

    probe: LinearOnlineSettings


def step_config(common: ProtocolConfig, settings: LinearOnlineSettings) -> LinearOnlineConfig:
    """Return the config of the step."""
    return LinearOnlineConfig(**vars(common), probe=settings)


def linear_online(config: LinearOnlineConfig, inputs: Mapping[str, StageInput], attempt: Attempt) -> StageResult:
    """Train linear heads on the labelled part of the training split and score the chosen one."""
    return train_probe(config, config.probe, inputs, attempt, Heads(kind="linear", reads=config.probe.pool))


PROTOCOL = EvaluationProtocol(
    settings=LinearOnlineSettings, step_config=step_config, evaluate=linear_online, resume_point=resume_point
)
