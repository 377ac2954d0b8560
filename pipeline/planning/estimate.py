"""What training will take: memory of a worker, number of steps, time and cost; which settings fit, and which cannot.

Only steps of the graph that train with the engine are estimated: pretraining and fine-tuning. A *training step* is one update of
the weights.

Memory is from `pipeline.planning.footprint`. Time is the FLOPs of `mae_core.cost` divided by workers x peak x utilisation;
recomputing activations costs one more forward pass. Reading data, evaluating and writing checkpoints are not included.
Units:  bytes, seconds, USD. A range is (at best, at worst) and comes from the hardware's range of utilisation.
Errors: ConfigError for settings that cannot fit into a known memory, with the settings to write instead."""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mae_core.cost import classifier_training_flops, encoder_flops, forward_flops, training_flops
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.facts import Counts, DatasetFacts, SnapshotFacts
from pipeline.data.feed.order import steps_total
from pipeline.errors import ConfigError
from pipeline.evaluation.classifiers import ClassifierConfig
from pipeline.graph.receipts import read_receipt
from pipeline.graph.step import Step
from pipeline.planning.footprint import (
    MARGIN,
    Footprint,
    ModelSize,
    autoencoder_size,
    classifier_size,
    footprint,
    with_checkpoint_copy,
    with_feed,
)
from pipeline.planning.hardware import Hardware
from pipeline.storage import Store
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.train_spec import PretrainConfig, engine_settings

GIB = 2**30
CLASSES = 1000
"""Assumed for a dataset that has not been listed yet: a head of ImageNet's size, at most 1 M weights."""
ASSUMED_CPUS = 16
"""CPUs of a GPU node for each GPU, where resources.decode_workers=auto."""
MIN_EFFICIENT_BATCH = 16
"""Images per forward pass below which a device idles. A higher ZeRO stage or recomputation is preferred to smaller batches."""

TrainingConfig = PretrainConfig | ClassifierConfig
"""Configs of the steps that train with the engine."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory that a worker needs with given settings, and memory that it has."""

    resources: Resources
    settings: EngineSettings
    footprint: Footprint
    available: int
    """Bytes that the device has for a worker."""

    @property
    def fits(self) -> bool:
        """Whether it fits even if the footprint is too low by its margin."""
        return self.footprint.total * (1 + MARGIN) <= self.available

    @property
    def cannot_fit(self) -> bool:
        """Whether it does not fit even if the footprint is too high by its margin. Neither of the two is a tight fit."""
        return self.footprint.total * (1 - MARGIN) > self.available


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Length of one training."""

    steps: int
    """Training steps."""
    images: int
    seconds: tuple[float, float] | None
    """None if the hardware's peak is unknown."""

    def cost(self, *, devices: int, price: float) -> tuple[float, float] | None:
        """Return the cost in USD, with `price` in USD per device and hour, or None if the time is unknown."""
        if self.seconds is None:
            return None
        low, high = self.seconds
        return low / 3600 * devices * price, high / 3600 * devices * price


def training_configs(steps: Iterable[Step]) -> dict[str, TrainingConfig]:
    """Return the configs of those steps that train with the engine, by title."""
    return {step.title: step.config for step in steps if isinstance(step.config, TrainingConfig)}


def estimate_memory(training: TrainingConfig, resources: Resources, hardware: Hardware) -> MemoryEstimate:
    """Return the memory of one worker, at the minimum number of workers."""
    workers = resources.worker_range[0]
    # The engine's own derivation of micro-batch and accumulation, so that the plan cannot drift from it.
    settings = engine_settings(training.recipe, resources, workers=workers)
    model = _model_size(training, settings)
    held = footprint(model, settings, workers=workers, device=hardware.kind)
    if resources.checkpoint_copy == "memory":
        held = with_checkpoint_copy(held, model, settings, workers=workers, device=hardware.kind)
    held = with_feed(
        held,
        processes=resources.decided_for(ASSUMED_CPUS if hardware.kind == "cuda" else 0).decode_processes,
        batch_bytes=math.ceil(training.recipe.global_batch / workers) * _pixel_bytes(training),
        device=hardware.kind,
    )
    available = hardware.memory_bytes // workers if hardware.kind == "cpu" else hardware.memory_bytes
    return MemoryEstimate(resources=resources, settings=settings, footprint=held, available=available)


