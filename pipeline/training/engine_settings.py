"""What the engine is told, what it tells DeepSpeed, and whether DeepSpeed does it.

Every DeepSpeed key that results depend on is written out, since defaults move (clipping went from none to 1.0 in 2026), and at
start each is read back, from the live optimiser where that can be, and compared.
Errors: ConfigError when a setting in force is not the one asked for."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipeline.errors import ConfigError
from pipeline.training.world import World

Offload = Literal["none", "optimizer"]
"""What lives, and is computed, on the CPU beside a GPU."""
EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine needs beside the model."""

    precision: Literal["bf16", "fp32"]
    zero_stage: Literal[1, 2, 3]
    micro_batch: int
    accumulation: int
    """Micro-steps of one optimiser step, equal on all ranks."""
    betas: tuple[float, float]
    max_grad_norm: float | None = None
    """Gradients whose norm over all parameters is larger are scaled down to it; None: never."""
    offload: Offload = "none"
    activation_checkpointing: bool = False
    """Blocks keep their input alone and are computed again in the backward pass."""


def deepspeed_config(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's configuration, every key that results depend on written out."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if settings.offload == "optimizer" else {}
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.max_grad_norm or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": settings.precision,
        "data_types": {"grad_accum_dtype": settings.precision},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU too
        "zero_optimization": {
            "stage": settings.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "round_robin_gradients": False,
            "use_multi_rank_bucket_allreduce": True,
            "stage3_param_persistence_threshold": 0,
            **offload,
        },
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "steps_per_print": 2**31 - 1,
    }


def check_effective(engine: Any, settings: EngineSettings, world: World) -> None:
    """ConfigError when a DeepSpeed engine runs with something else than was asked for."""
    for key, (in_force, asked) in _in_force_and_asked(engine, settings, world).items():
        if in_force != asked:
            raise ConfigError(f"DeepSpeed runs with {key} = {in_force}, {asked} was asked for: its defaults have moved")


def _in_force_and_asked(engine: Any, settings: EngineSettings, world: World) -> dict[str, tuple[object, object]]:
    live, zero = engine.optimizer, engine._config.zero_config
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    clipping = settings.max_grad_norm or 0.0
    pairs: dict[str, tuple[object, object]] = {
        "zero_optimization.stage": (engine.zero_optimization_stage(), settings.zero_stage),
        "bf16.enabled": (bool(engine.bfloat16_enabled()), settings.precision == "bf16"),
        "fp16.enabled": (bool(engine.fp16_enabled()), False),
        "torch_autocast.enabled": (bool(engine.torch_autocast_enabled()), False),
        "gradient_clipping": (engine.gradient_clipping(), clipping),
        "the optimiser's clipping": (live.clip_grad, clipping),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), settings.accumulation),
        "data_types.grad_accum_dtype": (live.gradient_accumulation_dtype, dtype),
        "communication_data_type": (live.communication_data_type, dtype),
        "the type of the optimiser's weights": (live.master_weights_and_grads_dtype, torch.float32),
        "prescale_gradients": (not engine.postscale_gradients(), False),
        "gradient_predivide_factor": (engine.gradient_predivide_factor(), 1.0),
        "bf16.check_grad_overflow": (engine._config.bfloat16_config.check_grad_overflow, True),
        "zero_optimization.overlap_comm": (zero.overlap_comm, False),
        "zero_optimization.round_robin_gradients": (zero.round_robin_gradients, False),
        "zero_optimization.zero_quantized_weights": (zero.zero_quantized_weights, False),
        "zero_optimization.zero_quantized_gradients": (zero.zero_quantized_gradients, False),
        "zero_optimization.offload_optimizer": (engine.zero_use_cpu_optimizer(), settings.offload == "optimizer"),
        "zero_optimization.offload_param": (zero.offload_param, None),
        "data parallel size": (engine.dp_world_size, world.size),
        "the optimiser": (type(live.optimizer).__name__, torch.optim.AdamW.__name__),
    }
    for number, group in enumerate(live.optimizer.param_groups):
        pairs[f"betas of group {number}"] = (tuple(group["betas"]), settings.betas)
        pairs[f"eps of group {number}"] = (group["eps"], EPS)
    return pairs
