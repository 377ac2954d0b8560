"""The plain engine against torch alone: one process, the whole batch at once, BatchNorm1d, and LARS written out again."""

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_kit import of_rank
from torch import nn
from torch.nn import functional as F
from training_kit import SIDE, encoder_config

from mae_core.patches import normalise_pixels
from mae_core.vit import ViTEncoder, initialise
from pipeline.errors import ConfigError
from pipeline.training.engine.deepspeed_engine import initial_state
from pipeline.training.engine.micro_batches import split
from pipeline.training.engine.plain_engine import PlainEngine
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.spec.engines import engine_for
from pipeline.training.spec.probe_tasks import ProbeTask
from pipeline.training.world import enter_world

BATCH, CLASSES, STEPS, SEED = 13, 3, 20, 3
TRUST = 0.05  # 50 times the default, so that twenty steps suffice
READS = {"linear": "cls", "full": "patches", "efficient": "all"}
KINDS = pytest.mark.parametrize("kind", READS)


def task(kind: str, *rates: float) -> ProbeTask:
    return ProbeTask(
        kind=kind,
        encoder=encoder_config(),
        encoder_uri="",
        reads=READS[kind],
        num_classes=CLASSES,
        num_heads=2,
        num_queries=4,
        lr_scales=rates or (1.0,),
        weight_decay=0.01,
        momentum=0.9,
        trust_coefficient=TRUST,
        seed=SEED,
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same global batch on every rank; the class decides which colour is bright."""
    generator = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    images = torch.randint(0, 200, (BATCH, SIDE, SIDE, 3), generator=generator)
    return (images + 55 * F.one_hot(labels, CLASSES)[:, None, None]).byte(), labels


def rate(step: int) -> float:
    """Return a rate that rises from zero."""
    return 0.3 * min(1.0, step / 5)


def engine_of(built: ProbeTask, micro_batch: int, precision: str = "fp32") -> PlainEngine:
    world = enter_world()
    largest = -(-BATCH // world.size)
    micro_batch = min(micro_batch, largest)
    settings = EngineSettings(
        precision=precision,
        zero_stage=1,
        micro_batch=micro_batch,
        accumulation=-(-largest // micro_batch),
        betas=(0.9, 0.999),
    )
    engine = engine_for(built.build(), settings, world)
    assert isinstance(engine, PlainEngine)
    return engine


def step_on(engine: PlainEngine, step: int, *, dropped: bool = False) -> tuple[float, float]:
    """Take one step, or drop it; return the global mean loss and the gradient norm."""
    world = engine.world
    engine.accumulate(split(of_rank(batch(step), world), engine.settings, world.device), global_batch=BATCH)
    loss, squared = world.total(engine.measured())
    if dropped:
        engine.discard()
    else:
        engine.apply(rate(step), grad_norm=math.sqrt(squared))
    return loss / BATCH, math.sqrt(squared)


State = dict[tuple[str, str], torch.Tensor]


def train(
    of: ProbeTask, micro_batch: int, first: int = 0, last: int = STEPS, state: State | None = None, dropped: int = -1
) -> tuple[list[float], list[float], State]:
    """Train some steps from a state; return losses, norms, and this rank's state at the end."""
    with closing(engine_of(of, micro_batch)) as engine:
        if state:
            engine.load(
                lambda name, kind, start, count: state[name, kind][start : start + count], optimizer_steps=first
            )
        taken = [step_on(engine, step, dropped=step == dropped) for step in range(first, last)]
        assert engine.optimizer_steps == last - (dropped >= 0)
        held = {(one.parameter, one.kind): one.values.clone() for one in engine.fragments()}
        return [loss for loss, _ in taken], [norm for _, norm in taken], held


# ---------------------------------------------------------------------------------------------------------------------
# The reference


class Reference(nn.Module):
    """A probe in the plainest terms; its weights are copied from the head under test."""

    def __init__(self, kind: str, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.BatchNorm1d(16, affine=False, eps=1e-6)
        for name, value in weights.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            x = self.norm(x)
        elif self.kind == "full":
            x = self.norm(x.flatten(0, 1)).view_as(x)
            keys, values = x @ self.keys_weight.T, x @ self.values_weight.T
            pooled = [
                sum(
                    torch.einsum(
                        "bt,bte->be", (keys[..., head] @ query[head] / 8**0.5).softmax(dim=1), values[..., head]
                    )
                    for query in self.queries
                )
                / len(self.queries)
                for head in (slice(0, 8), slice(8, 16))
            ]
            x = torch.cat(pooled, dim=1)
        else:
            values = x @ self.values_weight.T
            shares = (x @ self.queries.T / 16**0.5).softmax(dim=1)
            pooled = [torch.einsum("bt,bte->be", shares[..., q], values[..., 4 * q : 4 * q + 4]) for q in range(4)]
            x = self.norm(torch.cat(pooled, dim=1))
        return x @ self.head_weight.T + self.head_bias


@dataclass
class PlainLars:
    """The official LARS, by hand."""

    model: nn.Module
    weight_decay: float

    def __post_init__(self) -> None:
        self.momenta = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

    def step(self, lr: float) -> None:
        for name, p in self.model.named_parameters():
            update = p.grad.clone()
            if p.dim() > 1:
                update += self.weight_decay * p.detach()
                norms = float(p.detach().norm()), float(update.norm())
                update *= TRUST * norms[0] / norms[1] if min(norms) > 0 else 1.0
            self.momenta[name] = 0.9 * self.momenta[name] + update
            p.data -= lr * self.momenta[name]


def features(kind: str, images: torch.Tensor) -> torch.Tensor:
    config = encoder_config()
    encoder = ViTEncoder(config)
    initialise(encoder, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        tokens = encoder(normalise_pixels(images, mean=config.pixel_mean, std=config.pixel_std))
    return {"cls": tokens[:, 0], "patches": tokens[:, 1:], "all": tokens}[READS[kind]]


def reference(kind: str, scale: float = 1.0) -> tuple[list[float], list[float], Reference]:
    """Return losses, gradient norms and the trained model."""
    head = task(kind).build().module.heads[0]
    model = Reference(kind, {name: p for name, p in head.named_parameters() if p.requires_grad})
    optimizer, losses, norms = PlainLars(model, 0.01), [], []
    for step in range(STEPS):
        images, labels = batch(step)
        model.zero_grad()
        loss = F.cross_entropy(model(features(kind, images)), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))
        optimizer.step(scale * rate(step))
    return losses, norms, model


# ---------------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 13), (1, 4), (2, 13), (2, 3)])
def test_twenty_steps_equal_plain_torch(teams, kind, workers, micro_batch):
    """13 samples are one micro-batch, 4 + 4 + 4 + 1, 6 and 7, or 3 + 3 and 3 + 3 + 1."""
    losses, norms, model = reference(kind)
    assert losses[-1] < 0.9 * losses[0]
    results = teams(workers).run(train, task(kind), micro_batch)
    for ours, our_norms, _ in results:
        assert ours == pytest.approx(losses, abs=1e-6)
        assert our_norms == pytest.approx(norms, rel=2e-5)
    assert all(not state for _, _, state in results[1:])  # rank 0 holds what a checkpoint needs
    state = results[0][2]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            state[f"heads.0.norm.{name}", "weight"], getattr(model.norm, name), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(
        state["heads.0.head.weight", "weight"], model.head_weight.detach().flatten(), rtol=0, atol=1e-5
    )
    assert {kind for _, kind in state} == {"weight", "exp_avg"}
    assert not any(name.startswith("encoder.") for name, _ in state)


@KINDS
def test_heads_of_several_rates_learn_as_they_would_alone(teams, kind):
    losses, _, state = teams(1).run(train, task(kind, 1.0, 0.25), 4)[0]
    alone = [teams(1).run(train, task(kind, scale), 4)[0] for scale in (1.0, 0.25)]
    assert losses == pytest.approx([(a + b) / 2 for a, b in zip(alone[0][0], alone[1][0], strict=True)], abs=1e-6)
    for number, (_, _, own) in enumerate(alone):
        for part in ("weight", "exp_avg"):
            assert torch.equal(state[f"heads.{number}.head.weight", part], own["heads.0.head.weight", part])


@KINDS
@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_training_is_equal_bit_by_bit(teams, kind, workers):
    straight = teams(workers).run(train, task(kind, 1.0, 0.5), 4)[0]
    first = teams(workers).run(train, task(kind, 1.0, 0.5), 4, 0, 11)[0]
    second = teams(workers).run(train, task(kind, 1.0, 0.5), 4, 11, STEPS, first[2])[0]
    assert [*first[0], *second[0]] == straight[0]
    assert all(torch.equal(value, straight[2][key]) for key, value in second[2].items())


@KINDS
def test_a_dropped_step_leaves_no_trace(teams, kind):
    """Weights, momentum and running statistics are those of the step before."""
    until = teams(1).run(train, task(kind), 4, 0, 7)[0][2]
    dropped = teams(1).run(train, task(kind), 4, 0, 8, None, 7)[0][2]
    assert all(torch.equal(value, until[key]) for key, value in dropped.items())


def taken_back(kind: str) -> bool:
    with closing(engine_of(task(kind), 4)) as engine:
        before = [one.values.clone() for one in engine.fragments()]
        for step in range(3):
            step_on(engine, step)
        moved = not any(torch.equal(a, b.values) for a, b in zip(before, engine.fragments(), strict=True))
        engine.load(initial_state(task(kind).build().module), optimizer_steps=0)
        engine.sync_module_weights()
        return moved and all(torch.equal(a, b.values) for a, b in zip(before, engine.fragments(), strict=True))


@KINDS
def test_a_rollback_to_the_start_brings_the_initial_weights_and_statistics_back(teams, kind):
    assert teams(1).run(taken_back, kind) == [True]


def losses_of(kind: str) -> tuple[list[float], float]:
    with closing(engine_of(task(kind), 4)) as engine:
        micro_batches = split(of_rank(batch(0), engine.world), engine.settings, engine.world.device)
        engine.accumulate(micro_batches, global_batch=BATCH)
        return engine.losses(micro_batches).tolist(), engine.measured()[0]


@KINDS
def test_losses_of_samples_add_up_to_the_loss_of_the_step(teams, kind):
    for found, local in teams(2).run(losses_of, kind):
        assert len(found) in (6, 7)
        assert sum(found) == pytest.approx(local, abs=1e-5)


def in_bf16(kind: str) -> dict[str, Any]:
    with closing(engine_of(task(kind), 4, "bf16")) as engine:
        losses = [step_on(engine, step)[0] for step in range(STEPS)]
        dtypes = {name.partition(".")[0]: p.dtype for name, p in engine.module.named_parameters()}
        return {"losses": losses, "dtypes": dtypes, "trains": engine.module.encoder.training}


@KINDS
def test_in_bf16_the_encoder_computes_and_the_heads_do_not(teams, kind):
    found = teams(1).run(in_bf16, kind)[0]
    assert found["dtypes"] == {"encoder": torch.bfloat16, "heads": torch.float32}
    assert not found["trains"]
    assert found["losses"] == pytest.approx(reference(kind)[0], abs=0.05)  # features are rounded to 8 bits
    assert found["losses"] != reference(kind)[0]


def not_finite(kind: str) -> bool:
    with closing(engine_of(task(kind), 13)) as engine:
        before = [f.values.clone() for f in engine.fragments()]
        engine.accumulate(
            split(of_rank(batch(0), engine.world), engine.settings, engine.world.device), global_batch=BATCH
        )
        engine.apply(1.0, grad_norm=math.inf)
        return all(torch.equal(a, b.values) for a, b in zip(before, engine.fragments(), strict=True))


def test_gradients_that_are_not_finite_are_dropped(teams):
    assert teams(1).run(not_finite, "linear") == [True]


def test_an_optimiser_with_other_state_is_refused():
    built = task("linear").build()
    with pytest.raises(ConfigError, match="square_avg"):
        PlainEngine(
            built.module,
            built.groups,
            torch.optim.RMSprop,
            EngineSettings(precision="fp32", zero_stage=1, micro_batch=1, accumulation=1, betas=(0.9, 0.9)),
            enter_world(),
        )