def memory_by_stage(training: TrainingConfig, resources: Resources, hardware: Hardware) -> list[MemoryEstimate]:
    """Return the memory of one worker at ZeRO stages 1, 2 and 3, with all else as configured."""
    return [estimate_memory(training, _changed(resources, zero_stage=stage), hardware) for stage in (1, 2, 3)]


def check_memory(steps: Iterable[Step], resources: Resources, hardware: Hardware) -> None:
    """Raise ConfigError if one of the steps cannot fit into the memory, and say which settings would."""
    trainings = training_configs(steps)
    for name, config in trainings.items():
        estimate = estimate_memory(config, resources, hardware)
        # Not `not fits`: a tight fit may work, and only what cannot is refused.
        if estimate.cannot_fit:
            proposed = propose_resources(list(trainings.values()), resources, hardware)
            raise ConfigError(f"{name}: {_shortage(estimate, hardware)}. {_way_out(proposed)}")


def propose_resources(
    trainings: Sequence[TrainingConfig], resources: Resources, hardware: Hardware
) -> Resources | None:
    """Return settings that fit every training, or None if there are none.

    The first candidate that allows an efficient micro-batch wins, with the largest that fits. If none does, the one with the
    largest micro-batch wins."""
    worker_batch = math.ceil(max(training.recipe.global_batch for training in trainings) / resources.worker_range[0])
    fitting: list[Resources] = []
    for candidate in _candidates(resources, hardware):
        best = _with_largest_micro_batch(trainings, candidate, hardware, worker_batch)
        # A worker's whole batch may be smaller than what is efficient, and is then good enough.
        if best and best.micro_batch >= min(MIN_EFFICIENT_BATCH, worker_batch):
            return best
        fitting += [best] if best else []
    return max(fitting, key=lambda one: one.micro_batch, default=None)


def as_set_options(resources: Resources) -> str:
    """Return a proposal as `--set` options for the command line."""
    fields: dict[str, object] = {"micro_batch": resources.micro_batch, "zero_stage": resources.zero_stage}
    if resources.activation_checkpointing:
        fields["activation_checkpointing"] = "true"
    if resources.offload != "none":
        fields["offload"] = resources.offload
    if resources.checkpoint_copy != "memory":
        fields["checkpoint_copy"] = resources.checkpoint_copy
    return " ".join(f"--set resources.{name}={value}" for name, value in fields.items())


def estimate_effort(training: TrainingConfig, resources: Resources, hardware: Hardware, *, images: int) -> Effort:
    """Return steps and time of a training with `images` per epoch, at the minimum number of workers."""
    recipe: Recipe = training.recipe
    steps = steps_total(images, recipe.global_batch, recipe.epochs)
    seen, peak = steps * recipe.global_batch, hardware.peaks.get(recipe.precision)
    # a CPU's peak is that of all its cores together, however many workers share them
    devices = 1 if hardware.kind == "cpu" else resources.worker_range[0]
    flops = seen * _flops_per_image(training, recompute=resources.activation_checkpointing)
    seconds = None
    if peak:
        low, high = hardware.mfu
        # The good utilisation first: it gives the shorter time.
        seconds = (flops / (devices * peak * high), flops / (devices * peak * low))
    return Effort(steps=steps, images=seen, seconds=seconds)


def images_per_epoch(step: Step, store: Store) -> int | None:
    """Return how many images a training step reads per epoch, or None if they have not been counted yet.

    They are counted in the receipt of its shards or, before these exist, in that of their snapshot."""
    limit = getattr(step.config, "train_labels", None)
    shards = step.inputs["shards"]
    if receipt := read_receipt(store.at(shards.directory)):
        images = DatasetFacts.read(receipt.facts).counts.splits.get("train", Counts()).served
    elif (listing := shards.inputs.get("snapshot")) and (receipt := read_receipt(store.at(listing.directory))):
        images = SnapshotFacts.read(receipt.facts).splits.get("train", 0)
    else:
        images = 0
    # A limit above the number of images selects them all; 0 means not counted.
    return min(limit or images, images) or None


