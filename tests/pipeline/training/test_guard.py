"""The guard: what it decides, that a bad step changes no bit anywhere, and real trainings that skip, roll back and give up."""

import json
import math
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import pytest
import torch
from guard_kit import TOTAL_STEPS, SpoiltTask, run, spoilt_spec, train_here
from training_kit import SIDE, StopAfter, attempt_at, checkpoint_state, computed_by_step, digest_of, mae_config

from mae_core.randomness import mask_noise
from pipeline.data.dataset.address import dataset_address
from pipeline.errors import ConfigError
from pipeline.graph.step import Attempt
from pipeline.training.checkpoints.audit import audit
from pipeline.training.checkpoints.format import read_manifest
from pipeline.training.engine.deepspeed_engine import Engine
from pipeline.training.engine.micro_batches import split
from pipeline.training.engine.settings import EngineSettings
from pipeline.training.guard import FRESH, GuardConfig, GuardState, StepStats, judge, merge_range, state_after_rollback
from pipeline.training.world import enter_world

NAN, INF = math.nan, math.inf

# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def follow(config: GuardConfig, losses: list[float], total_steps: int = 1000) -> tuple[list[str], GuardState]:
    """Return the verdicts on steps with these losses; a rollback continues after the range that it skips."""
    state, verdicts = FRESH, []
    for step, loss in enumerate(losses):
        judgement = judge(config, state, StepStats(step, loss, 1.0), total_steps)
        verdicts.append(judgement.verdict)
        state = judgement.state_after
        if judgement.verdict == "give_up":
            break
    return verdicts, state


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF), (-INF, 1.0)])
def test_a_step_that_is_not_finite_is_skipped_from_the_first_on(loss, norm):
    judgement = judge(GuardConfig(), FRESH, StepStats(0, loss, norm), 1000)
    assert (judgement.verdict, judgement.state_after.skipped, judgement.state_after.recent) == ("skip", (0,), ())
    assert ("loss not finite" if norm == 1.0 else "gradient norm not finite") in judgement.reason


def test_isolated_skips_are_accepted_and_skips_in_a_row_roll_back():
    verdicts, state = follow(GuardConfig(), [1, NAN, 1, NAN, NAN, 1, NAN, NAN, NAN])
    assert verdicts == ["go", "skip", "go", "skip", "skip", "go", "skip", "skip", "roll_back"]
    assert state == GuardState(stepped_over=((0, 9),), roll_backs=1)
    verdicts, state = follow(GuardConfig(roll_back_steps=2), [1, NAN, *[1] * 20, NAN, NAN, NAN])
    assert state == GuardState(skipped=(1,), stepped_over=((20, 25),), roll_backs=1)


def test_a_rollback_soon_after_another_goes_back_further():
    config = GuardConfig(roll_back_steps=10, skips_in_a_row=1)
    first = judge(config, FRESH, StepStats(100, NAN, 1.0), 1000)
    assert first.undone == (90, 101)
    there = state_after_rollback(FRESH, GuardState(recent=((1.0, 1.0),)), first.undone)
    assert there == GuardState(recent=((1.0, 1.0),), stepped_over=((90, 101),), roll_backs=1)
    second = judge(config, there, StepStats(105, NAN, 1.0), 1000)  # 95 lies in the skipped range
    assert second.undone == (80, 106)
    assert state_after_rollback(there, FRESH, second.undone) == GuardState(stepped_over=((80, 106),), roll_backs=2)


def test_roll_backs_and_lost_steps_have_a_limit():
    config = GuardConfig(roll_back_steps=0, skips_in_a_row=2, roll_backs=2)
    verdicts, _ = follow(config, [1, *[NAN] * 6])
    assert verdicts == ["go", "skip", "roll_back", "skip", "roll_back", "skip", "give_up"]
    verdicts, _ = follow(GuardConfig(lost_share=0.05), [1, NAN] * 20, total_steps=100)
    assert verdicts.count("skip") == 5
    assert verdicts[-1] == "give_up"
    reason = judge(GuardConfig(), FRESH, StepStats(8, NAN, 1.0), 20)
    assert reason.verdict == "skip"  # one row of skips is accepted however short the training


