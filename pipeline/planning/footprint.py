"""Peak memory of a training worker, computed from config and layout: weights, gradients, optimiser, activations, workspace.

DeepSpeed holds more than the textbook's 16 bytes per weight: at ZeRO-1 and 2 a second copy of float32 weights, a bucket of
gradients being reduced, and the partition's gradients a second time, flat and in float32, while AdamW steps. A training step has
four moments that can be the largest. The footprint is that of the largest one, so that its parts add up to a total that occurs.

Shapes: N trained weights, P = N / W of them a worker's own partition, b bytes per value in the compute precision.
Units:  bytes. CUDA's context, NCCL's buffers and what the allocators waste are in `overhead`, measured or assumed as said there.
Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py, read and traced; activations: mae_core.cost.
`python -m benchmarks.footprint` compares the result with real processes; docs/planning.md has the comparison."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

from mae_core.config import MAEConfig, ViTConfig
from mae_core.cost import Recompute, activation_bytes, classifier_weights, encoder_activation_bytes, parameter_count
from pipeline.data.feed.loader import PREFETCH_BATCHES, batches_ahead
from pipeline.training.engine.settings import LIVE_ELEMENTS, PREFETCH_ELEMENTS, REDUCE_BUCKET_ELEMENTS, EngineSettings

_MIB = 2**20
Device = Literal["cpu", "cuda"]
OVERHEAD: Mapping[Device, int] = {"cpu": 100 * _MIB, "cuda": 1024 * _MIB}
"""CPU: measured, the modules and buffers that come with the engine. CUDA: assumed, for its context and NCCL; not yet measured."""
STATE_BYTES = 12
"""Per trained weight: the weight itself and AdamW's two moments, in float32."""
AVERAGE_BYTES = 4
"""Per trained weight, where a recipe keeps the moving average of the weights: it lies beside AdamW's moments."""
DECODE_PROCESS_BYTES = 80 * _MIB
"""Own memory of a decode worker, without what it shares with the server that it was forked from (docs/planning.md)."""
DECODE_SERVER_BYTES = 320 * _MIB
"""That server's memory: torch and what decodes."""
MARGIN = 0.15
"""Relative error to allow for in either direction (docs/planning.md)."""


class Footprint(NamedTuple):
    """One worker's memory at the largest moment of a training step."""

    weights: int
    """In the compute precision, including those that ZeRO-3 gathers for the moment."""
    gradients: int
    optimizer: int
    """Float32 weights and AdamW's moments."""
    activations: int
    workspace: int
    """Buckets, and copies made while gradients are reduced and AdamW steps."""
    overhead: int
    copy: int = 0
    """Copy of the state from which a checkpoint is written, if it is in the device's memory."""
    host: int = 0
    """Memory of the node, in addition to the device's: offloaded state and, on a GPU node, the checkpoint's copy and the feed."""

    @property
    def total(self) -> int:
        """Memory of the device."""
        return sum(self) - self.host


class ModelSize(NamedTuple):
    """What the footprint needs to know of a model."""

    weights: int
    """Weights that are trained."""
    largest_group: int
    """Weights in the largest parameter group of the optimiser; AdamW steps group by group."""
    last_weights: int
    """Weights of the last layers (decoder or head). Their gradients exist before the encoder's activations can be freed."""
    activations: int
    """Bytes per image after the forward pass."""
    first_activations: int
    """Bytes per image that are left once the backward pass has gone through the last layers."""
    frozen: int = 0
    """Weights without gradient and optimiser state."""


def autoencoder_size(config: MAEConfig, settings: EngineSettings) -> ModelSize:
    """Return the size of an autoencoder in pretraining."""
    width, recompute = _width(settings), _recompute(settings)
    weights, encoder = _weights(config), _weights(config.encoder)
    first = encoder_activation_bytes(
        config.encoder,
        visible_patches=config.encoder.num_patches if config.encoder_input == "all" else config.visible_patches,
        bytes_per_value=width,
        recompute=recompute,
    )
    everything = activation_bytes(config, bytes_per_value=width, recompute=recompute)
    return ModelSize(
        weights=weights,
        largest_group=weights,  # two groups, and nearly all weights are in the one that decays
        last_weights=weights - encoder,
        activations=everything + _pixels(config.encoder),
        first_activations=min(first, everything),
    )


