"""The engine's settings, the DeepSpeed configuration made from them, and the check that DeepSpeed follows it.

Every DeepSpeed key that results depend on is written out, because defaults change (clipping went from none to 1.0 in 2026).
At the start each one is read back, from the live optimiser if possible, and compared.
Errors: ConfigError when a setting in force is not the one asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.cluster.resources import Compile, Offload, ZeroStage
from pipeline.errors import ConfigError
from pipeline.training.world import World

GradientPrecision = Literal["bf16", "fp32"]
EPS = 1e-8  # torch's default, named so that it can be read back
REDUCE_BUCKET_ELEMENTS = 50_000_000
"""Gradients that are reduced together. DeepSpeed's default of 5e8 is a buffer of 1 GiB and larger than most models, so nothing
would be partitioned before the end of the backward pass."""
LIVE_ELEMENTS = 100_000_000
"""Weights that ZeRO-3 keeps gathered at once. DeepSpeed's default of 1e9 exceeds ViT-H: it would keep all of them, always."""
PREFETCH_ELEMENTS = 50_000_000
"""Weights that ZeRO-3 gathers ahead of need."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine needs besides the model."""

    precision: Literal["bf16", "fp32"]
    zero_stage: ZeroStage
    micro_batch: int
    accumulation: int
    """Micro-batches per optimiser step, the same on all ranks."""
    betas: tuple[float, float]
    max_grad_norm: float | None = None
    """Gradients whose norm over all parameters exceeds this are scaled down to it; None for no clipping."""
    offload: Offload = "none"
    activation_checkpointing: bool = False
    """Blocks keep only their input and are recomputed in the backward pass."""
    compile: Compile = "auto"
    """Whether blocks run compiled. `auto`: on CUDA, if the node has what that takes."""
    gradient_precision: GradientPrecision | None = None
    """What gradients are summed in; None for the compute precision."""
    overlap_comm: bool = False
    """Gradients are reduced while the backward pass goes on, on a stream of their own."""
    average_decay: float = 0.0
    """Share of the moving average of the weights that is kept at each step; 0 for no average."""

    @property
    def sums_in(self) -> GradientPrecision:
        """What gradients are summed in, over micro-batches and over workers."""
        return self.gradient_precision or self.precision

    @property
    def deepspeed_stage(self) -> ZeroStage:
        """The stage that DeepSpeed is told.

        At stage 1 it sums bf16 gradients in float32 with another optimiser, which keeps every rank's float32 sums of all gradients
        and has none of the attributes that the engine reads. Stage 2 has the same results and keeps a rank's own sums alone,
        but reduces after every micro-batch.
        """
        return 2 if self.zero_stage == 1 and self.sums_in != self.precision else self.zero_stage

    @property
    def copies_by_bucket(self) -> bool:
        """Whether gradients stay where autograd puts them until their bucket is reduced, and are then copied all at once.

        Otherwise DeepSpeed copies each one into a buffer and out again, which it knows how to do beside the backward pass.
        """
        return not self.overlap_comm and self.offload == "none"


