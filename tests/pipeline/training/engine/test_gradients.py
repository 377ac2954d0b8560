"""What gradients are summed in, copies made bucket by bucket, reductions beside the backward pass, and exact initial weights."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import Case, assembled, built_mae, held, mae_inputs, make_engine, of_rank, step_on, train_mae
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.training.engine.micro_batches import split

ZERO_STAGES = pytest.mark.parametrize("zero_stage", [1, 2, 3])
PRECISIONS = pytest.mark.parametrize(
    ("precision", "sums"), [("fp32", None), ("bf16", None), ("bf16", "fp32")], ids=["fp32", "bf16", "bf16-in-fp32"]
)
STEPS = 4


def same_bits(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Losses, norms, weights and moments of all ranks are equal."""
    for one, other in zip(results, others, strict=True):
        assert one["losses"] == other["losses"]
        assert one["norms"] == other["norms"]
        for (name, start, values), (_, other_start, other_values) in zip(one["held"], other["held"], strict=True):
            assert start == other_start, name
            assert torch.equal(values, other_values), name


# ---------------------------------------------------------------------------------------------------------------------
# Sums in float32


def gradients_of_a_step(case: Case) -> dict[str, Any]:
    """Return the gradients that the optimiser took: after its first step, Adam's first moment is a tenth of them."""
    built = built_mae()
    with closing(make_engine(case, built.module, built.groups)) as engine:
        _, norm = step_on(engine, mae_inputs(case.batch, 0), case.batch, 1e-3)
        return {"held": held(engine), "shapes": engine.shapes(), "norm": norm}


def summed_exactly(case: Case, workers: int) -> dict[str, torch.Tensor]:
    """Return the sum in float64 of the bf16 gradients of every micro-batch on every rank."""
    module, inputs = built_mae().module.bfloat16(), mae_inputs(case.batch, 0)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in module.named_parameters()}
    for rank in range(workers):
        mine = slice(rank * case.batch // workers, (rank + 1) * case.batch // workers)
        for part in zip(*(tensor[mine].split(case.micro_batch) for tensor in inputs), strict=True):
            module.zero_grad()
            (module(*part).sum() * (workers / case.batch)).backward()
            for name, parameter in module.named_parameters():
                sums[name] += parameter.grad.double() / workers
    return sums


def relative_error(case: Case, results: list[dict[str, Any]], exact: dict[str, torch.Tensor]) -> float:
    state = assembled(results)
    taken = torch.cat([state[f"exp_avg|{name}"].double() * 10 for name in exact])
    expected = torch.cat([value.flatten() for value in exact.values()])
    assert results[0]["norm"] == pytest.approx(float(taken.norm()), rel=1e-5)
    return float((taken - expected).norm() / expected.norm())


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@ZERO_STAGES
def test_sums_in_float32_round_nothing(teams, zero_stage, offload):
    """Gradients of 6 and 7 micro-batches on two ranks, of one sample each: against exact sums, and against those of fp32."""
    case = Case(zero_stage, micro_batch=1, precision="bf16", offload=offload)
    exact = teams(2).run(summed_exactly, case, 2)[0]  # by a process with as many threads, whose gradients round alike
    coarse = teams(2).run(gradients_of_a_step, case)
    fine = teams(2).run(gradients_of_a_step, replace(case, gradient_precision="fp32"))
    assert relative_error(case, fine, exact) < 1e-6  # 1e-7 seen
    assert relative_error(case, coarse, exact) > 1e-3
    in_float32 = assembled(teams(2).run(gradients_of_a_step, replace(case, precision="fp32")))
    gradients = {name: in_float32[f"exp_avg|{name}"].double() * 10 for name in exact}
    assert relative_error(case, fine, gradients) < relative_error(case, coarse, gradients)


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_sums_in_float32_agree_at_every_stage(teams, offload):
    """Losses, norms and states; stage 1 runs as stage 2."""
    first, second, third = (
        teams(2).run(
            train_mae, Case(stage, micro_batch=3, precision="bf16", gradient_precision="fp32", offload=offload), 0, 8
        )
        for stage in (1, 2, 3)
    )
    same_bits(first, second)
    assert first[0]["losses"] == pytest.approx(third[0]["losses"], rel=1e-6)
    assert first[0]["norms"] == pytest.approx(third[0]["norms"], rel=1e-6)
    state = assembled(first)
    for key, value in assembled(third).items():
        # AdamW's vectors begin elsewhere in the flat buffers and round the last bit otherwise
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, 3), (3, 2)])
def test_a_training_with_sums_in_float32_goes_on_from_its_state(teams, first, then):
    case = Case(first, micro_batch=3, precision="bf16", gradient_precision="fp32")
    straight = teams(2).run(train_mae, case, 0, 6)[0]
    before = teams(2).run(train_mae, case, 0, 3)
    after = teams(2).run(train_mae, replace(case, zero_stage=then), 3, 6, assembled(before))[0]
    assert before[0]["losses"] + after["losses"] == straight["losses"]