def classifier_size(
    config: ViTConfig, settings: EngineSettings, *, num_classes: int, trained_blocks: float | None = None
) -> ModelSize:
    """Return the size of a classifier in fine-tuning, which sees whole images.

    `trained_blocks`: the encoder's last blocks that are trained, None for all weights."""
    weights = _classifier_weights(config, num_classes=num_classes, trained_blocks=trained_blocks)
    # Frozen blocks keep no activations, but one has its own while it computes. Half a block counts as a whole one.
    depth = config.depth if trained_blocks is None else max(1, math.ceil(trained_blocks))
    activations = encoder_activation_bytes(
        replace(config, depth=depth),
        visible_patches=config.num_patches,
        bytes_per_value=_width(settings),
        recompute=_recompute(settings),
    )
    dim, head = config.embed_dim, (config.embed_dim + 1) * num_classes
    layer = 4 * dim * dim + 2 * dim * config.mlp_dim  # the learning rate decays by layer, so each layer is a group
    return ModelSize(
        weights=weights.trained,
        largest_group=min(max(layer, head), weights.trained),
        last_weights=head,
        activations=activations + _pixels(config),
        first_activations=activations,
        frozen=weights.frozen,
    )


def footprint(model: ModelSize, settings: EngineSettings, *, workers: int, device: Device) -> Footprint:
    """Return the footprint at the largest moment of a training step, without the checkpoint's copy."""
    return max(_moments(model, settings, workers=workers, device=device), key=lambda moment: moment.total)


def with_checkpoint_copy(
    held: Footprint, model: ModelSize, settings: EngineSettings, *, workers: int, device: Device
) -> Footprint:
    """Add the copy of a worker's state from which a checkpoint is written while training continues."""
    copy = _state_bytes(settings) * math.ceil(model.weights / workers)
    # A CPU worker's copy takes memory that training needs too; a GPU's is in its host's.
    return held._replace(copy=copy) if device == "cpu" else held._replace(host=held.host + copy)


def with_feed(held: Footprint, *, processes: int, batch_bytes: int, device: Device) -> Footprint:
    """Add decode workers and the batches that are read ahead. `batch_bytes`: a worker's part of a global batch.

    Nothing is added on the host for decoding in a thread: its batches are within the margin.
    """
    if device == "cuda":  # the batch in use and the next one, which is copied meanwhile
        held = held._replace(overhead=held.overhead + 2 * batch_bytes)
    if not processes:
        return held
    # those ahead, the one that is due, the one in use and the one before; on a GPU node the last three are pinned copies
    batches = batches_ahead(PREFETCH_BATCHES, batch_bytes) + (3 if device == "cpu" else 5)
    feed = DECODE_SERVER_BYTES + processes * DECODE_PROCESS_BYTES + batches * batch_bytes
    return held._replace(overhead=held.overhead + feed) if device == "cpu" else held._replace(host=held.host + feed)