def _shortage(estimate: MemoryEstimate, hardware: Hardware) -> str:
    workers, resources = estimate.resources.worker_range[0], estimate.resources
    split = hardware.kind == "cpu" and workers > 1
    shared = f" ({hardware.memory_bytes / GIB:.1f} GiB shared by {workers} workers)" if split else ""
    return (
        f"resources.micro_batch={resources.micro_batch} at zero_stage={resources.zero_stage} needs about "
        f"{estimate.footprint.total / GIB:.1f} GiB per worker, but a worker on {hardware.name} has "
        f"{estimate.available / GIB:.1f} GiB{shared}"
    )


def _way_out(proposed: Resources | None) -> str:
    if proposed is None:
        return "No micro-batch fits at any ZeRO stage: use more workers or larger devices"
    return f"Write {as_set_options(proposed)}; mae plan shows the details"


def _candidates(resources: Resources, hardware: Hardware) -> Iterator[Resources]:
    """Settings to try, fastest first. What the user has turned on stays on."""
    workers = resources.worker_range[0]
    # One worker has nothing to partition.
    stages = (1, 2, 3) if workers > 1 else (1,)
    # Stages before recomputation: partitioning costs communication, recomputing a third more work.
    for recompute in (False, True) if not resources.activation_checkpointing else (True,):
        for stage in stages:
            yield _changed(resources, zero_stage=stage, activation_checkpointing=recompute)
    # Last resorts: they move memory elsewhere and pay for it at every step, or at every save.
    if hardware.kind == "cuda" and resources.offload == "none":
        yield _changed(resources, zero_stage=stages[-1], activation_checkpointing=True, offload="optimizer")
    if hardware.kind == "cpu" and resources.checkpoint_copy == "memory":
        yield _changed(resources, zero_stage=stages[-1], activation_checkpointing=True, checkpoint_copy="disk")


def _with_largest_micro_batch(
    trainings: Sequence[TrainingConfig], candidate: Resources, hardware: Hardware, worker_batch: int
) -> Resources | None:
    """The candidate with the largest micro-batch that fits every training, or None."""

    def fits(size: int) -> bool:
        return all(estimate_memory(one, _changed(candidate, micro_batch=size), hardware).fits for one in trainings)

    whole, *parts = _micro_batch_sizes(worker_batch)
    # Tried apart from the others: without accumulation no gradients are held beside the next activations, so that the whole batch
    # may fit where half of it does not. Among the others, smaller is always cheaper, and bisection finds the largest.
    if fits(whole):
        return _changed(candidate, micro_batch=whole)
    # `parts` falls in size, so the key is False, ..., False, True, ..., True.
    found = bisect.bisect_left(parts, 1, key=fits)
    return _changed(candidate, micro_batch=parts[found]) if found < len(parts) else None


def _micro_batch_sizes(worker_batch: int) -> Iterator[int]:
    """The distinct sizes of a worker's batch whole, in halves, in thirds and so on, largest first. O(sqrt(worker_batch))."""
    size = worker_batch
    yield size
    while size > 1:
        # One pass more, and the smallest size that manages with as many: a size in between would only cost memory.
        size = math.ceil(worker_batch / math.ceil(worker_batch / (size - 1)))
        yield size


def _changed(resources: Resources, **fields: object) -> Resources:
    return resources.model_copy(update=fields)


def _model_size(training: TrainingConfig, settings: EngineSettings) -> ModelSize:
    if isinstance(training, PretrainConfig):
        return autoencoder_size(training.model, settings)
    return classifier_size(training.encoder, settings, num_classes=CLASSES, trained_blocks=training.trained_blocks)


def _pixel_bytes(training: TrainingConfig) -> int:
    """Bytes of a picture."""
    height, width = (training.model.encoder if isinstance(training, PretrainConfig) else training.encoder).image_size
    return height * width * 3


def _flops_per_image(training: TrainingConfig, *, recompute: bool) -> int:
    """FLOPs of forward and backward pass."""
    if isinstance(training, PretrainConfig):
        return training_flops(training.model) + (forward_flops(training.model) if recompute else 0)
    forward = encoder_flops(training.encoder, visible_patches=training.encoder.num_patches)
    step = classifier_training_flops(training.encoder, num_classes=CLASSES, trained_blocks=training.trained_blocks)
    # The backward pass costs two forward passes of what is trained, and that is what is recomputed.
    return step + ((step - forward) // 2 if recompute else 0)
