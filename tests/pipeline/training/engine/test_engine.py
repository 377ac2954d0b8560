"""The engine against plain AdamW on the whole batch in one process, at every ZeRO stage, world size and accumulation."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import (
    BETAS,
    Case,
    References,
    assembled,
    built_mae,
    held,
    mae_inputs,
    make_engine,
    of_rank,
    step_on,
    train_mae,
)
from torch import nn
from training_kit import SIDE, Team, encoder_config

from mae_core.optimisation.parameter_groups import layer_index, parameter_groups
from mae_core.vit import Block
from pipeline.errors import ConfigError
from pipeline.training.engine import deepspeed_engine as engine_module
from pipeline.training.engine.micro_batches import split
from pipeline.training.spec.tasks import Built, ClassificationTask

STEPS = 5
PEAK_LR = 0.01
ZERO_STAGES = pytest.mark.parametrize("zero_stage", [1, 2, 3])


class Perceptron(nn.Module):
    """Layers of sizes that nothing divides; forward returns per-sample losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(5, 37), nn.GELU(), nn.LayerNorm(37), nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 3)
        )

    def forward(self, x, y):
        return (self.layers(x).float() - y).square().mean(dim=1)


def samples(batch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same global batch on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(batch, 5, generator=generator)
    return x, x[:, :3].square()


def rate(step: int) -> float:
    return PEAK_LR * (step + 1) / STEPS


def reference(batch: int) -> dict[str, Any]:
    """torch's AdamW on the whole batch."""
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


@pytest.fixture(scope="module")
def references():
    return {batch: reference(batch) for batch in (12, 13, 7, 2)}


@ZERO_STAGES
@pytest.mark.parametrize(
    ("workers", "batch", "micro_batch"),
    [(1, 13, 13), (1, 13, 5), (2, 12, 6), (2, 13, 7), (2, 7, 2), (3, 13, 5), (3, 13, 2), (3, 2, 1)],
    ids=str,
)
def test_steps_equal_plain_adamw_on_the_whole_batch(teams, references, zero_stage, workers, batch, micro_batch):
    # Uneven parts (13 = 6 + 7 = 4 + 4 + 5), accumulation 1 to 3 with padding, a rank without samples (B = 2). Sums in another
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


def loss_type(case: Case) -> str:
    """Return the type of the per-sample losses."""
    built = built_mae()
    engine = make_engine(case, built.module, built.groups)
    return str(engine.module(*mae_inputs(2, 0)).dtype)


@ZERO_STAGES
def test_bf16_computes_the_loss_in_float32_and_close_to_fp32(teams, zero_stage):
    case = Case(zero_stage)
    exact = teams(2).run(train_mae, case, 0, 3)[0]["losses"]
    coarse = teams(2).run(train_mae, replace(case, precision="bf16"), 0, 3)[0]["losses"]
    assert teams(2).run(loss_type, replace(case, precision="bf16"))[0] == "torch.float32"
    assert coarse != exact  # it did compute in bf16
    assert coarse == pytest.approx(exact, rel=1e-2)  # 2.5e-3 seen; 8 bits of mantissa resolve 4e-3


# ---------------------------------------------------------------------------------------------------------------------
# Plain torch DDP. All stages, accumulations, world sizes and ways to run: tests/system/test_engine_matrix.py


@pytest.fixture(scope="module")
def ddp(teams):
    return References(teams, {})


@pytest.mark.parametrize(
    "case",
    [
        Case(1, micro_batch=4, max_grad_norm=0.3),
        Case(2, micro_batch=2, offload="optimizer", max_grad_norm=0.3),
        Case(3, activation_checkpointing=True, offload="optimizer", max_grad_norm=0.3),
    ],
    ids=lambda case: f"zero{case.zero_stage}",
)
def test_twenty_steps_of_an_autoencoder_equal_plain_ddp(teams, ddp, case):
    result, expected = teams(2).run(train_mae, case)[0], ddp(case)
    assert min(expected["norms"]) < case.max_grad_norm < max(expected["norms"])  # some steps are clipped, some not
    assert expected["losses"][-1] != pytest.approx(ddp(replace(case, max_grad_norm=None))["losses"][-1], rel=1e-4)
    # sums in another order: 1e-7 and 2e-7 seen
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], rel=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Recomputed blocks


