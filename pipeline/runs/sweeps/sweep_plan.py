"""What a sweep would do: the plan of every member, with what they share counted once. Writes nothing.

Units: seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.planning.forecast import Assumptions
from pipeline.reporting.sweeps.table import PlannedMember
from pipeline.runs.plan import RunPlan, forecast_run
from pipeline.runs.sweeps.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The members' plans."""

    sweep: Sweep
    plans: Mapping[str, RunPlan]
    """By the member's label."""

    @property
    def members(self) -> list[PlannedMember]:
        """The plans as a table shows them."""
        return [
            PlannedMember(
                label=label,
                states=[(row.step.fingerprint, row.state) for row in plan.steps],
                seconds=_total([one.seconds for one in plan.forecasts.values()]),
            )
            for label, plan in self.plans.items()
        ]

    @property
    def seconds(self) -> float | None:
        """Of all trainings, each once, one after the other; None if that of any is unknown."""
        different = {
            row.step.fingerprint: plan.forecasts[row.step.name].seconds
            for plan in self.plans.values()
            for row in plan.steps
            if row.step.name in plan.forecasts
        }
        return _total(list(different.values()))

    def as_json(self) -> dict[str, Any]:
        """Return the JSON line of `mae sweep --dry-run --json`."""
        return {
            "sweep": self.sweep.name,
            "seconds": self.seconds,
            "members": [
                {"label": one.label, "overrides": dict(one.point), **self.plans[one.label].as_json()}
                for one in self.sweep.members
            ],
        }


def plan_sweep(sweep: Sweep, assumptions: Assumptions) -> SweepPlan:
    """Plan every member."""
    return SweepPlan(sweep=sweep, plans={one.label: forecast_run(one.config, assumptions) for one in sweep.members})


def _total(seconds: Sequence[float | None]) -> float | None:
    known = [one for one in seconds if one is not None]
    return sum(known) if known and len(known) == len(seconds) else None
