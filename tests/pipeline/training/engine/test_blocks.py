"""Compiled blocks: how often they are compiled, that results stay, and what is said meanwhile.

All but one test compile with `aot_eager`: it traces, partitions and guards as `inductor` does, but runs torch's own operations in
place of generated code, so that nothing is built and results can be compared bit for bit."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import Case, assembled, built_mae, mae_inputs, make_engine, of_rank, step_on, train_mae
from training_kit import encoder_config

from pipeline.cluster.resources import Resources
from pipeline.training.engine import blocks
from pipeline.training.engine.micro_batches import split
from pipeline.training.spec.tasks import Built, ClassificationTask

STEPS = 6
COMPILED = Case(compile="on")


@contextmanager
def backend(name: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BACKEND", name)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# How often


def built_classifier() -> Built:
    return ClassificationTask(
        encoder=encoder_config(),
        encoder_uri="",
        num_classes=3,
        weight_decay=0.0,
        layer_decay=0.75,
        drop_path=0.5,
        label_smoothing=0.1,
        seed=0,
    ).build()


def classifier_inputs(batch: int, step: int) -> tuple[torch.Tensor, ...]:
    images, _ = mae_inputs(batch, step)
    noise = torch.rand(batch, encoder_config().depth, 2, generator=torch.Generator().manual_seed(step))
    return images, torch.arange(batch) % 3, noise


def compilations(case: Case, task: str) -> dict[str, Any]:
    """Take steps of full micro-batches and a short one, and score; return how many graphs were compiled, and by which step."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    counter = CompileCounterWithBackend("aot_eager")
    built, inputs = (built_mae(), mae_inputs) if task == "mae" else (built_classifier(), classifier_inputs)
    counters.clear()
    with backend(counter), closing(make_engine(case, built.module, built.groups)) as engine:
        after = []
        for step in range(STEPS):
            step_on(engine, inputs(case.batch, step), case.batch, 1e-3)
            after.append(counter.frame_count)
        engine.losses(split(of_rank(inputs(case.batch, 0), engine.world), engine.settings, engine.world.device))
        if task != "mae":
            with torch.inference_mode():
                engine.module.eval()(inputs(9, 0)[0])
        return {
            "after": after,
            "scored": counter.frame_count,
            "breaks": sum(counters["graph_break"].values()),
            "names": list(engine.shapes()),
        }


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("task", "kinds"), [("mae", 2), ("classifier", 1)])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_blocks_of_one_kind_compile_once_per_size_of_a_micro_batch(teams, zero_stage, task, kinds, recomputed):
    """Parts of 6 and 7 in micro-batches of 4 make two sizes, 4 and 2 or 3, and the encoder's blocks and the decoder's two kinds.

    All come in the first step; nothing compiles later, in recomputation or in evaluation.
    """
    case = replace(COMPILED, zero_stage=zero_stage, micro_batch=4, activation_checkpointing=recomputed)
    for result in teams(2).run(compilations, case, task):
        assert result["after"] == [2 * kinds] * STEPS
        assert result["scored"] == 2 * kinds
        assert result["breaks"] == 0
        # Checkpoints are written under these names.
        expected = built_mae() if task == "mae" else built_classifier()
        assert result["names"] == [name for name, _ in expected.module.named_parameters()]


def trained_one_after_another(case: Case) -> list[int]:
    """Return how many graphs each of several trainings compiles in one process: together more than dynamo allows a function."""
    from torch._dynamo.testing import CompileCounterWithBackend

    found = []
    for micro_batch in (3, 4, 5, 6, 7):
        counter = CompileCounterWithBackend("aot_eager")
        with backend(counter):
            train_mae(replace(case, micro_batch=micro_batch), 0, 1)
        found.append(counter.frame_count)
    return found


