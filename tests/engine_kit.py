"""The engine and plain torch DDP: the same tiny autoencoder for the same steps, run by the processes of a Team."""

from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training_kit import SIDE, Teams, mae_config

from mae_core.randomness import mask_noise
from pipeline.training.engine.deepspeed_engine import KINDS, Engine
from pipeline.training.engine.micro_batches import split
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.tasks import Built, MAETask
from pipeline.training.world import World, enter_world

BETAS = (0.9, 0.95)
STEPS = 20
PEAK_LR = 5e-3


@dataclass(frozen=True)
class Case:
    """One way to train; 13 samples are 6 + 7, 4 + 4 + 5 or 3 + 3 + 3 + 4."""

    zero_stage: int = 1
    batch: int = 13
    micro_batch: int = 13
    precision: str = "fp32"
    max_grad_norm: float | None = None
    offload: str = "none"
    activation_checkpointing: bool = False
    compile: str = "off"
    gradient_precision: str | None = None
    overlap_comm: bool = False


def make_engine(case: Case, module: nn.Module, groups: Any) -> Engine:
    world = enter_world()
    largest = -(-case.batch // world.size)
    micro_batch = min(case.micro_batch, largest)
    settings = EngineSettings(
        precision=case.precision,
        zero_stage=case.zero_stage,
        micro_batch=micro_batch,
        accumulation=-(-largest // micro_batch),
        betas=BETAS,
        max_grad_norm=case.max_grad_norm,
        offload=case.offload,
        activation_checkpointing=case.activation_checkpointing,
        compile=case.compile,
        gradient_precision=case.gradient_precision,
        overlap_comm=case.overlap_comm,
    )
    return Engine(module, groups, settings, world)


def step_on(engine: Engine, inputs: tuple[torch.Tensor, ...], batch: int, lr: float) -> tuple[float, float]:
    """Take one step on this rank's part; return (global mean loss, gradient norm)."""
    micro_batches = split(of_rank(inputs, engine.world), engine.settings, engine.world.device)
    local_sum, norm = engine.train_step(micro_batches, global_batch=batch, lr=lr)
    return engine.world.total([local_sum])[0] / batch, norm


def of_rank(inputs: tuple[torch.Tensor, ...], world: World) -> tuple[torch.Tensor, ...]:
    batch = len(inputs[0])
    mine = slice(world.rank * batch // world.size, (world.rank + 1) * batch // world.size)
    return tuple(tensor[mine] for tensor in inputs)


def held(engine: Engine) -> list[tuple[str, int, torch.Tensor]]:
    return [(f"{f.kind}|{f.parameter}", f.start, f.values.clone()) for f in engine.fragments()]


def assembled(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put all ranks' fragments together; every value must be held exactly once."""
    numel = {name: int(torch.Size(shape).numel()) for name, shape in results[0]["shapes"].items()}
    state = {f"{kind}|{name}": torch.full((numel[name],), torch.nan) for name in numel for kind in KINDS}
    times = {key: torch.zeros(len(value), dtype=torch.int64) for key, value in state.items()}
    for result in results:
        for key, start, values in result["held"]:
            assert values.dtype == torch.float32
            assert values.device.type == "cpu"
            state[key][start : start + len(values)] = values
            times[key][start : start + len(values)] += 1
    for key, count in times.items():
        assert count.eq(1).all(), f"{key}: values are held {count.unique().tolist()} times"
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Twenty steps of the tiny autoencoder


def built_mae() -> Built:
    return MAETask(model=mae_config(), weight_decay=0.05, seed=0).build()


def mae_inputs(batch: int, step: int) -> tuple[torch.Tensor, ...]:
    """Return the same global batch on every rank: images whose patches differ, and mask noise."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), generator=generator).byte()
    ids = list(range(batch * step, batch * (step + 1)))
    return images, torch.as_tensor(mask_noise(0, [0] * batch, ids, mae_config().encoder.num_patches))


def schedule(start: int, stop: int) -> Iterator[tuple[int, float]]:
    """Yield steps with their rates, over a warmup of ten steps."""
    return ((step, PEAK_LR * min(1.0, (step + 1) / 10)) for step in range(start, stop))


def train_mae(
    case: Case, start: int = 0, stop: int = STEPS, state: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Train with the engine, from a state as `assembled` returns it or from the initial weights."""
    built = built_mae()
    if state:
        weights = {name: state[f"weight|{name}"].reshape(p.shape) for name, p in built.module.named_parameters()}
        built.module.load_state_dict(weights)
    with closing(make_engine(case, built.module, built.groups)) as engine:
        if state:
            engine.load(
                lambda name, kind, low, count: state[f"{kind}|{name}"][low : low + count], optimizer_steps=start
            )
        steps = [step_on(engine, mae_inputs(case.batch, step), case.batch, lr) for step, lr in schedule(start, stop)]
        return {
            "losses": [loss for loss, _ in steps],
            "norms": [norm for _, norm in steps],
            "held": held(engine),
            "shapes": engine.shapes(),
            "optimizer_steps": engine.optimizer_steps,
        }


def train_mae_with_ddp(case: Case) -> dict[str, Any]:
    """Do the same with nothing but torch: DistributedDataParallel, clip_grad_norm_, AdamW on float32 weights."""
    world, built = enter_world(), built_mae()
    weights = [parameter for group in built.groups for parameter in group["params"]]
    masters = [nn.Parameter(weight.detach().clone()) for weight in weights]
    if case.precision == "bf16":
        built.module.bfloat16()
    of = dict(zip(weights, masters, strict=True))
    groups = [
        {"params": [of[p] for p in group["params"]], "weight_decay": group["weight_decay"]} for group in built.groups
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8)
    ddp = DistributedDataParallel(built.module)
    losses, norms = [], []
    for step, lr in schedule(0, STEPS):
        inputs = of_rank(mae_inputs(case.batch, step), world)
        parts = list(zip(*(tensor.split(case.micro_batch) for tensor in inputs), strict=True))
        local_sum = 0.0
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else ddp.no_sync():
                loss = ddp(*part).sum()
                (loss * world.size / case.batch).backward()
            local_sum += float(loss.detach())
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        norms.append(float(nn.utils.clip_grad_norm_(masters, case.max_grad_norm or torch.inf)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        losses.append(world.total([local_sum])[0] / case.batch)
    return {"losses": losses, "norms": norms}


@dataclass
class References:
    """Losses and norms of DDP on two workers; each way of training is run only once."""

    teams: Teams
    known: dict[Case, dict[str, Any]]

    def __call__(self, case: Case) -> dict[str, Any]:
        plain = Case(batch=case.batch, precision=case.precision, max_grad_norm=case.max_grad_norm)
        if plain not in self.known:
            self.known[plain] = self.teams(2).run(train_mae_with_ddp, plain)[0]
        return self.known[plain]
