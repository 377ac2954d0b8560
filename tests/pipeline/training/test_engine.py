"""The engine against plain AdamW on the whole batch in one process, at every ZeRO stage, world size and accumulation."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from training_kit import SIDE, encoder_config, mae_config

from mae_core.optim import layer_index, parameter_groups
from pipeline.data.randomness import mask_noise
from pipeline.errors import ConfigError
from pipeline.training import engine as engine_module
from pipeline.training.engine import KINDS, Engine
from pipeline.training.engine_settings import EngineSettings
from pipeline.training.slices import split
from pipeline.training.tasks import ClassificationTask, MAETask
from pipeline.training.world import enter_world

STEPS = 5
PEAK_LR = 0.01
BETAS = (0.9, 0.95)


class Perceptron(nn.Module):
    """Sizes that nothing divides; forward gives per-sample losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(5, 37), nn.GELU(), nn.LayerNorm(37), nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 3)
        )

    def forward(self, x, y):
        return (self.layers(x).float() - y).square().mean(dim=1)


@dataclass(frozen=True)
class Case:
    zero_stage: int
    batch: int = 13
    micro_batch: int = 13
    precision: str = "fp32"


def samples(batch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same global batch on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(batch, 5, generator=generator)
    return x, x[:, :3].square()


def rate(step: int) -> float:
    return PEAK_LR * (step + 1) / STEPS


def reference(batch: int) -> dict[str, Any]:
    """AdamW of torch on the whole batch."""
    module = Perceptron()
    groups = parameter_groups(module, weight_decay=0.3)
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups], betas=BETAS, eps=1e-8
    )
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        loss = module(*samples(batch, step)).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))
        optimizer.step()
        losses.append(float(loss.detach()))
    state = {}
    for name, parameter in module.named_parameters():
        of = optimizer.state[parameter]
        for kind, value in (("weight", parameter), ("exp_avg", of["exp_avg"]), ("exp_avg_sq", of["exp_avg_sq"])):
            state[f"{kind}|{name}"] = value.detach().reshape(-1)
    return {"losses": losses, "norms": norms, "state": state}


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
    )
    return Engine(module, groups, settings, world)


def step_on(engine: Engine, inputs: tuple[torch.Tensor, ...], batch: int, lr: float) -> tuple[float, float]:
    """One step on this rank's slice; (global mean loss, gradient norm)."""
    world = engine.world
    mine = slice(world.rank * batch // world.size, (world.rank + 1) * batch // world.size)
    micro_batches = split(tuple(tensor[mine] for tensor in inputs), engine.settings, world.device)
    local_sum, norm = engine.train_step(micro_batches, global_batch=batch, lr=lr)
    return world.total([local_sum])[0] / batch, norm


def held(engine: Engine) -> list[tuple[str, int, torch.Tensor]]:
    return [(f"{f.kind}|{f.parameter}", f.start, f.values.clone()) for f in engine.fragments()]


def train_perceptron(case: Case) -> dict[str, Any]:
    module = Perceptron()
    engine = make_engine(case, module, parameter_groups(module, weight_decay=0.3))
    steps = [step_on(engine, samples(case.batch, step), case.batch, rate(step)) for step in range(STEPS)]
    return {
        "losses": [loss for loss, _ in steps],
        "norms": [norm for _, norm in steps],
        "held": held(engine),
        "shapes": engine.shapes(),
        "optimizer_steps": engine.optimizer_steps,
    }


def assembled(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """All ranks' fragments as whole parameters; every value exactly once."""
    numel = {name: int(torch.Size(shape).numel()) for name, shape in results[0]["shapes"].items()}
    state = {f"{kind}|{name}": torch.full((numel[name],), torch.nan) for name in numel for kind in KINDS}
    times = {key: torch.zeros(len(value), dtype=torch.int64) for key, value in state.items()}
    for result in results:
        for key, start, values in result["held"]:
            assert values.dtype == torch.float32
            state[key][start : start + len(values)] = values
            times[key][start : start + len(values)] += 1
    for key, count in times.items():
        assert count.eq(1).all(), f"{key}: values are held {count.unique().tolist()} times"
    return state


@pytest.fixture(scope="module")
def references():
    return {batch: reference(batch) for batch in (12, 13, 7, 2)}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("workers", "batch", "micro_batch"),
    [(1, 13, 13), (1, 13, 5), (2, 12, 6), (2, 13, 7), (2, 7, 2), (3, 13, 5), (3, 13, 2), (3, 2, 1)],
    ids=str,
)
def test_steps_equal_plain_adamw_on_the_whole_batch(teams, references, zero_stage, workers, batch, micro_batch):
    # Uneven slices (13 = 6 + 7 = 4 + 4 + 5), accumulation 1 to 3 with padding, a rank without samples (B = 2). Sums in another
    # order: worst seen over all cases 1.2e-7 relative in losses, 2e-7 in norms, 6e-8 absolute in weights and moments. A
    # forgotten W / B shows as a factor.
    results = teams(workers).run(train_perceptron, Case(zero_stage, batch, micro_batch))
    expected = references[batch]
    state = assembled(results)
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=2e-6)
        assert result["norms"] == pytest.approx(expected["norms"], rel=2e-6)
        assert result["optimizer_steps"] == STEPS
    assert state.keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Precision


