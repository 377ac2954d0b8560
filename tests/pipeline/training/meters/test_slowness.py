"""From shares of time to one cause and one word to change; said once, and only of runs that stay slow."""

import re

import pytest
from training_kit import resources

from pipeline.cluster.resources import Resources
from pipeline.planning.hardware import accelerators
from pipeline.training.meters.slowness import (
    FORESEEN_MFU,
    SpeedWatch,
    TimeShares,
    advice,
    main_cause,
    shares_of,
)

CAUSES = ("data", "host", "copies", "network", "recompilation", "checkpoints", "computation")


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"data_wait": 0.6}, "data"),
        ({"data_wait": 0.6, "host_bound": 0.7, "gpu_busy": 0.3}, "data"),  # the GPU idles because data are late
        ({"data_wait": 0.2, "host_bound": 0.7, "gpu_busy": 0.3}, "host"),
        ({"data_wait": 0.05, "copy_wait": 0.3, "host_bound": 0.1}, "copies"),
        ({"data_wait": 0.0, "agree_wait": 0.2, "exchange": 0.3, "host_bound": 0.25}, "network"),
        ({"data_wait": 0.3, "agree_wait": 0.2, "exchange": 0.3}, "network"),
        ({"data_wait": 0.3, "compiling": 0.5, "host_bound": 0.9}, "recompilation"),
        ({"data_wait": 0.0, "checkpoint_wait": 0.4, "host_bound": 0.45}, "checkpoints"),
        ({"data_wait": 0.1, "host_bound": 0.2, "gpu_busy": 0.8}, "computation"),  # nothing else takes long
        ({}, "computation"),
        ({"data_wait": 0.4, "copy_wait": 0.4}, "data"),  # a tie: what a person can change most easily
    ],
)
def test_the_largest_share_is_the_cause(row, cause):
    assert main_cause(shares_of(row)) == cause


def test_shares_add_no_wait_twice():
    row = {"data_wait": 0.2, "checkpoint_wait": 0.1, "compiling": 0.1, "agree_wait": 0.1, "host_bound": 0.75}
    assert shares_of(row) == pytest.approx(TimeShares(0.2, 0.25, 0.0, 0.1, 0.1, 0.1))


@pytest.mark.parametrize("cause", CAUSES)
def test_the_advice_names_a_word_of_the_configuration(cause):
    text = advice(cause, resources(decode_workers=4))
    words = re.findall(r"resources\.(\w+)", text)
    assert words
    assert set(words) <= Resources.model_fields.keys()


def test_ranks_that_exchange_weights_are_told_of_the_stage_and_others_of_their_number():
    assert advice("network", resources(zero_stage=3)).endswith("lower resources.zero_stage (now 3)")
    assert advice("network", resources(workers=4)).endswith("lower resources.workers (now 4)")


def rows(mfu, *, times=range(0, 400, 40), **more):
    return [{"time": 1000.0 + at, "mfu": mfu, "images_per_s": 50.0, **more} for at in times]


def test_a_run_that_stays_slow_is_told_once():
    watch = SpeedWatch(resources(decode_workers=2), "cuda")
    said = [watch.remark(row) for row in rows(0.06, data_wait=0.7)]
    assert [bool(text) for text in said] == [False, False, False, True, *[False] * 6]
    assert said[3] == (
        "50 images/s are 20 % of what mae plan foresees at worst. "
        "It waits for data: raise resources.decode_workers (now 2)"
    )


def test_a_run_that_is_fast_enough_or_only_pauses_hears_nothing():
    for mfu in (0.151, 0.4):
        watch = SpeedWatch(resources(), "cuda")
        assert not any(map(watch.remark, rows(mfu)))
    watch = SpeedWatch(resources(), "cuda")
    slow, fast = rows(0.01), rows(0.4)
    mixed = [slow[i] if i % 3 else fast[i] for i in range(len(slow))]
    assert not any(map(watch.remark, mixed))


def test_recomputation_costs_speed_that_the_plan_foresees():
    watch = SpeedWatch(resources(activation_checkpointing=True), "cuda")
    assert not any(map(watch.remark, rows(0.12)))
    assert any(map(SpeedWatch(resources(), "cuda").remark, rows(0.12)))


def test_the_plan_foresees_no_less_of_any_gpu():
    assert all(entry.mfu[0] >= FORESEEN_MFU["cuda"][0] for entry in accelerators().values())
