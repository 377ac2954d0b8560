"""What the receipt of a training step records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.feed.substitution import Substitution
from pipeline.graph.facts import Facts
from pipeline.training.guard import GuardState, Range


@dataclass(frozen=True, kw_only=True)
class IncidentFacts(Facts):
    """Samples and steps that a training lost along the way."""

    substitutions: int = 0
    substituted: tuple[tuple[int, str, str], ...] | None = None
    """(sample id, source, reason) of each image that was ever substituted."""
    skipped_steps: int = 0
    """Steps whose gradients the guard dropped."""
    stepped_over: tuple[Range, ...] | None = None
    """Skipped ranges: steps that were never trained on, after rollbacks."""


@dataclass(frozen=True, kw_only=True)
class TrainingFacts(IncidentFacts):
    """How a training went; the same however often it was interrupted."""

    global_step: int
    ids_digest: str
    """Decimal digits of the sum over every (epoch, sample) that reached a device."""


@dataclass(frozen=True, kw_only=True)
class PretrainFacts(TrainingFacts):
    """How a pretraining went."""

    loss: float
    """Mean over the last global batch."""
    images_seen: int
    dataset_digest: str


def incident_fields(substitutions: Sequence[Substitution], guard: GuardState) -> Mapping[str, Any]:
    """Return the fields of IncidentFacts."""
    images = {one.sample_id: (one.source, one.reason) for one in substitutions}
    return {
        "substitutions": len(substitutions),
        "substituted": tuple((id_, *images[id_]) for id_ in sorted(images)) or None,
        "skipped_steps": len(guard.skipped),
        "stepped_over": guard.stepped_over or None,
    }
