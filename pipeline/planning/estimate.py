"""What a run will take before anything is held: memory of a worker, steps, hours, money; which layout fits; what cannot run.

Units:  bytes, seconds, USD; a range is (at best, at worst) and comes from the hardware's range of use.
Errors: ConfigError for a layout that cannot fit where the memory is known: named with field, values and a way out.
Source: memory: pipeline.planning.footprint; time: operations of mae_core.cost over workers x peak x share of use. Blocks that
are computed again are one more forward pass. Reading, evaluation on the test split and checkpoints are not in it."""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mae_core.cost import encoder_flops, forward_flops, training_flops
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.facts import Counts, DatasetFacts, SnapshotFacts
from pipeline.data.feed.order import steps_total
from pipeline.errors import ConfigError
from pipeline.evaluation.protocols.finetune import FinetuneConfig
from pipeline.graph.receipts import read_receipt
from pipeline.graph.step import Step
from pipeline.planning.footprint import MARGIN, Footprint, Model, autoencoder, classifier, footprint, with_checkpoint
from pipeline.planning.hardware import Hardware
from pipeline.storage import Store
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import PretrainConfig, engine_settings

GIB = 2**30
CLASSES = 1000
"""Of a dataset that nobody has listed yet: a head of ImageNet's size, 1 M weights at most."""
WORTHWHILE = 16
"""Images in one forward pass below which a device idles: more ZeRO, or recomputation, is tried before so few."""

Training = PretrainConfig | FinetuneConfig
"""Configurations of the steps that train with the engine."""


@dataclass(frozen=True, kw_only=True)
class WorkerLayout:
    """How a step trains, and what that takes of a worker."""

    resources: Resources
    settings: EngineSettings
    footprint: Footprint
    share: int
    """Bytes of the device that a worker has."""

    @property
    def fits(self) -> bool:
        """With the margin by which the footprint may be off."""
        return self.footprint.total * (1 + MARGIN) <= self.share

    @property
    def impossible(self) -> bool:
        """Even if the footprint is too high by its margin."""
        return self.footprint.total * (1 - MARGIN) > self.share


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Steps and time of one training step of the graph."""

    steps: int
    images: int
    seconds: tuple[float, float] | None
    """None: the hardware's peak is unknown."""

    def cost(self, *, devices: int, price: float) -> tuple[float, float] | None:
        """USD, at a price for an hour of one device."""
        if self.seconds is None:
            return None
        low, high = self.seconds
        return low / 3600 * devices * price, high / 3600 * devices * price


def worker_layout(training: Training, resources: Resources, hardware: Hardware) -> WorkerLayout:
    """What a worker of this step holds."""
    workers = resources.worker_range[0]
    settings = engine_settings(training.recipe, resources, workers=workers)
    model = _model(training, settings)
    held = footprint(model, settings, workers=workers, device=hardware.kind)
    if resources.checkpoint_copy == "memory":
        held = with_checkpoint(held, model, workers=workers, device=hardware.kind)
    share = hardware.memory_bytes // workers if hardware.kind == "cpu" else hardware.memory_bytes
    return WorkerLayout(resources=resources, settings=settings, footprint=held, share=share)


def by_stage(training: Training, resources: Resources, hardware: Hardware) -> list[WorkerLayout]:
    """The configured layout at every ZeRO stage."""
    return [worker_layout(training, _changed(resources, zero_stage=stage), hardware) for stage in (1, 2, 3)]


def proposal(steps: Sequence[Training], resources: Resources, hardware: Hardware) -> Resources | None:
    """The lowest stage at which a worthwhile micro-batch fits in every step, with the largest that does; None: nothing fits."""
    slice_ = math.ceil(max(step.recipe.global_batch for step in steps) / resources.worker_range[0])
    found: list[Resources] = []
    for way in _ways(resources, hardware):
        best = _largest(steps, way, hardware, slice_)
        if best and best.micro_batch >= min(WORTHWHILE, slice_):
            return best
        found += [best] if best else []
    return max(found, key=lambda one: one.micro_batch, default=None)


def as_set(resources: Resources) -> str:
    """A proposal for the command line."""
    fields: dict[str, object] = {"micro_batch": resources.micro_batch, "zero_stage": resources.zero_stage}
    if resources.activation_checkpointing:
        fields["activation_checkpointing"] = "true"
    if resources.offload != "none":
        fields["offload"] = resources.offload
    if resources.checkpoint_copy != "memory":
        fields["checkpoint_copy"] = resources.checkpoint_copy
    return " ".join(f"--set resources.{name}={value}" for name, value in fields.items())


def effort(training: Training, resources: Resources, hardware: Hardware, *, images: int) -> Effort:
    """Of `images` in an epoch."""
    recipe: Recipe = training.recipe
    steps = steps_total(images, recipe.global_batch, recipe.epochs)
    seen, peak = steps * recipe.global_batch, hardware.peaks.get(recipe.precision)
    # a CPU's peak is that of all its cores together, whatever the number of workers
    devices = 1 if hardware.kind == "cpu" else resources.worker_range[0]
    flops = seen * _flops(training, again=resources.activation_checkpointing)
    seconds = None
    if peak:
        low, high = hardware.mfu
        seconds = (flops / (devices * peak * high), flops / (devices * peak * low))
    return Effort(steps=steps, images=seen, seconds=seconds)


