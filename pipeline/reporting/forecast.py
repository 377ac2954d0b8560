"""A forecast as text: memory part by part at every ZeRO stage, steps, hours, cost, and the proposed layout.

Units: GiB per worker; time as a clock; USD. Ranges come from the range of the hardware's use (mfu)."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cluster.resources import Resources
from pipeline.planning.estimate import GIB, as_set_options
from pipeline.planning.footprint import MARGIN
from pipeline.planning.forecast import Forecast
from pipeline.planning.hardware import Hardware
from pipeline.reporting.format import clock, count
from pipeline.reporting.terminal import plain_table

PARTS: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "AdamW",
    "activations": "activ.",
    "workspace": "copies",
    "overhead": "rest",
    "copy": "save",
    "host": "host",
}
"""The parts of a footprint, in words so short that the table fits into 80 columns."""


def forecast_text(forecasts: Iterable[Forecast], hardware: Hardware, proposed: Resources | None) -> RenderableType:
    """Return each different forecast, and the layout proposed for all of them together. Print it with soft_wrap=True."""
    parts: list[RenderableType] = []
    for one in _distinct(forecasts):
        parts += [Text(f"\n{one.name} on {_devices(one, hardware)}"), _memory(one), Text(_time(one))]
    words = (
        as_set_options(proposed)
        if proposed
        else "more workers or larger devices: no micro-batch fits at any ZeRO stage"
    )
    parts.append(Text.assemble("\nproposed: ", (words, "bold")))
    accuracy = f"Memory may be off by {MARGIN:.0%}. How memory and time are estimated: docs/planning.md"
    return Group(*parts, Text(accuracy, style="dim"))


def cost_text(forecast: Forecast) -> str:
    """Return `$1 230 to $2 050`, or an empty string without a price."""
    return f"${count(forecast.cost[0])} to ${count(forecast.cost[1])}" if forecast.cost else ""


def _distinct(forecasts: Iterable[Forecast]) -> list[Forecast]:
    """Keep one forecast of those that differ in name only: the encoders and seeds of a protocol."""
    first: dict[Any, Forecast] = {}
    for one in forecasts:
        first.setdefault((one.layout.settings, one.layout.footprint, one.effort), one)
    return list(first.values())


def _devices(one: Forecast, hardware: Hardware) -> str:
    workers, shares = one.layout.resources.worker_range[0], hardware.mfu
    on = f"{workers} x {hardware.name}" if hardware.kind == "cuda" else f"{workers} workers of this CPU"
    peak = hardware.peaks.get(one.layout.settings.precision)
    use = f"{shares[0]:.0%}" if shares[0] == shares[1] else f"{shares[0]:.0%} to {shares[1]:.0%}"
    speed = f", {use} of {peak / 1e12:.3g} TFLOP/s in {one.layout.settings.precision}" if peak else ""
    return f"{on}, {one.layout.available / GIB:.1f} GiB each{speed} ({hardware.source})"


def _memory(one: Forecast) -> Table:
    optional = {part for part in ("copy", "host") if not getattr(one.layout.footprint, part)}
    parts = {part: word for part, word in PARTS.items() if part not in optional}
    table = plain_table(["GiB"], numbers=[*parts.values(), "total"], rest=[""])
    for stage in one.stages:
        held, resources = stage.footprint, stage.resources
        asked = resources.zero_stage == one.layout.resources.zero_stage
        words = "fits" if stage.fits else "no" if stage.cannot_fit else "tight"
        numbers = [f"{getattr(held, part) / GIB:.2f}" for part in parts]
        style = "bold" if asked else ""
        label = f"ZeRO-{resources.zero_stage}{' set' if asked else ''}"
        table.add_row(Text(label, style=style), *numbers, Text(f"{held.total / GIB:.2f}", style=style), words)
    return table


def _time(one: Forecast) -> str:
    settings = one.layout.settings
    batch = f"micro-batch {settings.micro_batch}, {settings.accumulation} per step"
    if one.effort is None:
        return (
            f"{batch}; time unknown: the images are counted by the shard step, or give their number: --images 1281167"
        )
    said = f"{batch}; {count(one.effort.steps)} steps, {count(one.effort.images)} images"
    if one.effort.seconds:
        said += f", {clock(one.effort.seconds[0])} to {clock(one.effort.seconds[1])}"
    return f"{said}, {cost_text(one)}" if one.cost else said
