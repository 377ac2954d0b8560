"""Training steps of small heads on a frozen encoder, over all workers, with any torch optimiser.

ZeRO flattens parameters, and LARS steps by the norms of whole ones. A head is small, so every worker keeps all of it: gradients
lie in one flat float32 buffer that is summed over the workers, and all take the same step. The encoder computes in eval mode,
without gradients and in the compute precision; what it returns for the worker's part of the global batch is held until the
heads have learnt from it, because their norms need the statistics of the whole batch first.

The interface is that of the DeepSpeed engine, as far as the loop uses it. Fragments: rank 0 yields the trained weights and their
moments, and the state that `HeadsOnFrozen.state` names as further weights; the encoder is not among them. A momentum is stored as
`exp_avg`. Offloading, compilation, ZeRO stages and clipping have no meaning here and are ignored.
Errors: ConfigError for an optimiser whose state is none of those kinds."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mae_core.classification.global_norm import Share
from mae_core.optimisation.parameter_groups import ParameterGroup
from pipeline.errors import ConfigError
from pipeline.training.engine.deepspeed_engine import Fragment, Kind, Lookup, MicroBatch, Pass
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.world import World

MakeOptimizer = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups -> the optimiser; the engine sets the learning rates at every step."""
_KIND_OF: Mapping[str, Kind] = {"momentum_buffer": "exp_avg", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class HeadsOnFrozen(Protocol):
    """What the engine trains: a module that holds a frozen encoder, and heads that need gradients."""

    encoder: nn.Module

    def __call__(self, images: Tensor) -> Tensor:
        """Return the encoder's features of some images, [b, ...], without gradients."""
        ...

    def learn(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        weights: Sequence[Tensor],
        *,
        batch: int,
        share: Share,
    ) -> Tensor:
        """Add the gradients of the mean loss over a global batch, and return this worker's sum of losses, [].

        Each micro-batch has features [b, ...], labels [b] and weights [b], 0 for padding. `batch`: samples of the global batch.
        Collective through `share`.
        """
        ...

    def losses(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the losses [b] with the statistics of the batch learnt from last."""
        ...

    def accept(self) -> None:
        """Take the batch learnt from last into the running statistics: its step is about to be applied."""
        ...

    def state(self) -> Mapping[str, nn.Parameter]:
        """Return what steps change besides the trained weights, by the names of `named_parameters`."""
        ...


class PlainEngine:
    """Trains the heads of `module` as one of the workers of `world`."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        settings: EngineSettings,
        world: World,
    ) -> None:
        self.settings, self.world = settings, world
        self.module = module.to(world.device)
        self._heads: HeadsOnFrozen = module  # type: ignore[assignment] # a Task promises it with its optimiser
        self._heads.encoder.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        self.module.train()
        self.phase: Callable[[Pass], AbstractContextManager[None]] = lambda _: nullcontext()
        """Entered around each pass; the loop sets it to watch and time them."""
        self.optimizer_steps = 0
        self._trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._gradients = torch.zeros(sum(p.numel() for p in self._trained.values()), device=world.device)
        parts = torch.split(self._gradients, [p.numel() for p in self._trained.values()])
        for parameter, part in zip(self._trained.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)  # a view: autograd adds to it in place
        self._scales = [float(group["lr_scale"]) for group in groups]
        self._optimizer = make_optimizer(
            {"params": list(group["params"]), "weight_decay": group["weight_decay"], "lr": 0.0} for group in groups
        )
        self._create_state()
        self._loss = torch.zeros((), device=world.device)

    @property
    def learning_rates(self) -> list[float]:
        """Return the live optimiser's rates, one per parameter group."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def accumulate(self, micro_batches: Sequence[MicroBatch], *, global_batch: int) -> None:
        """Compute the gradients of the global mean loss, summed over all workers. Moves no weight. Collective."""
        if len(micro_batches) != self.settings.accumulation:
            raise ConfigError(
                f"{len(micro_batches)} micro-batches given, the engine accumulates {self.settings.accumulation}"
            )
        features, labels, weights = [], [], []
        for (images, of_batch, *_), real in micro_batches:
            with self.phase("forward"):
                features.append(self._heads(images))
            labels.append(of_batch)
            weights.append(real)
        with self.phase("backward"):
            self._gradients.zero_()
            self._loss = self._heads.learn(features, labels, weights, batch=global_batch, share=self._share)
            self._share(self._gradients)

    def measured(self) -> tuple[float, float]:
        """Return the local sum of losses and this rank's part of the squared norm of the gradients. Waits for the GPU.

        After their sum all ranks hold the same gradients, so rank 0's part is all of it.
        """
        norm = torch.linalg.vector_norm(self._gradients)
        loss, squared = torch.stack([self._loss.double(), norm.double().square()]).tolist()
        return loss, squared if self.world.is_first else 0.0

    def apply(self, lr: float, *, grad_norm: float) -> None:
        """Move the weights by the accumulated gradients, each group at `lr` times its scale, unless `grad_norm` is not finite."""
        if not math.isfinite(grad_norm):
            return
        for group, scale in zip(self._optimizer.param_groups, self._scales, strict=True):
            group["lr"] = lr * scale
        self._heads.accept()
        self._optimizer.step()
        self.optimizer_steps += 1

    def discard(self) -> None:
        """Drop the accumulated gradients and move nothing: the next step overwrites them."""

    def losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return the losses [b] of this rank's samples, in their order, without gradients."""
        found = []
        with torch.no_grad():
            for (images, labels, *_), weights in micro_batches:
                found.append(self._heads.losses(self._heads(images), labels).cpu()[weights.cpu() > 0])
        return torch.cat(found)

    def use_averages(self) -> None:
        """Do nothing: heads on a frozen encoder have no averages."""

    def close(self) -> None:
        """Do nothing: no hook keeps the module alive."""

    def shapes(self) -> dict[str, list[int]]:
        """Return the full shape of every trained parameter."""
        return {name: list(parameter.shape) for name, parameter in self._trained.items()}

    def fragments(self) -> Iterator[Fragment]:
        """Yield all the state that a checkpoint needs, on rank 0; every other rank has the same."""
        if self.world.is_first:
            for name, kind, values in self._state():
                yield Fragment(name, kind, 0, values.detach().reshape(-1))

    def load(self, lookup: Lookup, *, optimizer_steps: int) -> None:
        """Replace weights, moments and further state by those of a checkpoint."""
        with torch.no_grad():
            for name, kind, values in self._state():
                values.copy_(lookup(name, kind, 0, values.numel()).view_as(values))
        self._set_optimizer_steps(optimizer_steps)

    def sync_module_weights(self) -> None:
        """Do nothing: the weights that `load` replaces are those that the module computes with."""

    def _state(self) -> Iterator[tuple[str, Kind, Tensor]]:
        """Yield (name, kind, live values)."""
        for name, parameter in self._trained.items():
            yield name, "weight", parameter
            for key, values in self._optimizer.state[parameter].items():
                if key != "step":
                    yield name, _KIND_OF[key], values
        for name, parameter in self._heads.state().items():
            yield name, "weight", parameter

    def _create_state(self) -> None:
        """Create the optimiser's state, all zeros, now: it does so at its first step, which is too late to load or save it."""
        self._optimizer.step()  # at a rate of zero
        for state in self._optimizer.state.values():
            if unknown := state.keys() - {*_KIND_OF, "step"}:
                raise ConfigError(f"the optimiser's state {sorted(unknown)} is of no kind that a checkpoint holds")
            for values in state.values():
                values.zero_()  # weight decay has left its mark
        self._set_optimizer_steps(0)

    def _set_optimizer_steps(self, steps: int) -> None:
        self.optimizer_steps = steps
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _share(self, values: Tensor) -> None:
        """Sum over all workers in place, in the group of the workers' devices."""
        if self.world.size > 1:
            dist.all_reduce(values)