def test_a_spike_is_far_above_the_median_of_accepted_steps_only():
    config = GuardConfig(spikes="skip", window=8, deviations=10)
    noisy = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1]
    assert follow(config, [*noisy, 1.5])[0][-1] == "go"
    assert follow(config, [*noisy, 3.0, 1.0, 3.0])[0][-3:] == [
        "skip",
        "go",
        "skip",
    ]  # the first 3.0 does not count for the median
    assert follow(config, [*noisy, 0.0])[0][-1] == "go"  # a drop is no spike
    assert follow(config, [*noisy[:-1], 50.0])[0][-1] == "go"  # too early to say
    assert follow(config, [*[1.0] * 8, 1.05, 1.2])[0][-2:] == [
        "go",
        "skip",
    ]  # on a plateau the deviation is at least one per cent
    norms = judge(config, GuardState(recent=((1.0, 2.0),) * 8), StepStats(8, 1.0, 9.0), 1000)
    assert (norms.verdict, norms.reason) == ("skip", "gradient norm 9 spikes, 2 is the median of 8 steps before")
    assert follow(replace(config, spikes="roll_back", roll_back_steps=3), [*noisy, 3.0])[1].stepped_over == ((5, 9),)
    verdicts, state = follow(replace(config, spikes="report"), [*noisy, 3.0])
    assert (verdicts[-1], state.recent[-1]) == ("go", (3.0, 1.0))


def test_the_state_survives_json_and_ranges_merge():
    state = GuardState(((1.0, 2.0), (0.1, 0.7)), (3, 9), ((4, 6), (20, 30)), 2)
    assert GuardState.from_json(json.loads(json.dumps(asdict(state)))) == state
    assert [state.next_step(step) for step in (3, 4, 5, 6, 29)] == [3, 6, 6, 6, 30]
    assert [state.untrained_before(step) for step in (4, 5, 6, 25, 40)] == [0, 1, 2, 7, 12]
    assert merge_range(state.stepped_over, (6, 10)) == ((4, 10), (20, 30))
    assert merge_range(state.stepped_over, (5, 21)) == ((4, 30),)
    assert merge_range(state.stepped_over, (1, 2)) == ((1, 2), (4, 6), (20, 30))


