"""The plan of a run as `mae plan` shows it: every step's state, and a forecast for those that would train.

Nothing is written. Units: GiB, seconds, USD. Errors: those of the configuration, the store and the
assumptions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cluster.resources import Resources
from pipeline.config import RunConfig
from pipeline.graph.plan import PlannedStep
from pipeline.planning.estimate import GIB, as_set_options, images_per_epoch, propose_resources, training_configs
from pipeline.planning.forecast import Assumptions, Forecast, assumed_hardware, forecast_step
from pipeline.planning.hardware import Hardware
from pipeline.reporting.forecast import cost_text
from pipeline.reporting.summaries import PlanRow
from pipeline.runs.checking.findings import DataDescription
from pipeline.runs.run import plan_run
from pipeline.runs.workflow import start_of
from pipeline.storage import open_store
from pipeline.weights import StartSummary


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run would do, and what that takes."""

    hardware: Hardware
    steps: Sequence[PlannedStep]
    forecasts: Mapping[str, Forecast]
    """By name: the steps that would train."""
    proposed: Resources | None
    """The layout that fits all of them; None when none does, or nothing would train."""
    data: DataDescription
    start: StartSummary | None
    """The weights that pretraining starts from; None for random ones."""

    @property
    def rows(self) -> list[PlanRow]:
        """The plan as a table shows it."""
        return [_row(step, self.forecasts.get(step.step.name)) for step in self.steps]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON line of `mae plan --json`."""
        return {
            "steps": [_step_json(step, self.forecasts.get(step.step.name)) for step in self.steps],
            "hardware": self.hardware.name,
            "proposed": as_set_options(self.proposed) if self.proposed else None,
            "start": asdict(self.start) if self.start else None,
        }


def forecast_run(config: RunConfig, assumptions: Assumptions) -> RunPlan:
    """Plan a run, and forecast the training steps that are not done."""
    (steps, data), store, resources = plan_run(config), open_store(config.store), config.resources
    # The hardware is that of all training steps, done or not, so that its peak does not depend on what is cached.
    hardware = assumed_hardware(training_configs(row.step for row in steps).values(), resources, assumptions)
    waiting = {row.step.name: row.step for row in steps if row.state != "cached"}
    configs = training_configs(waiting.values())
    price = assumptions.price(hardware)
    forecasts = {
        name: forecast_step(
            name,
            training,
            resources.for_evaluation(on_gpus=hardware.kind == "cuda")
            if waiting[name].kind == "evaluate"
            else resources,
            hardware,
            images=images_per_epoch(waiting[name], store) or assumptions.images,
            price=price,
        )
        for name, training in configs.items()
    }
    proposed = propose_resources(list(configs.values()), resources, hardware) if configs else None
    return RunPlan(
        hardware=hardware, steps=steps, forecasts=forecasts, proposed=proposed, data=data, start=start_of(config)
    )


def _row(planned: PlannedStep, forecast: Forecast | None) -> PlanRow:
    return PlanRow(
        name=planned.step.name,
        state=planned.state,
        fingerprint=planned.step.fingerprint,
        differs=_why(planned.differs),
        memory_gib=forecast.layout.footprint.total / GIB if forecast else None,
        seconds=forecast.seconds if forecast else None,
        cost=cost_text(forecast) if forecast else "",
    )


def _why(differs: Sequence[str]) -> str:
    """Join the fields that differ. Inputs are named only where nothing else differs: their own rows say why."""
    own = [_explained(line) for line in differs if not line.startswith("inputs.")]
    return "; ".join(own or differs)


def _explained(line: str) -> str:
    """Return a line with words for the field that no configuration holds."""
    _, rounded_down, count = line.partition("config.visible_patches_rounded_down: absent -> ")
    if not rounded_down:
        return line
    return f"{count} visible patches: rounded down, as in the official code, where earlier versions kept one more"


def _step_json(planned: PlannedStep, forecast: Forecast | None) -> dict[str, Any]:
    return {
        "name": planned.step.name,
        "kind": planned.step.kind,
        "fingerprint": planned.step.fingerprint,
        "state": planned.state,
        "differs": list(planned.differs),
        "uri": planned.uri,
        "memory_gib": round(forecast.layout.footprint.total / GIB, 3) if forecast else None,
        "seconds": forecast.seconds if forecast else None,
        "cost": forecast.cost if forecast else None,
    }
