"""What is said when a step begins: what it lists, where it resumes, what it waits for, and how long it is likely to take.

The forecast is that of `mae plan`. It counts arithmetic only, so that reading data, checkpoints and starting workers come on top;
on a cluster nothing is foreseen, because this machine's speed says nothing about its nodes."""

import os
import re
from dataclasses import dataclass
from functools import cache

from pipeline.cluster.resources import Resources
from pipeline.cluster.tasks import Executor
from pipeline.errors import ConfigError, PipelineError
from pipeline.graph.step import Step
from pipeline.planning.estimate import images_per_epoch, training_configs
from pipeline.planning.forecast import forecast_step
from pipeline.planning.hardware import Hardware, Precision, local_hardware, with_measured_peak
from pipeline.reporting.format import clock
from pipeline.stages.pretrain import START_ADDRESS
from pipeline.storage import Store

_DOING = {
    "import": "reading the weights, and writing them as safetensors",
    "shard": "packing the images, or indexing tars where they lie",
    "join": "one manifest over all parts",
}
_ENCODERS = {"pretrained": "pretrained", "random": "untrained"}


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What is known of a step before its first unit of work."""

    text: str = ""
    images_done: int = 0
    images: int = 0
    """Over all epochs; 0 if unknown."""
    seconds: float | None = None
    """For the images that are left."""


def beginning_of(step: Step, store: Store, executor: Executor) -> Beginning:
    """Return what to say of a step that begins. A forecast that fails is left out: it must never stop a run."""
    if step.kind == "snapshot":
        return Beginning(text=f"listing {step.config.source}")
    if step.kind in _DOING:
        return Beginning(text=_DOING[step.kind])
    if step.kind == "evaluate" and not training_configs([step]):
        return Beginning(
            text=f"on features of the frozen {_ENCODERS[step.config.weights]} encoder, seed {step.config.seed}"
        )
    if step.name not in training_configs([step]) or step.resources is None:
        return Beginning()
    try:
        resumed = _resumed_step(step, store)
    except PipelineError:
        resumed = 0
    texts = [f"resuming from step {resumed}"] if resumed else []
    if step.kind == "pretrain" and step.config.start_sha256 and not resumed:
        texts.append(f"starting from {step.options[START_ADDRESS]}")
    foreseen = _foreseen(step, store, resumed)
    if foreseen.seconds:
        texts.append(f"at least {clock(foreseen.seconds)} of computing")
    if executor == "ray":
        low, high = step.resources.worker_range
        texts.append(f"starting {low if low == high else f'{low} to {high}'} worker{'s' if high > 1 else ''} on Ray")
    return Beginning(
        text=", ".join(texts), images_done=foreseen.images_done, images=foreseen.images, seconds=foreseen.seconds
    )


def _resumed_step(step: Step, store: Store) -> int:
    """Return the number of the training step that the checkpoint to resume from holds, or 0."""
    key = step.resume_point(store.at(step.directory)) if step.resume_point else ""
    number = re.search(r"step-(\d+)$", key)
    return int(number[1]) if number else 0


@cache  # the peak of a CPU takes a second to measure
def _hardware(precision: Precision, resources: Resources) -> Hardware:
    return with_measured_peak(local_hardware(resources), precision)


def _foreseen(step: Step, store: Store, resumed: int) -> Beginning:
    if "RAY_ADDRESS" in os.environ or step.resources is None:
        return Beginning()
    config = training_configs([step])[step.name]
    try:
        hardware = _hardware(config.recipe.precision, step.resources)
        images = images_per_epoch(step, store)
        foreseen = forecast_step(step.name, config, step.resources, hardware, images=images, price=None)
    except (ConfigError, PipelineError, OSError):
        return Beginning()
    if foreseen.effort is None:
        return Beginning()
    left = max(0.0, 1 - resumed / max(1, foreseen.effort.steps))
    return Beginning(
        images_done=resumed * config.recipe.global_batch,
        images=foreseen.effort.steps * config.recipe.global_batch,
        seconds=None if foreseen.seconds is None else foreseen.seconds * left,
    )
