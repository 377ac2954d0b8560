"""Estimates of a run: settings that fit, effort computed by hand, and what is refused before anything is held."""

from dataclasses import replace

import pytest
from run_kit import ROOT, document, write_config, write_images

from mae_core import training_flops
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError
from pipeline.planning.estimate import (
    as_set_options,
    check_memory,
    estimate_effort,
    estimate_memory,
    images_per_epoch,
    memory_by_stage,
    propose_resources,
    training_configs,
)
from pipeline.planning.hardware import Hardware, hardware_named
from pipeline.runs.run import run_pipeline
from pipeline.runs.workflow import build
from pipeline.storage import open_store


@pytest.fixture
def huge() -> RunConfig:
    return load_config(ROOT / "jobs/configs/vit_huge.yaml", ["data.source=/data/imagenet"])


def pretraining(config: RunConfig):
    return training_configs(build(config))["pretrain"]


def of(memory_gib: float, kind="cuda") -> Hardware:
    return replace(hardware_named("H100"), memory_bytes=int(memory_gib * 2**30), kind=kind)


def test_steps_that_train_are_pretraining_and_fine_tuning(huge):
    assert set(training_configs(build(huge))) == {
        "pretrain",
        "finetune-imagenet-pretrained-s0",
        "finetune-imagenet-random-s0",
    }


def of_all(config: RunConfig, device: Hardware, *, workers: int = 8):
    resources = config.resources.model_copy(update={"workers": workers})
    return propose_resources(list(training_configs(build(config)).values()), resources, device)


def fits(config: RunConfig, resources, device: Hardware) -> bool:
    return all(estimate_memory(step, resources, device).fits for step in training_configs(build(config)).values())