def built_classifier(*, layer_decay: float = 0.75, drop_path: float = 0.5) -> Built:
    """Fine-tuning without weight decay."""
    return ClassificationTask(
        encoder=encoder_config(),
        encoder_uri="",
        num_classes=3,
        weight_decay=0.0,
        layer_decay=layer_decay,
        drop_path=drop_path,
        label_smoothing=0.1,
        seed=0,
    ).build()


def classifier_inputs(batch: int) -> tuple[torch.Tensor, ...]:
    """Images, labels and drop path noise."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), generator=generator).byte()
    noise = torch.rand(batch, encoder_config().depth, 2, generator=generator)
    return images, torch.arange(batch) % 3, noise


def finetune(case: Case) -> dict[str, Any]:
    """Train three steps with drop path, then score whole images; return how often blocks were computed, too."""
    built = built_classifier()
    blocks = [part.attn for part in built.module.modules() if isinstance(part, Block)]
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    for block in blocks:
        block.register_forward_pre_hook(count)
    inputs = classifier_inputs(case.batch)
    with closing(make_engine(case, built.module, built.groups)) as engine:
        steps = [step_on(engine, inputs, case.batch, 0.01) for _ in range(3)]
        trained = runs / (3 * len(blocks))
        engine.module.eval()
        with torch.inference_mode():
            scores = engine.module(inputs[0]).tolist()
        return {"steps": steps, "scores": scores, "held": held(engine), "trained": trained}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@ZERO_STAGES
def test_recomputed_blocks_change_no_bit(teams, zero_stage, precision):
    """In losses, norms, weights and moments (the first moment is the gradient), with drop path; evaluation still works."""
    case = Case(zero_stage, precision=precision)
    kept = teams(2).run(finetune, case)
    again = teams(2).run(finetune, replace(case, activation_checkpointing=True))
    for one, other in zip(kept, again, strict=True):
        assert (one["trained"], other["trained"]) == (1, 2)
        assert one["steps"] == other["steps"]
        assert one["scores"] == other["scores"]
        assert len(one["held"]) == len(other["held"])
        for (name, start, values), (other_name, other_start, others) in zip(one["held"], other["held"], strict=True):
            assert (name, start) == (other_name, other_start)
            assert torch.equal(values, others), name


# ---------------------------------------------------------------------------------------------------------------------
# Layer-wise decay


DECAY, LR = 0.75, 0.01


def decayed_step(case: Case) -> dict[str, Any]:
    """Take one step of fine-tuning; return each parameter's largest move, and the live rates after it."""
    built = built_classifier(layer_decay=DECAY, drop_path=0.0)
    names = [group["names"] for group in built.groups]
    engine = make_engine(case, built.module, built.groups)
    before = held(engine)
    step_on(engine, classifier_inputs(case.batch), case.batch, LR)
    after = {(key, start): values for key, start, values in held(engine)}
    moves: dict[str, float] = {}
    for key, start, values in before:
        kind, name = key.split("|")
        if kind == "weight":
            name = name.removeprefix("model.")
            moves[name] = max(moves.get(name, 0.0), float((after[key, start] - values).abs().max()))
    return {"rates": engine.learning_rates, "groups": names, "moves": moves}


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@ZERO_STAGES
def test_layer_wise_decay_reaches_the_live_optimiser(teams, zero_stage, offload):
    """Adam's first step moves a weight by its learning rate, whatever the gradient: the moves prove which rate was used."""
    depth = encoder_config().depth
    results = teams(2).run(decayed_step, Case(zero_stage, offload=offload))
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


