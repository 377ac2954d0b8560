"""What a training worker holds at most, from config and layout alone: weights, gradients, optimiser, activations, workspace.

DeepSpeed keeps more than the textbook's 16 bytes a weight: float32 weights beside equal float32 ones at ZeRO-1 and 2, a bucket of
gradients under way, the partition's gradients once more, flat and in float32, while AdamW steps. A step has four moments that can
be the largest; the footprint is that of the largest one, and its parts add up to it.

Shapes: N weights, P = N / W of them a worker's own, b bytes a value of the compute precision, B weights in a reduce bucket.
Units:  bytes. CUDA's context, NCCL's buffers and what the allocators waste are in `overhead`, as measured or assumed there.
Errors: none.       Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py, read and traced
(benchmarks/footprint.py compares with real processes); activations: mae_core.cost."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

from mae_core.config import MAEConfig, ViTConfig
from mae_core.cost import Recompute, activation_bytes, encoder_activation_bytes, parameter_count
from pipeline.training.engine.settings import LIVE_ELEMENTS, PREFETCH_ELEMENTS, REDUCE_BUCKET_ELEMENTS, EngineSettings

_MIB = 2**20
Device = Literal["cpu", "cuda"]
OVERHEAD: Mapping[Device, int] = {"cpu": 100 * _MIB, "cuda": 1024 * _MIB}
"""CPU: measured, modules and buffers that come with the engine. CUDA: assumed, context and NCCL (nobody has measured it yet)."""
STATE_BYTES = 12
"""A weight's: itself and AdamW's two moments, float32."""
MARGIN = 0.15
"""Share by which the real footprint may differ (docs/planning.md)."""


class Footprint(NamedTuple):
    """One worker's memory at its largest moment."""

    weights: int
    """In the compute precision, those gathered for the moment included."""
    gradients: int
    optimizer: int
    """Float32 weights and Adam's moments."""
    activations: int
    workspace: int
    """Buckets, and copies while gradients are reduced and AdamW steps."""
    overhead: int
    copy: int = 0
    """Of the state, for the checkpoint that is being written."""
    host: int = 0
    """Of the node's memory on top, a worker: what is offloaded; on a GPU's host the copy, too."""

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self) - self.host


class Model(NamedTuple):
    """What of a model counts."""

    weights: int
    group: int
    """Weights of the largest optimiser group: AdamW steps group by group."""
    last: int
    """Weights whose gradients are there before the first activations of the others are free: the decoder's, the head's."""
    activations: int
    """Of one image, all at once."""
    first: int
    """Of one image, those that `last` leaves."""


def autoencoder(config: MAEConfig, settings: EngineSettings) -> Model:
    """Pretraining."""
    width, recompute = _width(settings), _recompute(settings)
    weights, encoder = _weights(config), _weights(config.encoder)
    whole = config.encoder_input == "all"
    first = encoder_activation_bytes(
        config.encoder,
        visible_patches=config.encoder.num_patches if whole else config.visible_patches,
        bytes_per_value=width,
        recompute=recompute,
    )
    everything = activation_bytes(config, bytes_per_value=width, recompute=recompute)
    return Model(weights, weights, weights - encoder, everything + _pixels(config.encoder), min(first, everything))


def classifier(config: ViTConfig, settings: EngineSettings, *, num_classes: int) -> Model:
    """Fine-tuning: whole images."""
    held = encoder_activation_bytes(
        config,
        visible_patches=config.num_patches,
        bytes_per_value=_width(settings),
        recompute=_recompute(settings),
    )
    dim, head = config.embed_dim, (config.embed_dim + 1) * num_classes
    layer = 4 * dim * dim + 2 * dim * config.mlp_dim  # the rate decays layer by layer: each is a group
    return Model(_weights(config) + head, max(layer, head), head, held + _pixels(config), held)


def footprint(model: Model, settings: EngineSettings, *, workers: int, device: Device) -> Footprint:
    """At the largest of four moments: all activations are there, the first gradients are, all are, the weights move."""
    return max(_moments(model, settings, workers=workers, device=device), key=lambda moment: moment.total)


def with_checkpoint(held: Footprint, model: Model, *, workers: int, device: Device) -> Footprint:
    """And the copy of a worker's state that is written while training goes on."""
    copy = STATE_BYTES * math.ceil(model.weights / workers)
    return held._replace(copy=copy) if device == "cpu" else held._replace(host=held.host + copy)


