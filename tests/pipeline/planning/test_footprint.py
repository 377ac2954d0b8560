"""The footprint's arithmetic. tests/system/test_footprint_layouts.py compares it with real processes."""

from dataclasses import replace

import pytest

from mae_core import SIZES, MAEConfig, activation_bytes, parameter_count
from pipeline.planning.footprint import (
    DECODE_PROCESS_BYTES,
    DECODE_SERVER_BYTES,
    OVERHEAD,
    autoencoder_size,
    classifier_size,
    footprint,
    with_checkpoint_copy,
    with_feed,
)
from pipeline.training.engine.settings import EngineSettings

HUGE = MAEConfig(encoder=SIZES["huge"]())
WEIGHTS = parameter_count(HUGE)
SETTINGS = EngineSettings(precision="bf16", zero_stage=1, micro_batch=1, accumulation=1, betas=(0.9, 0.95))


def held(settings: EngineSettings = SETTINGS, *, workers: int = 8, device="cuda", model: MAEConfig = HUGE):
    return footprint(autoencoder_size(model, settings), settings, workers=workers, device=device)


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_weights_and_states_by_hand(workers):
    whole, sharded = held(workers=workers), held(replace(SETTINGS, zero_stage=3), workers=workers)
    assert whole.weights == 2 * WEIGHTS
    for one in (whole, sharded):
        assert one.optimizer == pytest.approx(12 * WEIGHTS / workers, rel=1e-6)
        assert one.overhead == OVERHEAD["cuda"]
        assert one.total == sum(one)


def test_when_adamw_steps_it_has_gradients_twice_and_in_float32():
    # bytes per weight for one worker in bf16: 2 + 12 held throughout, 2 kept, 2 flat, 4 in float32
    one = held(workers=1)
    assert one.total - one.overhead == pytest.approx(22 * WEIGHTS, rel=1e-6)


def test_sums_in_float32_take_two_bytes_more_of_a_weight_and_no_copy_when_adamw_steps():
    wide = replace(SETTINGS, gradient_precision="fp32")
    # 2 + 12 held throughout, and 4 kept, which AdamW takes as they are
    one = held(wide, workers=1)
    assert one.total - one.overhead >= 18 * WEIGHTS
    for stage in (1, 2, 3):
        of_stage = replace(wide, zero_stage=stage)
        several = replace(of_stage, micro_batch=256, accumulation=2)
        if stage == 3:
            assert held(of_stage).gradients - held(
                replace(of_stage, gradient_precision=None)
            ).gradients == pytest.approx(2 * WEIGHTS / 8, rel=1e-6)
        else:
            assert held(several).gradients == pytest.approx(4 * WEIGHTS / 8, rel=1e-6)
        assert (
            held(replace(several, gradient_precision="bf16")).total
            == held(replace(several, gradient_precision=None)).total
        )
    moved = held(replace(wide, offload="optimizer", zero_stage=2), workers=1)
    assert moved.gradients >= 4 * WEIGHTS  # the sums stay on the GPU


@pytest.mark.parametrize(("stage", "buffers"), [(1, 2), (2, 2), (3, 1)])
def test_overlap_takes_buffers_of_fifty_million_gradients(stage, buffers):
    plain = replace(SETTINGS, zero_stage=stage, micro_batch=256)
    more = held(replace(plain, overlap_comm=True)).total - held(plain).total
    assert more == buffers * 2 * 50_000_000


def test_many_images_are_activations():
    many = held(replace(SETTINGS, micro_batch=256))
    assert many.activations >= 256 * activation_bytes(HUGE)
    assert many.activations == pytest.approx(256 * activation_bytes(HUGE), rel=0.02)  # and the pixels
    again = held(replace(SETTINGS, micro_batch=256, activation_checkpointing=True))
    assert again.total < many.total / 3


def test_more_workers_and_more_sharding_hold_no_more():
    totals = [held(workers=workers).total for workers in (1, 2, 4, 8, 16)]
    assert totals == sorted(totals, reverse=True)
    stages = [held(replace(SETTINGS, zero_stage=stage), workers=8).total for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)


def test_accumulation_holds_the_gradients_beside_the_activations():
    once = held(replace(SETTINGS, micro_batch=256))
    several = held(replace(SETTINGS, micro_batch=256, accumulation=2))
    assert several.total - once.total == 2 * WEIGHTS


def test_an_offloaded_optimiser_is_the_host_s_and_on_a_cpu_nothing_changes():
    settings = replace(SETTINGS, offload="optimizer")
    moved = held(settings, workers=1)
    assert moved.optimizer == 0
    assert moved.host == pytest.approx(18 * WEIGHTS, rel=1e-6)
    assert moved.total < held(workers=1).total / 2
    assert held(settings, device="cpu") == held(device="cpu")