def test_training_compiles_nothing(tmp_path, monkeypatch):
    """In a process of its own: DeepSpeed compiles what it wants once per process, and uses what was built before."""
    built = tmp_path / "built"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(built))
    with closing(Team(1, tmp_path)) as team:
        for case in (Case(1), Case(2, offload="optimizer"), Case(3, offload="optimizer")):
            team.run(train_perceptron, case)
    assert not built.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Traps of ZeRO: many groups fragment the reductions, small buckets move bf16 losses, frozen tables are lost


def collectives_of_a_step(case: Case, layer_decay: float | None) -> tuple[int, dict[str, int]]:
    """Return the number of parameter groups, and how often each collective reduces gradients in a step."""
    from deepspeed import comm

    built = built_classifier()
    depth = encoder_config().depth if layer_decay else None
    groups = parameter_groups(built.module.model, weight_decay=0.05, layer_decay=layer_decay, depth=depth)
    counts: dict[str, int] = {}

    def counting(name: str) -> Any:
        plain = getattr(comm, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return plain(*arguments, **options)

        return counted

    with closing(make_engine(case, built.module, groups)) as engine, pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_fn"):
            patch.setattr(comm, name, counting(name))
        micro_batches = split(
            of_rank(classifier_inputs(case.batch), engine.world), engine.settings, engine.world.device
        )
        engine.accumulate(micro_batches, global_batch=case.batch)
    return len(groups), counts


@ZERO_STAGES
def test_a_group_per_layer_costs_no_extra_reduction(teams, zero_stage):
    few, at_once = teams(2).run(collectives_of_a_step, Case(zero_stage), None)[0]
    many, layered = teams(2).run(collectives_of_a_step, Case(zero_stage), DECAY)[0]
    assert (few, many) == (2, 2 * (encoder_config().depth + 2))
    assert layered == at_once
    assert sum(at_once.values()) == 1


def in_small_buckets(case: Case) -> dict[str, Any]:
    """Train with gradients reduced 500 numbers at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.engine.settings.REDUCE_BUCKET_ELEMENTS", 500)
        return train_mae(case)


def test_the_size_of_buckets_changes_no_loss_in_bf16(teams):
    case = Case(2, precision="bf16", micro_batch=4)
    assert teams(2).run(in_small_buckets, case)[0]["losses"] == teams(2).run(train_mae, case)[0]["losses"]


def test_no_parameter_is_frozen():
    """DeepSpeed's own checkpoints lose frozen parameters, so position tables are buffers."""
    for built in (built_mae(), built_classifier()):
        assert all(parameter.requires_grad for parameter in built.module.parameters())
        grouped = [parameter for group in built.groups for parameter in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in built.module.parameters()}
        assert not list(built.module.state_dict().keys() & dict(built.module.named_buffers()).keys())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def tampered(change: dict[str, Any]) -> str:
    """Return the engine's error when DeepSpeed gets other settings than were asked for."""
    honest = engine_module.deepspeed_config

    def tampered_config(settings: Any, **options: Any) -> dict[str, Any]:
        config = honest(settings, **options)
        zero = config["zero_optimization"] | change.get("zero_optimization", {})
        return config | change | {"zero_optimization": zero}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "deepspeed_config", tampered_config)
        module = Perceptron()
        try:
            make_engine(Case(), module, parameter_groups(module, weight_decay=0.0))
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0, 0.0"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, 1"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True, False"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2, 1"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype = torch.bfloat16, torch.float32"),
        ({"communication_data_type": "bf16"}, "communication_data_type = torch.bfloat16, torch.float32"),
        ({"prescale_gradients": True}, "prescale_gradients = True, False"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor = 2.0, 1.0"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow = False, True"),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization.overlap_comm = True, False"),
        ({"zero_optimization": {"contiguous_gradients": True}}, "zero_optimization.contiguous_gradients = True, False"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients = True, False"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer = True, False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
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