def trainings(steps: Iterable[Step]) -> dict[str, Training]:
    """Those of the steps that train with the engine, by name."""
    return {step.name: step.config for step in steps if isinstance(step.config, PretrainConfig | FinetuneConfig)}


def images_in_epoch(step: Step, store: Store) -> int | None:
    """Images that a training step reads in an epoch, as its shards' receipt says, or their listing's; None: nobody has counted."""
    limit = getattr(step.config, "train_labels", None)
    shards = step.inputs["shards"]
    if receipt := read_receipt(store.at(shards.directory)):
        there = DatasetFacts.read(receipt.facts).counts.splits.get("train", Counts()).served
    elif (listing := shards.inputs.get("snapshot")) and (receipt := read_receipt(store.at(listing.directory))):
        there = SnapshotFacts.read(receipt.facts).splits.get("train", 0)
    else:
        there = 0
    return min(limit or there, there) or None


def refuse_what_cannot_fit(steps: Iterable[Step], resources: Resources, hardware: Hardware) -> None:
    """ConfigError for the first of the steps that no luck can fit into the memory that is there."""
    training = trainings(steps)
    for name, config in training.items():
        asked = worker_layout(config, resources, hardware)
        if asked.impossible:
            way = proposal(list(training.values()), resources, hardware)
            raise ConfigError(f"{name}: {_shortage(asked, hardware)}. {_way_out(way)}")


def _shortage(asked: WorkerLayout, hardware: Hardware) -> str:
    workers, chosen = asked.resources.worker_range[0], asked.resources
    shared = f" for {workers} workers" if hardware.kind == "cpu" and workers > 1 else ""
    return (
        f"resources.micro_batch={chosen.micro_batch} at zero_stage={chosen.zero_stage} needs about "
        f"{asked.footprint.total / GIB:.1f} GiB a worker, and has {asked.share / GIB:.1f} of {hardware.name} with "
        f"{hardware.memory_bytes / GIB:.1f} GiB{shared}"
    )


def _way_out(way: Resources | None) -> str:
    if way is None:
        return "No micro-batch fits at any ZeRO stage: use more workers, or larger devices"
    return f"Write {as_set(way)}; mae plan shows all"


def _ways(resources: Resources, hardware: Hardware) -> Iterator[Resources]:
    """What is tried, the cheapest in time first. What somebody has turned on stays on."""
    workers = resources.worker_range[0]
    stages = (1, 2, 3) if workers > 1 else (1,)
    for recomputed in (False, True) if not resources.activation_checkpointing else (True,):
        for stage in stages:
            yield _changed(resources, zero_stage=stage, activation_checkpointing=recomputed)
    if hardware.kind == "cuda" and resources.offload == "none":
        yield _changed(resources, zero_stage=stages[-1], activation_checkpointing=True, offload="optimizer")
    if hardware.kind == "cpu" and resources.checkpoint_copy == "memory":
        yield _changed(resources, zero_stage=stages[-1], activation_checkpointing=True, checkpoint_copy="disk")


def _largest(steps: Sequence[Training], way: Resources, hardware: Hardware, slice_: int) -> Resources | None:
    """The largest micro-batch that fits of a worker's slice whole, in halves, in thirds, ..."""

    def fits(size: int) -> bool:
        return all(worker_layout(step, _changed(way, micro_batch=size), hardware).fits for step in steps)

    whole, *parts = _sizes(slice_)
    if fits(whole):  # apart: only what is cut keeps gradients beside the next activations
        return _changed(way, micro_batch=whole)
    found = bisect.bisect_left(parts, 1, key=fits)
    return _changed(way, micro_batch=parts[found]) if found < len(parts) else None


def _sizes(slice_: int) -> Iterator[int]:
    """The different micro-batches that cut a slice into equally many rounds, the largest first."""
    size = slice_
    yield size
    while size > 1:
        size = math.ceil(slice_ / math.ceil(slice_ / (size - 1)))
        yield size


def _changed(resources: Resources, **fields: object) -> Resources:
    return resources.model_copy(update=fields)


def _model(training: Training, settings: EngineSettings) -> Model:
    if isinstance(training, PretrainConfig):
        return autoencoder(training.model, settings)
    return classifier(training.encoder, settings, num_classes=CLASSES)


def _flops(training: Training, *, again: bool) -> int:
    """Of one image's training step."""
    if isinstance(training, PretrainConfig):
        return training_flops(training.model) + (forward_flops(training.model) if again else 0)
    forward = encoder_flops(training.encoder, visible_patches=training.encoder.num_patches)
    return (4 if again else 3) * forward