def test_the_copy_for_a_checkpoint_is_the_cpu_s_memory():
    model = autoencoder_size(HUGE, SETTINGS)
    on_gpu, on_cpu = (
        (
            held(workers=2, device=device),
            with_checkpoint_copy(held(workers=2, device=device), model, SETTINGS, workers=2, device=device),
        )
        for device in ("cuda", "cpu")
    )
    assert on_gpu[1].total == on_gpu[0].total
    assert on_gpu[1].host == on_cpu[1].total - on_cpu[0].total == pytest.approx(12 * WEIGHTS / 2, rel=1e-6)


def test_fine_tuning_sees_whole_images():
    settings = replace(SETTINGS, micro_batch=64)
    one = footprint(classifier_size(HUGE.encoder, settings, num_classes=1000), settings, workers=8, device="cuda")
    assert one.activations > 2 * held(settings).activations
    assert one.weights == 2 * (parameter_count(HUGE.encoder) + 1281 * 1000)


def partial_size(blocks: float | None, settings: EngineSettings = SETTINGS):
    return classifier_size(HUGE.encoder, settings, num_classes=1000, trained_blocks=blocks)


def of_partial(blocks: float | None, *, zero_stage=1, workers=8):
    settings = replace(SETTINGS, micro_batch=64, zero_stage=zero_stage)
    return footprint(partial_size(blocks, settings), settings, workers=workers, device="cuda")


def test_frozen_weights_are_held_but_have_neither_gradients_nor_state():
    dim, mlp, head = 1280, 5120, 1281 * 1000
    block = 4 * dim * dim + 4 * dim + 2 * dim * mlp + mlp + dim + 4 * dim  # attention, MLP, two norms
    sizes = {blocks: partial_size(blocks) for blocks in (0, 0.5, 1, 4, 32, None)}
    assert sizes[0].weights == head + 2 * dim
    assert sizes[0.5].weights == sizes[0].weights + 2 * dim * mlp + mlp + dim + 2 * dim
    assert sizes[4].weights == sizes[0].weights + 4 * block
    assert sizes[32] == sizes[None]
    assert {size.weights + size.frozen for size in sizes.values()} == {parameter_count(HUGE.encoder) + head}
    four, all_of_it = of_partial(4), of_partial(None)
    assert four.weights == all_of_it.weights
    assert four.optimizer == pytest.approx(12 * sizes[4].weights / 8, rel=1e-6)
    assert four.activations < all_of_it.activations / 7  # 4 of 32 blocks
    totals = [of_partial(blocks).total for blocks in (0, 1, 4, 16, 32)]
    assert totals == sorted(totals)
    # ZeRO-3 divides frozen weights, too
    assert of_partial(4, zero_stage=3, workers=64).weights < four.weights / 2


def test_the_average_of_the_weights_takes_four_bytes_of_each_and_is_in_the_copy():
    averaging = replace(SETTINGS, average_decay=0.9999)
    model = autoencoder_size(HUGE, SETTINGS)
    plain, more = (held(settings, workers=8) for settings in (SETTINGS, averaging))
    assert more.optimizer - plain.optimizer == pytest.approx(4 * WEIGHTS / 8, rel=1e-6)
    saved = with_checkpoint_copy(more, model, averaging, workers=8, device="cuda")
    assert saved.host == pytest.approx(16 * WEIGHTS / 8, rel=1e-6)
    moved = held(replace(averaging, offload="optimizer"), workers=1)
    assert moved.host == pytest.approx(22 * WEIGHTS, rel=1e-6)


def test_decode_workers_and_what_they_read_ahead_are_the_node_s_memory():
    plain, batch = held(), 512 * 224 * 224 * 3
    assert with_feed(plain, processes=0, batch_bytes=batch, device="cpu") == plain
    fed = with_feed(plain, processes=15, batch_bytes=batch, device="cuda")
    assert fed.host - plain.host == DECODE_SERVER_BYTES + 15 * DECODE_PROCESS_BYTES + (2 + 5) * batch
    assert fed.total - plain.total == 2 * batch  # on the device: the batch in use, and the next
    large = with_feed(plain, processes=15, batch_bytes=8 * batch, device="cuda")
    assert (
        large.host - plain.host == DECODE_SERVER_BYTES + 15 * DECODE_PROCESS_BYTES + (1 + 5) * 8 * batch
    )  # one ahead instead of two
    on_cpu = with_feed(plain, processes=2, batch_bytes=batch, device="cpu")
    assert on_cpu.total - plain.total == DECODE_SERVER_BYTES + 2 * DECODE_PROCESS_BYTES + (2 + 3) * batch