def _moments(model: ModelSize, settings: EngineSettings, *, workers: int, device: Device) -> tuple[Footprint, ...]:
    """The four candidates: after the forward pass, after the last layers' backward, after all of it, and in AdamW's step."""
    width, sums = _width(settings), _sum_width(settings)
    stage, images = settings.deepspeed_stage, settings.micro_batch
    # `math.ceil`: partitions are padded to equal size.
    whole, own = width * model.weights, width * math.ceil(model.weights / workers)
    elements = min(REDUCE_BUCKET_ELEMENTS, model.weights)
    bucket = width * elements
    constant = _constant(own // width, whole, settings, device=device)
    frozen = math.ceil(model.frozen / workers) if stage == 3 else model.frozen
    constant = constant._replace(weights=constant.weights + width * frozen)
    wide = sums > width  # DeepSpeed keeps the sums of bf16 gradients on the device, even for an offloaded optimiser
    kept = 0 if stage == 3 or (constant.host and not wide) else sums * (own // width)  # until AdamW takes them
    unreduced = whole if stage == 1 else bucket  # ZeRO-1 reduces only after the whole backward pass
    earlier = (
        0 if settings.accumulation == 1 or stage == 3 else whole if stage == 1 else kept
    )  # gradients of earlier micro-batches
    # Up to LIVE_ELEMENTS stay gathered while PREFETCH_ELEMENTS more are on their way.
    everything = whole + width * model.frozen
    gathered = min(width * (LIVE_ELEMENTS + PREFETCH_ELEMENTS), everything) if stage == 3 else 0
    backward = constant._replace(
        weights=constant.weights + gathered,
        gradients=constant.gradients + earlier,
        # Sums in float32 are reduced from a float32 copy of the bucket.
        workspace=_buckets(settings, device) * bucket + (sums * elements if wide else 0),
    )
    # At ZeRO-1 with accumulation the memory of all gradients is held already, and new ones are added in place.
    first = min(unreduced, width * model.last_weights) if stage > 1 or settings.accumulation == 1 else 0
    moments = (
        backward._replace(activations=images * model.activations),
        backward._replace(activations=images * model.first_activations, gradients=backward.gradients + first),
        backward._replace(gradients=constant.gradients + _all_gradients(settings, unreduced, kept, earlier)),
        _optimizer_step(constant, math.ceil(model.largest_group / workers), settings, kept=kept),
    )
    # Small blocks (activations, gradients) fill the heap's holes first, and only what is left of the holes is overhead.
    small = (images * model.activations, images * model.first_activations + first, unreduced, 0)
    holes = _heap_holes(model, settings, device=device)
    # On a CPU, activations are freed while gradients of other sizes arrive and do not fit where they were: the heap keeps both.
    freed = images * model.activations if device == "cpu" else 0
    return tuple(
        moment._replace(overhead=moment.overhead + max(holes - filled, unusable))
        for moment, filled, unusable in zip(moments, small, (0, 0, freed, freed), strict=True)
    )


def _all_gradients(settings: EngineSettings, unreduced: int, kept: int, earlier: int) -> int:
    """Gradients when all have arrived. `kept`: the partition's, reduced; `earlier`: those of earlier micro-batches."""
    # ZeRO-1 reduces in place and needs no room for `kept`, but a CPU's heap keeps about as much: without it, two of the measured
    # layouts are foreseen 17 and 19 % too low. Float32 sums of all micro-batches are one buffer.
    separate = settings.deepspeed_stage == 2 and settings.sums_in == settings.precision
    return unreduced + kept + (earlier if separate else 0)


def _buckets(settings: EngineSettings, device: Device) -> int:
    """Buckets held at once: a flat copy, from ZeRO-2 on its gradients and, at ZeRO-3 on CPUs, gloo's own copy.

    With `overlap_comm` there are also the buffers that they are copied into, two in turns at ZeRO 1 and 2.
    """
    stage = settings.deepspeed_stage
    buffers = (1 if stage == 3 else 2) if settings.overlap_comm else 0
    return buffers + (stage if device == "cpu" else min(stage, 2))


def _heap_holes(model: ModelSize, settings: EngineSettings, *, device: Device) -> int:
    """Freed memory that the C library keeps on a CPU in bf16.

    The first float32 weights are freed one by one, with bf16 copies allocated in between. Only small blocks (below 32 MiB:
    activations, gradients) reuse those holes. CUDA's allocator hands such blocks back."""
    return 4 * (model.weights + model.frozen) if settings.precision == "bf16" and device == "cpu" else 0


def _constant(own: int, whole: int, settings: EngineSettings, *, device: Device) -> Footprint:
    """What is held throughout. `own`: weights of the partition; `whole`: bytes of all weights."""
    width, sums, sharded = _width(settings), _sum_width(settings), settings.zero_stage == 3
    state = _state_bytes(settings) * own  # in float32, too, the weights that AdamW updates are a second copy
    offloaded = settings.offload == "optimizer" and device == "cuda"
    first_shards = width * own if sharded and device == "cpu" else 0  # freed at the start, kept by the C library
    return Footprint(
        weights=width * own if sharded else whole,
        gradients=sums * own if sharded and not offloaded else 0,
        optimizer=0 if offloaded else state,
        activations=0,
        workspace=0,
        overhead=OVERHEAD[device] + first_shards,
        host=state + (4 + (sums if sharded else width)) * own if offloaded else 0,
    )


def _optimizer_step(constant: Footprint, group: int, settings: EngineSettings, *, kept: int) -> Footprint:
    """AdamW's step, for which a group's gradients are copied, flat and in float32, from the kept ones."""
    # 4 bytes for the flat float32 copy, and 2 more for the flat one that it is cast from if sums are bf16.
    per_weight = 6 if settings.sums_in == "bf16" else 4
    in_place = settings.sums_in != settings.precision and settings.zero_stage < 3  # sums that are flat float32 already
    copies = 0 if constant.host or in_place else per_weight * group
    return constant._replace(gradients=constant.gradients + kept, workspace=copies)


# Cached, because a search over settings asks for the same model again and again.
_weights = cache(parameter_count)
_classifier_weights = cache(classifier_weights)


def _state_bytes(settings: EngineSettings) -> int:
    """Bytes of state per trained weight."""
    return STATE_BYTES + (AVERAGE_BYTES if settings.average_decay else 0)


def _width(settings: EngineSettings) -> int:
    """Bytes per value in the compute precision."""
    return 2 if settings.precision == "bf16" else 4


def _sum_width(settings: EngineSettings) -> int:
    """Bytes per value of summed gradients."""
    return 2 if settings.sums_in == "bf16" else 4


def _recompute(settings: EngineSettings) -> Recompute:
    return "blocks" if settings.activation_checkpointing else "none"


def _pixels(config: ViTConfig) -> int:
    """Bytes per image: uint8 as loaded, and float32 twice, as pixels and as patches."""
    return config.in_channels * config.image_size[0] * config.image_size[1] * (1 + 4 + 4)