# ---------------------------------------------------------------------------------------------------------------------
# Reductions beside the backward pass, and copies bucket by bucket


def in_small_buckets(case: Case) -> dict[str, Any]:
    """Train with gradients reduced 500 numbers at a time; some parameters have more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.engine.settings.REDUCE_BUCKET_ELEMENTS", 500)
        return train_mae(case, 0, STEPS)


@pytest.mark.parametrize("micro_batch", [13, 3])
@PRECISIONS
@ZERO_STAGES
def test_overlap_changes_no_bit(teams, zero_stage, precision, sums, micro_batch):
    """Neither by the order of reductions nor by DeepSpeed's own copies, gradient by gradient, which `copy_by_bucket` replaces."""
    case = Case(zero_stage, micro_batch=micro_batch, precision=precision, gradient_precision=sums, max_grad_norm=0.3)
    plain = teams(2).run(in_small_buckets, case)
    same_bits(plain, teams(2).run(in_small_buckets, replace(case, overlap_comm=True)))


class Launches(TorchDispatchMode):
    """Counts copies and additions, the operations that DeepSpeed would make for every gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.partition("::")[2] in {"copy_", "add_", "_to_copy"}
        return func(*args, **(kwargs or {}))


def copies_of_a_step(case: Case) -> tuple[int, int]:
    """Return how many operations reduce a step's gradients and move the weights, and the number of parameters."""
    built = built_mae()
    with closing(make_engine(case, built.module, built.groups)) as engine:
        for step in range(3):
            step_on(engine, mae_inputs(case.batch, step), case.batch, 1e-3)
        micro_batches = split(of_rank(mae_inputs(case.batch, 3), engine.world), engine.settings, engine.world.device)
        with torch.no_grad(), Launches() as forward:
            engine.module(*micro_batches[0].inputs)
        with Launches() as whole:
            engine.train_step(micro_batches, global_batch=case.batch, lr=1e-3)
        return whole.count - forward.count, len(engine.shapes())


@PRECISIONS
@ZERO_STAGES
def test_gradients_are_not_copied_one_by_one(teams, zero_stage, precision, sums):
    count, parameters = teams(1).run(copies_of_a_step, Case(zero_stage, precision=precision, gradient_precision=sums))[
        0
    ]
    one_by_one = zero_stage == 3 and sums == "fp32"  # DeepSpeed converts each
    assert count < (1.5 if one_by_one else 0.5) * parameters


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights


def first_weights(case: Case) -> dict[str, Any]:
    """Return the float32 weights before the first step, and which of the module's first tensors outlive the engine's making."""
    built = built_mae()
    stores = {name: StorageWeakRef(p.untyped_storage()) for name, p in built.module.named_parameters()}
    with closing(make_engine(case, built.module, built.groups)) as engine:
        left = [name for name, store in stores.items() if not store.expired()]
        modules = {name: str(p.dtype) for name, p in engine.module.named_parameters()}
        return {"held": held(engine), "shapes": engine.shapes(), "left": left, "types": set(modules.values())}


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@ZERO_STAGES
def test_float32_weights_start_as_loaded_and_are_not_kept_twice(teams, zero_stage, precision, offload):
    results = teams(2).run(first_weights, Case(zero_stage, precision=precision, offload=offload))
    state = assembled(results)
    for name, parameter in built_mae().module.named_parameters():
        assert torch.equal(state[f"weight|{name}"], parameter.detach().flatten()), name
    for result in results:
        assert result["left"] == []
        assert result["types"] == {"torch.bfloat16" if precision == "bf16" else "torch.float32"}
