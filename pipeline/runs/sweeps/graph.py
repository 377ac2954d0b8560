"""The steps of several configurations as one graph, in which equal steps occur once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.config import RunConfig
from pipeline.graph.plan import topological_order
from pipeline.graph.step import Step


@dataclass(frozen=True, kw_only=True)
class Member:
    """A configuration, and its steps in a graph that it may share with others."""

    config: RunConfig
    steps: Sequence[Step]
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of its run in MLflow, beside those that every run has."""


def share_steps(graphs: Mapping[str, Sequence[Step]]) -> dict[str, list[Step]]:
    """Return each member's steps, where steps with equal fingerprints are one object and no two different ones have one title.

    `graphs`: steps by the member's label, which tells apart what differs between members."""
    ordered = {label: topological_order(steps) for label, steps in graphs.items()}
    prints = {
        id(step): step.fingerprint for steps in ordered.values() for step in steps
    }  # computed once: each takes its inputs'
    owners: dict[str, list[str]] = {}
    variants: dict[str, set[str]] = {}
    for label, steps in ordered.items():
        for step in steps:
            owners.setdefault(prints[id(step)], []).append(label)
            variants.setdefault(step.name, set()).add(prints[id(step)])
    made: dict[str, Step] = {}
    for step in (step for steps in ordered.values() for step in steps):
        key = prints[id(step)]
        if key not in made:
            inputs = {name: made[source.fingerprint] for name, source in step.inputs.items()}
            label = _label(owners[key]) if len(variants[step.name]) > 1 else ""
            made[key] = replace(step, inputs=inputs, label=label)
    return {label: [made[prints[id(step)]] for step in steps] for label, steps in ordered.items()}


def _label(owners: Sequence[str]) -> str:
    return owners[0] if len(owners) == 1 else f"{owners[0]} and {len(owners) - 1} more"


def all_steps(members: Iterable[Member]) -> list[Step]:
    """Return the steps of all members, each once."""
    return list({step.title: step for member in members for step in member.steps}.values())