def _moments(model: Model, settings: EngineSettings, *, workers: int, device: Device) -> tuple[Footprint, ...]:
    width, stage, images = _width(settings), settings.zero_stage, settings.micro_batch
    whole, own = width * model.weights, width * math.ceil(model.weights / workers)
    bucket = min(width * REDUCE_BUCKET_ELEMENTS, whole)
    standing = _standing(own // width, whole, settings, device=device)
    kept = 0 if stage == 3 or standing.host else own  # the partition's gradients once more, before AdamW takes them
    under_way = whole if stage == 1 else bucket  # gradients of whole weights, not yet reduced
    earlier = (
        0 if settings.accumulation == 1 or stage == 3 else whole if stage == 1 else kept
    )  # of earlier micro-batches
    gathered = min(width * (LIVE_ELEMENTS + PREFETCH_ELEMENTS), whole) if stage == 3 else 0
    backward = standing._replace(
        weights=standing.weights + gathered,
        gradients=standing.gradients + earlier,
        workspace=_copies(stage, device) * bucket,
    )
    first = min(under_way, width * model.last) if stage > 1 or settings.accumulation == 1 else 0
    moments = (
        backward._replace(activations=images * model.activations),
        backward._replace(activations=images * model.first, gradients=backward.gradients + first),
        backward._replace(gradients=standing.gradients + under_way + kept + (earlier if stage == 2 else 0)),
        _moving(standing, math.ceil(model.group / workers), settings, kept=kept),
    )
    small = (images * model.activations, images * model.first + first, under_way, 0)
    holes = _holes(model, settings, device=device)
    # Activations go while gradients come, and those of other sizes do not find room where they were: the heap keeps both.
    gone = images * model.activations if device == "cpu" else 0
    return tuple(
        moment._replace(overhead=moment.overhead + max(holes - filled, left))
        for moment, filled, left in zip(moments, small, (0, 0, gone, gone), strict=True)
    )


def _copies(stage: int, device: Device) -> int:
    """Buckets at once: the one that fills, from ZeRO-2 on a flat copy of it, and gloo's own of what it scatters."""
    return stage if device == "cpu" else min(stage, 2)


def _holes(model: Model, settings: EngineSettings, *, device: Device) -> int:
    """What the C library keeps of a CPU's first float32 weights, given up one by one while bf16 copies come between them.

    Small blocks (below 32 MiB: activations, gradients) go there, large ones do not. CUDA's allocator hands such blocks back."""
    return 4 * model.weights if settings.precision == "bf16" and device == "cpu" else 0


def _standing(own: int, whole: int, settings: EngineSettings, *, device: Device) -> Footprint:
    """What is there all the time."""
    width, sharded = _width(settings), settings.zero_stage == 3
    state = STATE_BYTES * own  # in float32 too the weights that AdamW moves are a second copy
    offloaded = settings.offload == "optimizer" and device == "cuda"
    return Footprint(
        weights=width * own if sharded else whole,
        gradients=width * own if sharded and not offloaded else 0,
        optimizer=0 if offloaded else state,
        activations=0,
        workspace=0,
        overhead=OVERHEAD[device]
        + (width * own if sharded and device == "cpu" else 0),  # the C library keeps the first cuts
        host=state + (4 + width) * own if offloaded else 0,
    )


def _moving(standing: Footprint, group: int, settings: EngineSettings, *, kept: int) -> Footprint:
    """AdamW steps: a group's gradients are flat and float32, copied from what was kept."""
    copies = 0 if standing.host else (4 if settings.precision == "fp32" else 6) * group
    return standing._replace(gradients=standing.gradients + kept, workspace=copies)


_weights = cache(parameter_count)


def _width(settings: EngineSettings) -> int:
    return 2 if settings.precision == "bf16" else 4


def _recompute(settings: EngineSettings) -> Recompute:
    return "blocks" if settings.activation_checkpointing else "none"


def _pixels(config: ViTConfig) -> int:
    """Of one image: uint8 as it comes, and float32, as pixels and as patches."""
    return config.in_channels * config.image_size[0] * config.image_size[1] * (1 + 4 + 4)
