"""What training will take, as a person reads it: memory part by part for every ZeRO stage, steps, hours, cost, a proposal.

Units:  GiB a worker; hours as a clock; USD. A range is what the hardware's range of use makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cluster.resources import Resources
from pipeline.planning.estimate import GIB, Effort, MemoryEstimate, as_set_options
from pipeline.planning.footprint import MARGIN
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
"""A footprint's parts, in words that fit into 80 columns."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of one training step."""

    name: str
    layout: MemoryEstimate
    stages: Sequence[MemoryEstimate]
    """The same at ZeRO 1, 2 and 3."""
    effort: Effort | None
    """None: nobody knows how many images there are."""
    cost: tuple[float, float] | None

    @property
    def seconds(self) -> float | None:
        """The middle of the range."""
        return sum(self.effort.seconds) / 2 if self.effort and self.effort.seconds else None

    @property
    def cost_words(self) -> str:
        """`$1 230 to $2 050`; nothing without a price."""
        return f"${count(self.cost[0])} to ${count(self.cost[1])}" if self.cost else ""


def forecast_text(forecasts: Sequence[Forecast], hardware: Hardware, proposed: Resources | None) -> RenderableType:
    """All of them, and what is proposed for them together. Print it with soft_wrap=True."""
    parts: list[RenderableType] = []
    for one in forecasts:
        parts += [Text(f"\n{one.name} on {_devices(one, hardware)}"), _memory(one), Text(_time(one))]
    words = (
        as_set_options(proposed)
        if proposed
        else "more workers or larger devices: no micro-batch fits at any ZeRO stage"
    )
    parts.append(Text.assemble("\nproposed: ", (words, "bold")))
    return Group(*parts, Text(f"Memory is foreseen to {MARGIN:.0%}, time as said above: docs/planning.md", style="dim"))


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
    batch = f"micro-batch {settings.micro_batch}, {settings.accumulation} a step"
    if one.effort is None:
        return f"{batch}; how many images there are is known after the shard step, or say --images 1281167"
    said = f"{batch}; {count(one.effort.steps)} steps, {count(one.effort.images)} images"
    if one.effort.seconds:
        said += f", {clock(one.effort.seconds[0])} to {clock(one.effort.seconds[1])}"
    return f"{said}, {one.cost_words}" if one.cost else said