def test_every_training_of_a_process_compiles(teams):
    # 13 samples: 3 + 3 + 3 + 3 + 1, 4 + 4 + 4 + 1, 5 + 5 + 3, 6 + 6 + 1, 7 + 6
    assert teams(1).run(trained_one_after_another, COMPILED)[0] == [4, 4, 4, 4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Results


def trained(case: Case, name: str, *rest: Any) -> dict[str, Any]:
    with backend(name):
        return train_mae(case, *rest)


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_tracing_partitioning_and_guards_change_no_bit(teams, zero_stage, precision):
    """Of losses, norms, weights or moments, with recomputation too: what is left to differ is the generated code."""
    plain = Case(zero_stage, micro_batch=4, precision=precision)
    expected = teams(2).run(trained, plain, "aot_eager", 0, STEPS)
    for recomputed in (False, True):
        case = replace(plain, compile="on", activation_checkpointing=recomputed)
        for result, other in zip(teams(2).run(trained, case, "aot_eager", 0, STEPS), expected, strict=True):
            assert result["losses"] == other["losses"]
            assert result["norms"] == other["norms"]
            for (name, start, values), (other_name, other_start, others) in zip(
                result["held"], other["held"], strict=True
            ):
                assert (name, start) == (other_name, other_start)
                assert torch.equal(values, others), name


def test_training_goes_on_compiled_on_other_workers_within_1e_6(teams):
    """Generated code: three steps as they are on 2 workers at ZeRO-1, then compiled on 1 worker at ZeRO-3, as after a resume."""
    plain = Case(micro_batch=4)
    straight = teams(2).run(train_mae, plain, 0, STEPS)[0]
    first = teams(2).run(train_mae, plain, 0, 3)
    rest = teams(1).run(trained, Case(3, compile="on"), "inductor", 3, STEPS, assembled(first))[0]
    # fused operations sum in another order
    assert first[0]["losses"] + rest["losses"] == pytest.approx(straight["losses"], rel=1e-6)
    assert first[0]["norms"] + rest["norms"] == pytest.approx(straight["norms"], rel=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is said, and when blocks are compiled


def phases_and_lines(case: Case) -> tuple[list[str], list[str]]:
    """Return the phases of two steps, and the log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pipeline.training.engine.deepspeed_engine")
    logger.addHandler(handler)
    built, phases = built_mae(), []

    def phase(name: str) -> Any:
        phases.append(name)
        return nullcontext()

    with backend("aot_eager"), closing(make_engine(case, built.module, built.groups)) as engine:
        engine.phase = phase
        for step in range(2):
            step_on(engine, mae_inputs(case.batch, step), case.batch, 1e-3)
    logger.removeHandler(handler)
    return phases, lines


def test_passes_that_compile_have_a_phase_and_a_line_of_their_own(teams):
    (phases, lines), (_, other_lines) = teams(2).run(phases_and_lines, replace(COMPILED, micro_batch=3))
    # the first rank's 6 samples: 3 + 3 + 1 of padding
    compiles, runs = ["compile", "compile"], ["forward", "backward"]
    assert phases == compiles + runs + compiles + 3 * runs
    assert lines == [
        f"compiling the blocks for micro-batches of {samples} samples: this step takes longer" for samples in (3, 1)
    ]
    assert other_lines == []  # every rank compiles, one says so


def test_auto_compiles_where_a_gpu_can_build_kernels(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(blocks, "has_triton", lambda: True)
    monkeypatch.setattr(blocks.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(blocks.Path, "exists", lambda path: path.name == "Python.h")
    monkeypatch.delenv("CC", raising=False)
    assert blocks.why_not_compiled("auto", cuda) is None
    assert "CPU" in str(blocks.why_not_compiled("auto", cpu))
    assert blocks.why_not_compiled("on", cpu) is None
    assert "off" in str(blocks.why_not_compiled("off", cuda))
    monkeypatch.setattr(blocks.Path, "exists", lambda path: False)
    assert "Python.h is missing" in str(blocks.why_not_compiled("auto", cuda))
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    assert "no C compiler" in str(blocks.why_not_compiled("auto", cuda))
    monkeypatch.setattr(blocks, "has_triton", lambda: False)
    assert "Triton" in str(blocks.why_not_compiled("auto", cuda))
    assert blocks.why_not_compiled("on", cuda) is None  # and fails where that is impossible


@pytest.mark.parametrize(("written", "read"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_yaml_reads_a_bare_on_and_off_as_booleans(written, read):
    assert Resources.model_validate({"compile": written}).compile == read


# ---------------------------------------------------------------------------------------------------------------------
# ZeRO-3: a block's weights come and go together


def gathered(case: Case, leaves: bool) -> dict[str, Any]:
    """Return a step's gathers, and which gathered matrices a forward pass keeps, with no weight held for reuse."""
    import deepspeed
    from deepspeed import comm

    calls = 0
    plain = comm.allgather_fn

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*arguments, **options)

    built, kept = built_mae(), []
    with pytest.MonkeyPatch.context() as patch, backend("aot_eager_decomp_partition"):  # the partitioner of inductor
        patch.setattr("pipeline.training.engine.settings.LIVE_ELEMENTS", 1)
        patch.setattr("pipeline.training.engine.settings.PREFETCH_ELEMENTS", 0)
        patch.setattr(comm, "allgather_fn", counted)
        if not leaves:
            patch.setattr(deepspeed.utils, "set_z3_leaf_modules", lambda *_, **options: None)
        with closing(make_engine(case, built.module, built.groups)) as engine:
            for step in range(3):
                calls = 0
                step_on(engine, mae_inputs(case.batch, step), case.batch, 1e-3)
            gathers = calls

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                # A parameter gives its storage up when DeepSpeed releases it; a view of one would keep it.
                present = {
                    p.data_ptr(): name for name, p in engine.module.named_parameters() if p.dim() > 1 and p.numel()
                }
                if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() in present:
                    kept.append(present[tensor.data_ptr()])
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                engine.module(*of_rank(mae_inputs(case.batch, 3), engine.world)).sum()
            return {"gathers": gathers, "kept": kept}


def test_zero_3_gathers_a_block_at_once_and_lets_it_go(teams):
    by_layer = teams(2).run(gathered, Case(3), False)[0]
    by_block = teams(2).run(gathered, Case(3), True)[0]
    compiled = teams(2).run(gathered, replace(COMPILED, zero_stage=3), True)[0]
    assert by_block["gathers"] < by_layer["gathers"]
    assert compiled["gathers"] == by_block["gathers"]
    assert compiled["kept"] == by_block["kept"] == []
