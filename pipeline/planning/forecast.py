"""What each training step of a plan will take: its memory at every ZeRO stage, its steps and hours, its cost.

Units: bytes, seconds, USD. A range is (at best, at worst) and comes from the range of the
hardware's use (mfu).
Errors: ConfigError for an unknown device, a figure out of range, or a price list that cannot be
read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.resources import Resources
from pipeline.planning.estimate import (
    Effort,
    MemoryEstimate,
    TrainingConfig,
    estimate_effort,
    estimate_memory,
    memory_by_stage,
)
from pipeline.planning.hardware import Hardware, hardware_named, local_hardware, read_prices, with_measured_peak


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the user of `mae plan` says about hardware, data and prices."""

    hardware: str | None = None
    """A device of hardware.yaml, or `CPU`; None: what this machine has."""
    images: int | None = None
    """Images per epoch, for steps whose dataset has not been counted yet."""
    prices: Path | None = None
    """YAML file of USD per device and hour, by device; None: no cost is shown."""
    tflops: float | None = None
    """Measured peak of one device, dense TFLOP/s, in place of the table's."""
    mfu: float | None = None
    """Measured share of the peak that training uses, in place of the table's range."""

    def price(self, device: Hardware) -> float | None:
        """Return USD per hour of one device, or None where no price is known."""
        return read_prices(self.prices).get(device.name) if self.prices else None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one training step will take."""

    name: str
    layout: MemoryEstimate
    """As configured."""
    stages: Sequence[MemoryEstimate]
    """The same at ZeRO stages 1, 2 and 3."""
    effort: Effort | None
    """None when the number of images is unknown."""
    cost: tuple[float, float] | None
    """USD; None without a price, or when the time is unknown."""

    @property
    def seconds(self) -> float | None:
        """The middle of the range."""
        return sum(self.effort.seconds) / 2 if self.effort and self.effort.seconds else None


def assumed_hardware(configs: Iterable[TrainingConfig], resources: Resources, assumptions: Assumptions) -> Hardware:
    """Return the device to plan for, with its peak in every precision that the training steps use.

    A CPU's peak is in no table, so it is measured here: about a second per precision."""
    device = hardware_named(assumptions.hardware) if assumptions.hardware else local_hardware(resources)
    # Before measuring: a peak that the user gave is not measured again.
    device = device.with_overrides(tflops=assumptions.tflops, mfu=assumptions.mfu)
    for precision in {config.recipe.precision for config in configs}:
        device = with_measured_peak(device, precision)
    return device


def forecast_step(
    name: str,
    config: TrainingConfig,
    resources: Resources,
    device: Hardware,
    *,
    images: int | None,
    price: float | None,
) -> Forecast:
    """Forecast one training step. `images`: per epoch; `price`: USD per hour of one device."""
    took = estimate_effort(config, resources, device, images=images) if images else None
    devices = 1 if device.kind == "cpu" else resources.worker_range[0]  # all CPU workers share one machine
    return Forecast(
        name=name,
        layout=estimate_memory(config, resources, device),
        stages=memory_by_stage(config, resources, device),
        effort=took,
        cost=took.cost(devices=devices, price=price) if took and price is not None else None,
    )