def deepspeed_config(settings: EngineSettings, *, persistent_elements: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every key that results depend on written out.

    `persistent_elements`: parameters of at most this size stay gathered under ZeRO-3.
    """
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if settings.offload == "optimizer" else {}
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_grad_norm or 0.0,  # 0 is DeepSpeed's word for none
        # `Engine.accumulate` multiplies by W / B and counts on DeepSpeed dividing by W exactly once.
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # Over workers and over micro-batches.
        "communication_data_type": settings.sums_in,
        "data_types": {"grad_accum_dtype": settings.sums_in},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on the CPU too
        "zero_optimization": {
            "stage": settings.deepspeed_stage,
            # False saves a copy per gradient, into a buffer from which it is copied into another one to be reduced.
            "contiguous_gradients": not settings.copies_by_bucket,
            "overlap_comm": settings.overlap_comm,  # the default depends on the stage: on for 3 only
            # True would deal parameters out to ranks in turns: many short fragments in a checkpoint, not one long run.
            "round_robin_gradients": False,
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            # DeepSpeed would keep parameters below 1e5 elements gathered; 0 treats all alike, for more small gathers.
            "stage3_param_persistence_threshold": persistent_elements,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            **offload,
        },
        # Makes ZeRO 1 and 2 ask in bf16, too, whether gradients overflowed. `Engine` answers from the norm that it knows.
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1,  # never: the loop has its own progress line
    }


def check_effective(engine: Any, settings: EngineSettings, world: World, *, persistent_elements: int) -> None:
    """Compare what a DeepSpeed engine runs with and what was asked for. Errors: ConfigError names the first difference."""
    for key, in_force, asked in _in_force_and_asked(engine, settings, world, persistent_elements):
        if in_force != asked:
            raise ConfigError(
                f"DeepSpeed runs with {key} = {in_force}, {asked} was asked for: its defaults have changed. Install the version "
                "in constraints.txt"
            )


def _in_force_and_asked(
    engine: Any, settings: EngineSettings, world: World, persistent_elements: int
) -> Iterator[tuple[str, object, object]]:
    """Yield (key, in force, asked for). The live optimiser comes last: which attributes it has follows from the rest."""
    config, zero = engine._config, engine._config.zero_config
    clipping = settings.max_grad_norm or 0.0
    dtype = torch.bfloat16 if settings.sums_in == "bf16" else torch.float32
    yield "data parallel size", engine.dp_world_size, world.size
    yield "zero_optimization.stage", engine.zero_optimization_stage(), settings.deepspeed_stage
    yield "bf16.enabled", engine.bfloat16_enabled(), settings.precision == "bf16"
    yield "bf16.check_grad_overflow", config.bfloat16_config.check_grad_overflow, True
    yield "fp16.enabled", engine.fp16_enabled(), False
    yield "torch_autocast.enabled", engine.torch_autocast_enabled(), False
    yield "data_types.grad_accum_dtype", engine.get_data_types()[1], dtype
    yield "communication_data_type", engine.communication_data_type, dtype
    yield "gradient_accumulation_steps", engine.gradient_accumulation_steps(), settings.accumulation
    yield "gradient_clipping", engine.gradient_clipping(), clipping
    yield "prescale_gradients", config.prescale_gradients, False
    yield "gradient_predivide_factor", engine.gradient_predivide_factor(), 1.0
    yield "zero_optimization.overlap_comm", zero.overlap_comm, settings.overlap_comm
    yield "zero_optimization.round_robin_gradients", zero.round_robin_gradients, False
    yield "zero_optimization.zero_quantized_weights", zero.zero_quantized_weights, False
    yield "zero_optimization.zero_quantized_gradients", zero.zero_quantized_gradients, False
    yield "zero_optimization.offload_optimizer", engine.zero_use_cpu_optimizer(), settings.offload == "optimizer"
    yield "zero_optimization.offload_param", zero.offload_param, None
    for key, in_force, asked in (
        ("reduce_bucket_size", zero.reduce_bucket_size, REDUCE_BUCKET_ELEMENTS),
        ("stage3_param_persistence_threshold", zero.param_persistence_threshold, persistent_elements),
        ("stage3_max_live_parameters", zero.max_live_parameters, LIVE_ELEMENTS),
        ("stage3_max_reuse_distance", zero.max_reuse_distance, LIVE_ELEMENTS),
        ("stage3_prefetch_bucket_size", zero.prefetch_bucket_size, PREFETCH_ELEMENTS),
    ):
        yield f"zero_optimization.{key}", in_force, asked
    yield "zero_optimization.contiguous_gradients", zero.contiguous_gradients, not settings.copies_by_bucket
    live = engine.optimizer
    # What the optimiser holds, in case a value in the config above is accepted but not handed on.
    yield "the live clipping", live.clip_grad, clipping
    yield "the live type of summed gradients", live.gradient_accumulation_dtype, dtype
    yield "the live type of reduced gradients", live.communication_data_type, dtype
    yield "the live type of the weights that move", live.master_weights_and_grads_dtype, torch.float32
    yield "the live optimiser", type(live.optimizer), torch.optim.AdamW
    # Betas and eps were given to AdamW itself; DeepSpeed rebuilds its groups around flat buffers.
    for number, group in enumerate(live.optimizer.param_groups):
        yield f"betas of group {number}", tuple(group["betas"]), settings.betas
        yield f"eps of group {number}", group["eps"], EPS