def test_thresholds_that_make_no_sense_are_refused():
    for wrong in ({"window": 2}, {"deviations": 0}, {"lost_share": 2.0}, {"roll_backs": -1}, {"skips_in_a_row": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GuardConfig(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# A bad step moves nothing


@dataclass(frozen=True)
class Case:
    zero_stage: int
    precision: str
    offload: str = "none"
    gradient_precision: str | None = None


def held(engine: Engine) -> list[tuple[str, str, int, bytes]]:
    """Return every bit of the state that this rank holds."""
    return [(f.kind, f.parameter, f.start, f.values.cpu().numpy().tobytes()) for f in engine.fragments()]


def steps_with_one_bad(case: Case) -> dict[str, Any]:
    """Take two steps on one engine; on another take two more between them, which are dropped: one with a NaN, one finite."""
    world, batch = enter_world(), 8
    local = batch // world.size
    settings = EngineSettings(
        precision=case.precision,
        zero_stage=case.zero_stage,
        micro_batch=2,
        accumulation=2,
        betas=(0.9, 0.95),
        offload=case.offload,
        gradient_precision=case.gradient_precision,
    )
    task = SpoiltTask(model=mae_config(), weight_decay=0.05, seed=0, factors=())
    noise = torch.as_tensor(mask_noise(0, [0] * batch, list(range(batch)), mae_config().encoder.num_patches))
    ends, seen = [], {}
    for factors in ([1.0, 1.0], [1.0, NAN, 2.0, 1.0]):
        built = task.build()
        engine = Engine(built.module, built.groups, settings, world)
        for factor in factors:
            generator = torch.Generator().manual_seed(1)
            images = torch.randint(0, 256, (batch, SIDE, SIDE, 3), generator=generator).byte()
            factor_each = torch.ones(batch)
            factor_each[-1] = factor
            mine = slice(world.rank * local, (world.rank + 1) * local)
            inputs = (images[mine], noise[mine], factor_each[mine])
            before = held(engine)
            engine.accumulate(split(inputs, settings, world.device), global_batch=batch)
            squares = world.total([engine.measured()[1]])[0]
            assert held(engine) == before
            if factor == 1.0:
                engine.apply(1e-2, grad_norm=math.sqrt(squares))
                moments = [f.values.double().square().sum().item() for f in engine.fragments() if f.kind == "exp_avg"]
                # after the first step from zero moments, Adam's first moment is a tenth of the gradient
                seen.setdefault("norms", (math.sqrt(squares), math.sqrt(world.total([sum(moments)])[0]) / 0.1))
            else:
                seen[str(factor)] = squares
                engine.discard()
                assert held(engine) == before
        ends.append(held(engine))
        engine.close()
    return seen | {"equal": ends[0] == ends[1], "steps": engine.optimizer_steps}


CASES = [
    Case(1, "fp32"),
    Case(1, "bf16", "optimizer"),
    Case(2, "bf16"),
    Case(2, "fp32", "optimizer"),
    Case(3, "bf16"),
    Case(3, "bf16", "optimizer"),
    *(Case(stage, "bf16", offload, "fp32") for stage in (1, 3) for offload in ("none", "optimizer")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, astuple(case))))
def test_gradient_norms_are_known_before_the_step_and_gradients_are_dropped_without_a_trace(teams, case):
    """A NaN from one sample on one rank, and finite gradients that are dropped: no bit of weights and moments changes on any
    rank, and the steps that follow are those of a training that never met them."""
    for result in teams(2).run(steps_with_one_bad, case):
        assert math.isnan(result["nan"])
        assert math.isfinite(result["2.0"])
        assert result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-5)
        assert result["equal"]
        assert result["steps"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Real trainings


def same_bits(one: tuple[dict[str, Any], Attempt], other: tuple[dict[str, Any], Attempt]) -> None:
    """Weights, moments, digest and the guard's record are equal."""
    states = [checkpoint_state(attempt.root_uri, result["checkpoint_key"]) for result, attempt in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    manifests = [read_manifest(attempt.root, result["checkpoint_key"]) for result, attempt in (one, other)]
    for name in ("global_step", "optimizer_steps", "ids_digest", "ids_count", "guard"):
        assert getattr(manifests[0], name) == getattr(manifests[1], name), name


def test_a_bad_step_is_skipped_recorded_and_survives_a_stop(teams, shards, tmp_path):
    bad = {4: NAN, 12: INF}
    straight = run(teams(2), shards, tmp_path / "straight", bad, GuardConfig())
    result, attempt = straight
    manifest = read_manifest(attempt.root, result["checkpoint_key"])
    assert (result["global_step"], manifest.optimizer_steps) == (TOTAL_STEPS, TOTAL_STEPS - 2)
    assert manifest.guard.skipped == (4, 12)
    assert manifest.ids_count == 13 * TOTAL_STEPS
    assert result["ids_digest"] == digest_of(computed_by_step(shards, steps=TOTAL_STEPS))
    assert math.isfinite(result["loss"])
    # stopped right before, right after, and long after the bad step
    same_bits(straight, run(teams(2), shards, tmp_path / "stopped", bad, GuardConfig(), stops=(4, 1, 6)))
    found = audit(attempt.root, dataset=dataset_address(shards))
    assert found.agrees
    assert "the gradients of 2 steps dropped by the guard" in found.line


@pytest.mark.parametrize(
    ("zero_stage", "precision", "stopped"),
    [
        (1, "fp32", [(5, 3, 3), (12, 1, 1)]),
        (2, "bf16", [(11, 1)]),
        pytest.param(3, "bf16", [(11,)], marks=pytest.mark.system),
    ],
    ids=["1-fp32", "2-bf16", "3-bf16"],
)
def test_bad_steps_in_a_row_roll_back_and_are_never_trained_on(teams, shards, tmp_path, zero_stage, precision, stopped):
    """Steps 8, 9 and 10 are bad, checkpoints are at 3 and 6: back to 3, on to 5, then on from 11. Stopped anywhere (11: right
    after rolling back, 12: before the skipped range, one more: after it), a fresh process comes to the same bits: what is
    loaded into the running engine is all the state there is."""
    guard = GuardConfig(roll_back_steps=3, lost_share=0.5)
    bad = dict.fromkeys((8, 9, 10), NAN)
    options = {"zero_stage": zero_stage, "precision": precision}
    straight = run(teams(2), shards, tmp_path / "straight", bad, guard, **options)
    result, attempt = straight
    manifest = read_manifest(attempt.root, result["checkpoint_key"])
    assert (manifest.guard.stepped_over, manifest.guard.roll_backs, manifest.guard.skipped) == (((5, 11),), 1, ())
    steps = computed_by_step(shards, steps=TOTAL_STEPS)
    assert result["ids_digest"] == digest_of([*steps[:5], *steps[11:]])
    assert manifest.ids_count == 13 * (TOTAL_STEPS - 6)
    assert manifest.optimizer_steps == TOTAL_STEPS - 6
    for stops in stopped:
        folder = tmp_path / "-".join(map(str, stops))
        same_bits(straight, run(teams(2), shards, folder, bad, guard, stops=stops, **options))
    found = audit(attempt.root, dataset=dataset_address(shards))
    assert found.agrees, found.line
    assert "known gaps where it rolled back: steps 5 to 10" in found.line


def test_a_rollback_before_the_first_checkpoint_starts_from_initial_weights(teams, shards, tmp_path):
    guard = GuardConfig(lost_share=0.5)
    result, attempt = run(teams(2), shards, tmp_path / "step", dict.fromkeys((1, 2, 3), NAN), guard)
    manifest = read_manifest(attempt.root, result["checkpoint_key"])
    assert (manifest.guard.stepped_over, manifest.optimizer_steps) == (((0, 4),), TOTAL_STEPS - 4)
    assert manifest.ids_count == 13 * (TOTAL_STEPS - 4)


def test_a_spike_rolls_back_if_the_recipe_says_so(teams, shards, tmp_path):
    bad = {14: 1e4}
    guard = GuardConfig(spikes="roll_back", window=8, roll_back_steps=2, lost_share=0.2)
    result, attempt = run(teams(2), shards, tmp_path / "acted", bad, guard)
    assert read_manifest(attempt.root, result["checkpoint_key"]).guard.stepped_over == ((12, 15),)
    result, attempt = run(teams(2), shards, tmp_path / "told", bad, replace(guard, spikes="report"))
    assert read_manifest(attempt.root, result["checkpoint_key"]).guard.stepped_over == ()


def test_it_gives_up_with_step_loss_rate_and_what_to_do(teams, shards, tmp_path):
    attempt = attempt_at(tmp_path / "step")
    guard = GuardConfig(roll_back_steps=1, roll_backs=1, lost_share=0.9)
    spec = spoilt_spec(shards, attempt, dict.fromkeys(range(3, 19), NAN), guard)
    for outcome in teams(2).outcomes(train_here, spec, attempt, StopAfter(999)):
        assert outcome.kind == "PipelineError"
        assert "the loss is nan and the gradient norm nan at step 8 (learning rate 0.00" in outcome.message
        assert "1 rollbacks have not helped" in outcome.message
        assert "lower base_lr" in outcome.message
