"""Training steps over all workers: DeepSpeed ZeRO 1-3 behind a small interface. The only importer of deepspeed.

The global mean loss is exact at every world size, whether the global batch divides evenly or not: a worker's loss is its
local sum of per-sample losses times W/B, and DeepSpeed averages over the W workers (B is the global batch). torch's fused
AdamW takes the step, on the GPU or, offloaded, on the CPU. It is faster than the unfused one (`benchmarks.train_step`), and
unlike DeepSpeed's CPU optimiser it needs no operator to be compiled.

State goes in and out as fragments (parameter, kind, start, values): the float32 weights and Adam moments that this rank
holds. They are read without collectives, and any world size and ZeRO stage can read what any other wrote.

Some of this reads private attributes of DeepSpeed. Its public accessors gather whole parameters (or exist for ZeRO-3 only),
and its own checkpoints are bound to one layout. pyproject.toml pins DeepSpeed 0.19, whose attributes these are;
tests/pipeline/training/engine compares every stage with plain torch and notices when one of them changes its meaning.
Errors: ConfigError when DeepSpeed's effective settings are not the ones asked for (`engine/settings.py`)."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mae_core.optimisation.parameter_groups import ParameterGroup
from mae_core.vit import Block
from pipeline.errors import ConfigError
from pipeline.training.engine.blocks import compile_blocks, recompute_blocks, why_not_compiled
from pipeline.training.engine.gradients import copy_by_bucket, use_known_norm
from pipeline.training.engine.settings import EPS, EngineSettings, check_effective, deepspeed_config
from pipeline.training.world import World

log = logging.getLogger(__name__)

Pass = Literal["compile", "forward", "backward"]
Kind = Literal["weight", "exp_avg", "exp_avg_sq", "average"]
"""`average`: the exponential moving average of the weights, where a recipe asks for it."""
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")
"""What there always is of a parameter."""
Lookup = Callable[[str, Kind, int, int], Tensor]
"""(parameter, kind, start, count) -> float32 [count], usually read from a checkpoint."""


class Fragment(NamedTuple):
    """A contiguous range of one flattened parameter that this rank holds, float32 [count]."""

    parameter: str
    kind: Kind
    start: int
    values: Tensor


class MicroBatch(NamedTuple):
    """Inputs of one forward pass of b samples; `weights` [b] is 1.0 for a sample and 0.0 for padding."""

    inputs: tuple[Tensor, ...]
    weights: Tensor


class Engine:
    """Trains `module`, whose forward returns per-sample losses [b], as one of the workers of `world`."""

    def __init__(
        self, module: nn.Module, groups: Sequence[ParameterGroup], settings: EngineSettings, world: World
    ) -> None:
        deepspeed = _deepspeed(world.device)
        reason = why_not_compiled(settings.compile, world.device)
        if reason is None:
            compile_blocks(module)
        elif settings.compile == "auto" and world.device.type == "cuda":
            log.warning("rank %d: blocks are not compiled, which makes steps slower: %s", world.rank, reason)
        if settings.activation_checkpointing:
            recompute_blocks(module)
        self.settings, self.world = settings, world
        self._compiles = reason is None
        self._compiled_sizes: set[int] = set()  # of micro-batches
        self.phase: Callable[[Pass], AbstractContextManager[None]] = lambda _: nullcontext()
        """Entered around each pass, as "compile" if that may compile the blocks; the loop sets it to watch and time them."""
        # lr=0: a step that DeepSpeed took of its own accord would not move a weight. `apply` sets the rates at every step.
        parameter_groups = [
            {"params": list(group["params"]), "weight_decay": group["weight_decay"], "lr": 0.0} for group in groups
        ]
        optimizer = torch.optim.AdamW(parameter_groups, lr=0.0, betas=settings.betas, eps=EPS, fused=True)
        # Kept here, in the order of the groups: `apply` writes lr times scale into DeepSpeed's groups at every step.
        self._scales = [float(group["lr_scale"]) for group in groups]
        if settings.zero_stage == 3:
            # A block's weights are gathered and released together. DeepSpeed's hooks on the layers inside would gather one matrix
            # at a time and, traced with a compiled block, make it compile again and again.
            deepspeed.utils.set_z3_leaf_modules(module, [Block], raise_if_not_found=False)
        # Biases, norms and tokens: gathering one costs a collective that takes as long as that of a small matrix.
        largest_vector = max((p.numel() for p in module.parameters() if p.numel() in p.shape), default=0)
        initial = initial_state(module)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module.to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(settings, persistent_elements=largest_vector),
        )
        check_effective(self._engine, settings, world, persistent_elements=largest_vector)
        # After the check, which proves that the attributes read below belong to the stage that was asked for.
        if settings.precision == "bf16":
            # DeepSpeed converts the module first and takes its float32 weights from the result.
            self._load(initial, ("weight",))
        del initial  # the float32 weights, before Adam's moments need the memory
        self._create_adam_state()
        self._losses: list[Tensor] = []
        self._grad_norm = torch.zeros(())  # on the CPU, where reading it waits for nothing
        use_known_norm(self._zero, self._grad_norm, zero_stage=settings.zero_stage)
        if settings.copies_by_bucket:
            copy_by_bucket(self._zero, zero_stage=settings.zero_stage)

    @property
    def module(self) -> nn.Module:
        """Return the live module. Its weights are in the compute precision; under ZeRO-3 they are gathered as it runs."""
        module: nn.Module = self._engine.module
        return module

    @property
    def learning_rates(self) -> list[float]:
        """Return the live optimiser's rates, one per parameter group."""
        return [float(group["lr"]) for group in self._zero.param_groups]

    @property
    def optimizer_steps(self) -> int:
        """Return how many steps the optimiser has applied; DeepSpeed skips one whose gradients overflowed."""
        # One flat buffer per group, all stepped together, so any of them has the count.
        state = next(iter(self._zero.optimizer.state.values()))
        return int(state["step"])

    def train_step(self, micro_batches: Sequence[MicroBatch], *, global_batch: int, lr: float) -> tuple[float, float]:
        """Take one optimiser step over this rank's micro-batches; return (local sum of losses, global gradient norm)."""
        self.accumulate(micro_batches, global_batch=global_batch)
        loss_sum, squared_norm = self.measured()
        grad_norm = math.sqrt(self.world.total([squared_norm])[0])
        self.apply(lr, grad_norm=grad_norm)
        return loss_sum, grad_norm

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, global_batch: int) -> None:
        """Compute the gradients of the global mean loss, reduced over all workers. `measured` returns what they are like.

        Moves no weight. Collective: every rank runs the same number of passes, padding included.
        """
        if len(micro_batches) != self.settings.accumulation:
            raise ConfigError(
                f"{len(micro_batches)} micro-batches given, the engine accumulates {self.settings.accumulation}"
            )
        self._losses = []
        for index, (inputs, weights) in enumerate(micro_batches, 1):
            compiles = self._compiles and len(weights) not in self._compiled_sizes
            if compiles and self.world.is_first:
                log.warning(
                    "compiling the blocks for micro-batches of %d samples: this step takes longer", len(weights)
                )
            with self.phase("compile" if compiles else "forward"):
                # [b], float32
                per_sample = self._engine(*inputs)
                # Padding repeats a real sample or is all zeros, so 0 * NaN arises only where that sample is bad itself.
                local_sum = (per_sample * weights).sum()
            with self.phase("compile" if compiles else "backward"):
                # scale_wrt_gas: DeepSpeed would divide by the number of micro-batches, which global_batch already covers.
                self._engine.backward(local_sum * (self.world.size / global_batch), scale_wrt_gas=False)
            if index < len(micro_batches):
                # Only counts the micro-batch. After the last one `step` would move the weights, which `apply` does.
                self._engine.step()
            self._compiled_sizes.add(len(weights))
            self._losses.append(local_sum.detach())

    def measured(self) -> tuple[float, float]:
        """Return the local sum of losses and this rank's part of the squared norm of the accumulated gradients.

        The parts of all ranks add up. NaN or infinite if any gradient is. This is the one read of a step that waits for the
        GPU: everything before it is only queued.
        """
        if self.settings.offload == "optimizer":
            norms = list(self._norms.values())
        else:
            # float32, because bf16 keeps 8 bits of a sum; the squares of the norms are then added in float64.
            norms = list(torch._foreach_norm(list(self._gradients()), 2, dtype=torch.float32))
        squared = torch.stack(norms).double().square().sum() if norms else torch.zeros(())
        *losses, squared_norm = torch.stack([*self._losses, squared.to(self.world.device)]).tolist()
        return sum(losses), squared_norm

    def apply(self, lr: float, *, grad_norm: float) -> None:
        """Move the weights by the accumulated gradients, each group at `lr` times its scale.

        `grad_norm`: their global norm, by which DeepSpeed clips them. If it is not finite, they are dropped.
        """
        for group, scale in zip(self._zero.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale
        if self._step(grad_norm) and self.settings.average_decay:
            averages = [self._zero.optimizer.state[flat]["average"] for flat in self._flats]
            torch._foreach_lerp_(averages, self._flats, 1 - self.settings.average_decay)

    def use_averages(self) -> None:
        """Replace the weights by their averages, if there are any, for what is only scored from now on. Collective."""
        if not self.settings.average_decay:
            return
        with torch.no_grad():
            for flat in self._flats:
                flat.copy_(self._zero.optimizer.state[flat]["average"])
        self.sync_module_weights()

    def losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return the losses [b] of this rank's samples, in their order, without gradients. Collective under ZeRO-3."""
        with torch.no_grad():
            # The bare module: the engine's own forward prepares for a backward pass, which never comes here.
            parts = [(self._engine.module(*inputs).cpu(), weights.cpu() > 0) for inputs, weights in micro_batches]
        return torch.cat([per_sample[real] for per_sample, real in parts])

    def discard(self) -> None:
        """Drop the accumulated gradients and move nothing.

        DeepSpeed has no call for this. It is told that their norm is infinite, so it skips the step and clears every buffer
        that it holds, in whatever stage.
        """
        if self._step(math.inf):
            raise ConfigError(
                "DeepSpeed applied gradients that are not finite: its overflow check has changed. Install the version "
                "in constraints.txt"
            )

    def _step(self, grad_norm: float) -> bool:
        """Let DeepSpeed step with this norm; return whether it moved the weights."""
        self._grad_norm.fill_(grad_norm)
        self._engine.step()
        moved = bool(self._engine.was_step_applied())
        if not moved and self.settings.zero_stage < 3:
            # Offloaded, DeepSpeed forgets to drop float32 sums of bf16 gradients: the next step would add to them.
            self._zero.averaged_gradients.update(dict.fromkeys(self._zero.averaged_gradients))
        return moved

    def _gradients(self) -> Iterator[Tensor]:
        """Yield the reduced gradients that this rank holds, before the optimiser has taken them."""
        # The same attribute at every stage: a list of tensors per parameter group, or None before the first backward pass.
        for parts in self._zero.averaged_gradients.values():
            yield from parts or ()

    @property
    def _norms(self) -> dict[int, Tensor]:
        """Return the gradient norms of this rank's part of each parameter, for an optimiser on the CPU.

        There DeepSpeed copies gradients to the CPU as they are reduced and keeps no `averaged_gradients`. It takes these norms
        on the way, and skips the step if their total is not finite.
        """
        norms: dict[int, Tensor] = self._zero.norm_for_param_grads
        return norms

    def close(self) -> None:
        """Release module and optimiser state, which DeepSpeed's hooks would otherwise keep alive as long as the process.

        ZeRO-3 keeps them even so, which does not matter in a process of its own, as Ray Train starts one.
        """
        self._engine.destroy()

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every trained parameter."""
        # ZeRO-3 leaves an empty placeholder in the module and keeps the full shape in `ds_shape`.
        parameters = self._engine.module.named_parameters()
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in parameters if p.requires_grad}

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        """What there is of a parameter."""
        return (*KINDS, "average") if self.settings.average_decay else KINDS

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's float32 weights: ZeRO hands AdamW flat buffers in place of the parameters, in another list at each stage."""
        sharded = self.settings.zero_stage == 3
        flats = self._zero.fp32_partitioned_groups_flat if sharded else self._zero.single_partition_of_fp32_groups
        return list(flats)

    def fragments(self) -> Iterator[Fragment]:
        """Yield all the trained state that this rank holds, without communication."""
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in self._kinds:
                local = self._local_values(parameter, kind)
                if local is not None:
                    start, values = local
                    yield Fragment(name, kind, start, values)

    def load(self, lookup: Lookup, *, optimizer_steps: int) -> None:
        """Replace the float32 weights and moments that this rank holds by those of a checkpoint.

        The module must have been built with the same weights already, or `sync_module_weights` must follow: DeepSpeed keeps a
        copy in the compute precision that this does not touch.
        """
        self._load(lookup, self._kinds)
        for state in self._zero.optimizer.state.values():
            state["step"].fill_(optimizer_steps)  # Adam's bias correction goes on from here

    def _load(self, lookup: Lookup, kinds: Sequence[Kind]) -> None:
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind in kinds:
                local = self._local_values(parameter, kind)
                if local is not None:
                    start, values = local
                    self._set_local_values(parameter, kind, lookup(name, kind, start, values.numel()))

    def sync_module_weights(self) -> None:
        """Copy the float32 weights into the module, in its compute precision. Collective.

        Needed after `load` into an engine whose module holds other weights.
        """
        if self.settings.zero_stage < 3:
            self._zero.update_lp_params()  # each rank's part is cast, then gathered by all
            return
        # What ZeRO-3's own step does last. The module's partitions are refreshed; the next forward pass gathers them, but
        # for those that stay gathered.
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def _local_values(self, parameter: Any, kind: Kind) -> tuple[int, Tensor] | None:
        """Return (start, values) of what this rank holds of a parameter, or None if it holds nothing of it."""
        state_key = None if kind == "weight" else kind
        if self.settings.zero_stage < 3:
            # ZeRO 1 and 2 link each parameter of the module to its range in this rank's float32 partition ("hp": high
            # precision). DeepSpeed's own `safe_get_full_*` helpers start here too, but gather the whole parameter.
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            values = mapping.get_hp_fragment(optim_state_key=state_key)  # a view, not a copy
            return int(mapping.lp_fragment_address.start), values.detach().reshape(-1)
        # ZeRO-3 cuts every parameter into W equal parts and pads the last ones.
        padded = parameter._z3_optimizer.get_local_fp32_param(parameter, state_key).reshape(-1)
        start = self.world.rank * padded.numel()  # parts are equal and in order of rank
        count = min(padded.numel(), int(parameter.ds_numel) - start)  # may be negative: a part of padding alone
        return (start, padded[:count].detach()) if count > 0 else None

    def _set_local_values(self, parameter: Any, kind: Kind, values: Tensor) -> None:
        state_key = None if kind == "weight" else kind
        if self.settings.zero_stage < 3:
            target = parameter._hp_mapping.get_hp_fragment(optim_state_key=state_key)
            target.data.copy_(values.to(target.device))
            return
        # The setter takes a whole part: the padding keeps what it holds.
        padded = parameter._z3_optimizer.get_local_fp32_param(parameter, state_key).reshape(-1).clone()
        padded[: values.numel()] = values.to(padded.device)
        parameter._z3_optimizer.set_local_hp_param(padded, parameter, state_key)

    def _create_adam_state(self) -> None:
        """Create Adam's state, all zeros, now: AdamW does so at its first step, which is too late to load or save it.

        The average of the weights lies there too. AdamW does not touch it, and DeepSpeed finds it by parameter like the rest.
        """
        for flat in self._flats:
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device),  # a tensor beside the weights, as fused AdamW requires
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
                **({"average": flat.detach().clone()} if self.settings.average_decay else {}),
            }
        if self.settings.zero_stage < 3:
            # ZeRO-3 looks the state up each time; ZeRO 1 and 2 link it to the parameters once, in their first step
            self._zero._lazy_init_hp_params_optimizer_state()


def initial_state(module: nn.Module) -> Lookup:
    """Return a lookup for `load` that starts training again: the module's weights as they are now, and moments of zero."""
    # Names must be those of the engine's module, which DeepSpeed leaves as they are. Detached, so that they keep their memory
    # when the module is converted: without a copy, these are the weights before that.
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def lookup(parameter: str, kind: Kind, start: int, count: int) -> Tensor:
        if kind not in ("weight", "average"):
            return torch.zeros(count)
        return weights[parameter].float().reshape(-1)[start : start + count]

    return lookup


def _deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, set to compile nothing. Imported here because that takes seconds."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on a launcher's variable even without a launcher
    # It would take a GPU wherever there is one. It looks once per process, so this is without effect on a second engine.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # after the import, which sets its own level
    # On a CPU the first process would compile a shared-memory all-reduce, for a minute and with a C++ compiler, while its peers
    # wait. Only tensor-parallel inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