@pytest.mark.parametrize("memory_gib", [12, 16, 24, 40, 80, 180])
@pytest.mark.parametrize("workers", [1, 8])
def test_what_is_proposed_fits_every_step_and_nothing_larger_of_its_kind_does(huge, memory_gib, workers):
    best = of_all(huge, of(memory_gib), workers=workers)
    assert fits(huge, best, of(memory_gib))
    slice_ = huge.pretrain.global_batch // workers
    parts = -(-slice_ // best.micro_batch)
    if parts > 1:
        larger = best.model_copy(update={"micro_batch": -(-slice_ // (parts - 1))})
        assert not fits(huge, larger, of(memory_gib))


def test_the_lowest_stage_with_an_efficient_batch_comes_first(huge):
    assert of_all(huge, hardware_named("H100")).zero_stage == 1
    small = of_all(huge, of(6))
    assert small.activation_checkpointing or small.zero_stage > 1


def test_a_proposal_pasted_into_the_command_gives_itself(huge):
    best = of_all(huge, of(8))
    pasted = [word for word in as_set_options(best).split() if word != "--set"]
    assert load_config(ROOT / "jobs/configs/vit_huge.yaml", ["data.source=/data/imagenet", *pasted]).resources == best


def test_the_stages_differ_in_the_stage_alone(huge):
    stages = memory_by_stage(pretraining(huge), huge.resources, hardware_named("H100"))
    assert [one.resources.zero_stage for one in stages] == [1, 2, 3]
    assert len({one.settings.micro_batch for one in stages}) == 1


def test_steps_time_and_cost_by_hand(huge):
    device = hardware_named("H100").with_overrides(tflops=500.0, mfu=0.4)
    took = estimate_effort(pretraining(huge), huge.resources, device, images=1_281_167)
    assert took.steps == -(-1_281_167 * 1600 // 4096)
    assert took.images == took.steps * 4096
    seconds = took.images * training_flops(huge.model) / (8 * 500e12 * 0.4)
    assert took.seconds == pytest.approx((seconds, seconds))
    assert took.cost(devices=8, price=2.0) == pytest.approx((seconds / 3600 * 16,) * 2)
    again = huge.resources.model_copy(update={"activation_checkpointing": True})
    more = estimate_effort(pretraining(huge), again, device, images=1_281_167)
    assert more.seconds[0] / took.seconds[0] == pytest.approx(4 / 3, rel=0.01)


def test_partial_fine_tuning_takes_less_time_and_memory_the_fewer_blocks_it_trains(huge):
    config = load_config(
        ROOT / "jobs/configs/vit_huge.yaml",
        ["data.source=/data/imagenet", "evaluation.datasets=[{name: i, protocols: [partial, finetune]}]"],
    )
    steps, device = training_configs(build(config)), hardware_named("H100").with_overrides(tflops=500.0, mfu=0.4)
    of_blocks = [steps[f"partial-{blocks}-i-pretrained-s0"] for blocks in ("0", "0.5", "1", "2", "4")]
    hours = [
        estimate_effort(one, config.resources, device, images=1000).seconds[0] / one.recipe.epochs for one in of_blocks
    ]
    whole = steps["finetune-i-pretrained-s0"]
    full = estimate_effort(whole, config.resources, device, images=1000).seconds[0] / whole.recipe.epochs
    assert hours == sorted(hours)
    # forward passes are all there is to training a head, and backward passes cost two of them
    assert hours[0] / full == pytest.approx(1 / 3, rel=0.01)
    assert hours[4] / full == pytest.approx((32 + 2 * 4) / (3 * 32), rel=0.01)
    totals = [estimate_memory(one, config.resources, device).footprint.total for one in (*of_blocks, whole)]
    assert totals == sorted(totals)


def test_what_cannot_fit_is_refused_with_settings_that_are_accepted(huge):
    steps = build(huge)
    with pytest.raises(ConfigError) as caught:
        check_memory(steps, huge.resources, of(16))
    text = str(caught.value)
    assert text.startswith("pretrain: resources.micro_batch=256 at zero_stage=1 needs about ")
    assert " GiB per worker, but a worker on H100 has 16.0 GiB. Write --set resources.micro_batch=" in text
    pasted = text.partition("Write ")[2].partition(";")[0].replace("--set ", "").split()
    repaired = load_config(ROOT / "jobs/configs/vit_huge.yaml", ["data.source=/data/imagenet", *pasted])
    check_memory(steps, repaired.resources, of(16))
    with pytest.raises(ConfigError, match="use more workers or larger devices"):
        check_memory(steps, huge.resources, of(1))


def test_what_is_only_tight_is_not_refused(huge):
    need = estimate_memory(pretraining(huge), huge.resources, hardware_named("H100")).footprint.total / 2**30
    tight = of(need * 0.9)
    check_memory([step for step in build(huge) if step.name == "pretrain"], huge.resources, tight)
    assert not estimate_memory(pretraining(huge), huge.resources, tight).fits


def test_a_cpu_without_room_for_the_copy_is_offered_the_disk(huge):
    """The last candidate, which saves 12 bytes per weight."""
    steps = [pretraining(huge)]
    cpu = of(24, kind="cpu")
    proposed = propose_resources(steps, huge.resources.model_copy(update={"workers": 1}), cpu)
    assert proposed.checkpoint_copy == "disk"
    assert estimate_memory(steps[0], proposed, cpu).footprint.copy == 0
    assert "--set resources.checkpoint_copy=disk" in as_set_options(proposed)
    assert propose_resources(steps, huge.resources, of(128, kind="cpu")).checkpoint_copy == "memory"


def test_workers_of_a_cpu_share_its_memory(huge):
    resources = huge.resources.model_copy(update={"workers": 4})
    assert estimate_memory(pretraining(huge), resources, of(64, kind="cpu")).available == 16 * 2**30


def test_a_run_that_cannot_fit_ends_before_anything_is_written_or_held(tmp_path):
    content = document(tmp_path / "store", write_images(tmp_path / "images", 8))
    overrides = ["resources.micro_batch=100000000", "pretrain.global_batch=100000000"]
    config = load_config(write_config(tmp_path / "run.yaml", content), overrides)
    for executor in ("in_process", "ray"):
        with pytest.raises(
            ConfigError, match=r"pretrain: resources\.micro_batch=100000000 at zero_stage=1 needs about"
        ):
            run_pipeline(config, executor=executor, display=None)
    assert not (tmp_path / "store").exists()


def test_images_that_have_not_been_counted_are_unknown(huge, tmp_path):
    config = huge.model_copy(update={"store": str(tmp_path)})
    steps = {step.name: step for step in build(config)}
    assert images_per_epoch(steps["pretrain"], open_store(str(tmp_path))) is None
