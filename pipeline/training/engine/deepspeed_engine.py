"""The optimiser of all workers together: DeepSpeed ZeRO 1-3 behind a small face. The one importer of deepspeed.

The global mean is exact at every world size, slices even or not: a worker's loss is its local sum of per-sample losses times
W/B, and DeepSpeed averages over the W workers. torch's fused AdamW makes the step, on the GPU or, offloaded, on the CPU:
faster than the unfused one (benchmarks.train_step), and no CPU operator of DeepSpeed's to compile.

State goes in and out as fragments (parameter, kind, start, values): float32 weights and Adam moments that this rank holds,
read without collectives, so that any world size and ZeRO stage can read what any other wrote.
Errors: ConfigError when DeepSpeed's effective settings are not the ones asked for (engine_settings)."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_core.optim import ParameterGroup
from mae_core.vit import Block
from pipeline.errors import ConfigError
from pipeline.training.engine.settings import EPS, EngineSettings, check_effective, deepspeed_config
from pipeline.training.world import World

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
Lookup = Callable[[str, Kind, int, int], Tensor]
"""(parameter, kind, start, count) -> float32 [count], from a checkpoint."""


class Fragment(NamedTuple):
    """A run of one flattened parameter that this rank holds, in float32."""

    parameter: str
    kind: Kind
    start: int
    values: Tensor


class MicroBatch(NamedTuple):
    """Inputs of one forward pass; `weights` [b] is 1.0 for a sample and 0.0 for padding."""

    inputs: tuple[Tensor, ...]
    weights: Tensor


class Engine:
    """Trains `module`, whose forward gives per-sample losses [b], as one of the workers of `world`."""

    def __init__(
        self, module: nn.Module, groups: Sequence[ParameterGroup], settings: EngineSettings, world: World
    ) -> None:
        deepspeed = _deepspeed()
        if settings.activation_checkpointing:
            _recompute_blocks(module)
        self.settings, self.world = settings, world
        self.phase: Callable[[Literal["forward", "backward"]], AbstractContextManager[None]] = lambda _: nullcontext()
        """Told what begins; whoever watches puts himself here."""
        # lr=0: a step that DeepSpeed took of its own accord would not move a weight; rates are set at every step.
        parameter_groups = [
            {"params": list(group["params"]), "weight_decay": group["weight_decay"], "lr": 0.0} for group in groups
        ]
        optimizer = torch.optim.AdamW(parameter_groups, lr=0.0, betas=settings.betas, eps=EPS, fused=True)
        self._scales = [float(group["lr_scale"]) for group in groups]
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module.to(world.device), optimizer=optimizer, config=deepspeed_config(settings)
        )
        check_effective(self._engine, settings, world)
        self._prime()

    @property
    def module(self) -> nn.Module:
        """The live module (its weights are in the compute precision; under ZeRO-3 they are gathered as it runs)."""
        module: nn.Module = self._engine.module
        return module

    @property
    def learning_rates(self) -> list[float]:
        """The live optimiser's rates, group by group."""
        return [float(group["lr"]) for group in self._zero.param_groups]

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimiser applied; it skips one whose gradients overflowed."""
        state = next(iter(self._zero.optimizer.state.values()))
        return int(state["step"])

    def train_step(self, micro_batches: Sequence[MicroBatch], *, global_batch: int, lr: float) -> tuple[float, float]:
        """One optimiser step over this rank's micro-batches; returns (local sum of losses, global gradient norm)."""
        local_sum = self.accumulate(micro_batches, global_batch=global_batch)
        return local_sum, self.apply(lr)

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, global_batch: int) -> float:
        """Gradients of the global mean loss, reduced over all workers; returns the local sum of losses. Moves no weight."""
        if len(micro_batches) != self.settings.accumulation:
            raise ConfigError(
                f"{len(micro_batches)} micro-batches given, the engine accumulates {self.settings.accumulation}"
            )
        loss_sum = torch.zeros((), dtype=torch.float64)
        for index, (inputs, weights) in enumerate(micro_batches, 1):
            with self.phase("forward"):
                per_sample = self._engine(*inputs)
                local_sum = (per_sample * weights.to(per_sample.device)).sum()
            with self.phase("backward"):
                self._engine.backward(local_sum * (self.world.size / global_batch), scale_wrt_gas=False)
            if index < len(micro_batches):
                self._engine.step()  # counts the micro-batch; the last one's is the optimiser's
            loss_sum += local_sum.detach().double().cpu()
        return float(loss_sum)

    def apply(self, lr: float) -> float:
        """Moves the weights by what `accumulate` gathered, each group at `lr` times its scale; returns the gradient norm."""
        for group, scale in zip(self._zero.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Per-sample losses [b] of this rank's samples, in their order, without gradients. Collective under ZeRO-3."""
        with torch.no_grad():
            parts = [(self._engine.module(*inputs).cpu(), weights.cpu() > 0) for inputs, weights in micro_batches]
        return torch.cat([per_sample[real] for per_sample, real in parts])

    def squared_grad_norm(self) -> float:
        """This rank's part of the squared norm of what `accumulate` gathered; all ranks' parts add up. NaN or infinite when one
        gradient is. Known before anything moves, at every stage and precision: DeepSpeed's own checks differ by both."""
        if self.settings.offload == "optimizer":
            norms = list(self._norms.values())
        else:
            norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in self._gradients()]
        return float(torch.stack(norms).double().square().sum()) if norms else 0.0

    def discard(self) -> None:
        """Drops what `accumulate` gathered and moves nothing, by DeepSpeed's own way out of an overflow: it clears all it holds."""
        for held in self._norms.values() if self.settings.offload == "optimizer" else self._gradients():
            held.fill_(math.inf)
        self._engine.step()
        if self._engine.was_step_applied():
            raise ConfigError("DeepSpeed applied gradients that are not finite: its check of overflows has moved")

    def _gradients(self) -> Iterator[Tensor]:
        """The reduced gradients that this rank holds, before the optimiser has taken them."""
        for parts in self._zero.averaged_gradients.values():
            yield from parts or ()

    @property
    def _norms(self) -> dict[int, Tensor]:
        """Norms of this rank's parts of the gradients where the optimiser is on the CPU: DeepSpeed takes them as it copies."""
        norms: dict[int, Tensor] = self._zero.norm_for_param_grads
        return norms

    def close(self) -> None:
        """Lets go of module and optimiser state, which DeepSpeed's hooks would keep for as long as the process lives.

        ZeRO-3 keeps them even so; in a process of its own, as Ray Train gives it, that is no matter.
        """
        self._engine.destroy()

    def shapes(self) -> dict[str, list[int]]:
        """Full shape of every trained parameter."""
        parameters = self._engine.module.named_parameters()
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters if p.requires_grad}

    def fragments(self) -> Iterator[Fragment]:
        """Everything of the trained state that this rank holds."""
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in KINDS:
                held = self._held(parameter, kind)
                if held is not None:
                    start, values = held
                    yield Fragment(name, kind, start, values)

    def load(self, lookup: Lookup, *, optimizer_steps: int) -> None:
        """Replaces weights and moments by a checkpoint's. The module must have been built with the same weights already,
        or `spread` must follow: DeepSpeed keeps a copy in the compute precision that this does not touch."""
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in KINDS:
                held = self._held(parameter, kind)
                if held is not None:
                    start, values = held
                    self._put(parameter, kind, lookup(name, kind, start, values.numel()))
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(optimizer_steps)

    def spread(self) -> None:
        """After `load` into a module that holds other weights: each rank's part, in the compute precision, to all. Collective."""
        if self.settings.zero_stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def _held(self, parameter: Any, kind: Kind) -> tuple[int, Tensor] | None:
        """(start, values) of what this rank holds of a parameter; None: nothing."""
        state_key = None if kind == "weight" else kind
        if self.settings.zero_stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            values = mapping.get_hp_fragment(optim_state_key=state_key)
            return int(mapping.lp_fragment_address.start), values.detach().reshape(-1)
        padded = parameter._z3_optimizer.get_local_fp32_param(parameter, state_key).reshape(-1)
        start = self.world.rank * padded.numel()
        count = min(padded.numel(), int(parameter.ds_numel) - start)
        return (start, padded[:count].detach()) if count > 0 else None

    def _put(self, parameter: Any, kind: Kind, values: Tensor) -> None:
        state_key = None if kind == "weight" else kind
        if self.settings.zero_stage < 3:
            target = parameter._hp_mapping.get_hp_fragment(optim_state_key=state_key)
            target.data.copy_(values.to(target.device))
            return
        padded = parameter._z3_optimizer.get_local_fp32_param(parameter, state_key).reshape(-1).clone()
        padded[: values.numel()] = values.to(padded.device)
        parameter._z3_optimizer.set_local_hp_param(padded, parameter, state_key)

    def _prime(self) -> None:
        """Gives Adam its (zero) state now: it makes it at the first step, too late to be loaded or saved."""
        sharded = self.settings.zero_stage == 3
        flats = self._zero.fp32_partitioned_groups_flat if sharded else self._zero.single_partition_of_fp32_groups
        for flat in flats:
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if not sharded:
            self._zero._lazy_init_hp_params_optimizer_state()


def _recompute_blocks(module: nn.Module) -> None:
    """Has every Transformer block computed again in the backward pass. From outside: the model's code and names stay as they are.

    No generator is drawn from inside a block (drop path's noise is an argument), so there is no random state to keep."""
    for part in module.modules():
        if isinstance(part, Block):
            again = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
            part.forward = again  # type: ignore[method-assign]


def initial_state(module: nn.Module) -> Lookup:
    """What `load` takes to begin anew: the module's weights, and moments of zero."""
    weights = dict(module.named_parameters())

    def lookup(parameter: str, kind: Kind, start: int, count: int) -> Tensor:
        if kind != "weight":
            return torch.zeros(count)
        return weights[parameter].detach().float().reshape(-1)[start : start + count]

    return lookup


def _deepspeed() -> Any:
    """DeepSpeed, told which accelerator there is, and to compile nothing."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on a launcher's word, also where there is none
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU the first process would compile a shared-memory all-reduce, for a minute and with a C++ compiler, while its peers
    # wait. Only tensor-parallel inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