def mae_losses(case: Case) -> tuple[list[float], str]:
    """Losses of a few steps, and the type of the per-sample losses."""
    built = MAETask(model=mae_config(), weight_decay=0.05, seed=0).build()
    engine = make_engine(case, built.module, built.groups)
    images = torch.randint(0, 256, (case.batch, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1)).byte()
    ids = list(range(case.batch))
    noise = torch.as_tensor(mask_noise(0, [0] * case.batch, ids, mae_config().encoder.num_patches))
    losses = [step_on(engine, (images, noise), case.batch, 1e-3)[0] for _ in range(3)]
    return losses, str(engine.module(images[:2], noise[:2]).dtype)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_computes_the_loss_in_float32_and_close_to_fp32(teams, zero_stage):
    exact, _ = teams(2).run(mae_losses, Case(zero_stage))[0]
    coarse, kind = teams(2).run(mae_losses, Case(zero_stage, precision="bf16"))[0]
    assert kind == "torch.float32"
    assert coarse != exact  # it did compute in bf16
    assert coarse == pytest.approx(exact, rel=1e-2)  # 2.5e-3 seen; 8 bits of mantissa resolve 4e-3


# ---------------------------------------------------------------------------------------------------------------------
# Layer-wise decay


DECAY, LR = 0.75, 0.01


def decayed_step(case: Case) -> dict[str, Any]:
    """One step of fine-tuning without weight decay: each parameter's largest move, and the live rates."""
    config = encoder_config()
    task = ClassificationTask(
        encoder=config,
        encoder_uri="",
        num_classes=3,
        weight_decay=0.0,
        layer_decay=DECAY,
        drop_path=0.0,
        label_smoothing=0.1,
        seed=0,
    )
    built = task.build()
    names = [group["names"] for group in built.groups]
    engine = make_engine(case, built.module, built.groups)
    before = held(engine)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (case.batch, SIDE, SIDE, 3), generator=generator).byte()
    inputs = (images, torch.arange(case.batch) % 3, torch.rand(case.batch, config.depth, 2, generator=generator))
    step_on(engine, inputs, case.batch, LR)
    after = {(key, start): values for key, start, values in held(engine)}
    moves: dict[str, float] = {}
    for key, start, values in before:
        kind, name = key.split("|")
        if kind == "weight":
            name = name.removeprefix("model.")
            moves[name] = max(moves.get(name, 0.0), float((after[key, start] - values).abs().max()))
    return {"rates": engine.learning_rates, "groups": names, "moves": moves}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_layer_wise_decay_reaches_the_live_optimiser(teams, zero_stage):
    """Adam's first step moves a weight by its learning rate, whatever the gradient: the moves prove which rate was used."""
    depth = encoder_config().depth
    results = teams(2).run(decayed_step, Case(zero_stage))
    rates = dict(zip((names[0] for names in results[0]["groups"]), results[0]["rates"], strict=True))
    by_layer = {layer_index(name, depth=depth): value for name, value in rates.items()}
    assert by_layer[0] / by_layer[depth + 1] == pytest.approx(DECAY ** (depth + 1), rel=1e-12)
    assert by_layer[depth + 1] == LR
    moves: dict[str, float] = {}
    for name, move in (item for result in results for item in result["moves"].items()):
        moves[name] = max(moves.get(name, 0.0), move)
    assert len(moves) > 20
    for name, move in moves.items():
        expected = LR * DECAY ** (depth + 1 - layer_index(name, depth=depth))
        # a gradient of 1e-6 at least: Adam's eps of 1e-8 takes 1 % at most, and the layers lie 25 % apart
        assert move == pytest.approx(expected, rel=1e-2), name


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def tampered(change: dict[str, Any]) -> str:
    """The engine's answer when DeepSpeed is told something else than was asked for."""
    honest = engine_module.deepspeed_config
    engine_module.deepspeed_config = lambda settings: copy.deepcopy(honest(settings)) | change
    try:
        module = Perceptron()
        make_engine(Case(1), module, parameter_groups(module, weight_decay=0.0))
    except ConfigError as error:
        return str(error)
    finally:
        engine_module.deepspeed_config = honest
    return ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0, 0.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, 1"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True, False"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2, 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_deepspeed_does_not_follow_are_refused(teams, change, named):
    assert named in teams(1).run(tampered, change)[0]


def test_untampered_settings_are_not_refused(teams):
    assert teams(1).run(tampered, {})[0] == ""


def wrong_number_of_micro_batches(_: None) -> str:
    module = Perceptron()
    engine = make_engine(Case(1, micro_batch=5), module, parameter_groups(module, weight_decay=0.0))
    with pytest.raises(ConfigError) as refused:
        engine.train_step([], global_batch=13, lr=0.1)
    return str(refused.value)


def test_micro_batches_must_be_as_many_as_agreed(teams):
    assert "0 micro-batches given, the engine accumulates 3" in teams(1).run(wrong_number_of_micro_batches, None)[0]
