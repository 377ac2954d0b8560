"""Benchmarks of a training step: what is compared computes the same, and the JSON line has its keys. Times are not tested."""

import json
import time

import pytest
import torch

from benchmarks import _peers, _timing, asymmetry, probes, step_traffic, step_variants, train_step
from benchmarks._variants import mean_loss
from mae_core import MAEConfig, MaskedAutoencoder, ViTConfig, reference_forward

TINY = MAEConfig(
    encoder=ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2),
    decoder_embed_dim=8,
    decoder_depth=2,
    decoder_num_heads=2,
)
# Keys that readers of the JSON line rely on; there may be more.
KEYS = {
    "train_step": "device model images_per_s mfu ratio_vs_hf_eager ratio_vs_hf_compiled ratio_vs_timm_eager",
    "asymmetry": "speedup flops_ratio",
    "probes": "full_over_efficient flops_full_over_efficient efficient_share_of_encoder",
}


@pytest.fixture
def batch():
    """A model whose weights are far from their initial values, pixels and noise."""
    generator = torch.Generator().manual_seed(0)
    model = MaskedAutoencoder(TINY, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    return model, pixels, torch.rand(3, 16, generator=generator)


def gradient_norm(module):
    return torch.stack(
        [parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]
    ).norm()


def assert_same_as_ours(model, pixels, noise, peer, loss):
    ours, theirs = model(pixels, noise).loss.mean(), loss(pixels, noise)
    ours.backward()
    theirs.backward()
    # float32: worst relative difference 3e-7 over 20 draws; one patch masked otherwise moves the loss by percents
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient_norm(peer), gradient_norm(model), rtol=1e-4, atol=0)


def test_hugging_face_model_computes_the_same(batch):
    pytest.importorskip("transformers")
    model, pixels, noise = batch
    peer = _peers.hugging_face(TINY, model.state_dict())
    assert_same_as_ours(model, pixels, noise, peer, _peers.hugging_face_loss(peer))


def test_timm_blocks_compute_the_same(batch):
    pytest.importorskip("timm")
    model, pixels, noise = batch
    peer = _peers.TimmAutoencoder(TINY, model.state_dict())
    assert_same_as_ours(model, pixels, noise, peer, peer)


@pytest.mark.parametrize("embed", ["visible", "all"])
@pytest.mark.parametrize("order", ["shuffled", "image"])
@pytest.mark.parametrize("head", ["hidden", "all"])
def test_an_undone_saving_changes_no_loss(batch, embed, order, head):
    model, pixels, noise = batch
    loss = mean_loss(model, pixels, noise, embed=embed, order=order, head=head)
    torch.testing.assert_close(loss, reference_forward(model, pixels, noise).loss.mean(), rtol=1e-5, atol=0)


def test_a_peer_of_another_model_is_refused(batch):
    model, pixels, noise = batch
    with pytest.raises(SystemExit, match=r"stranger: loss .* not the same model"):
        train_step.check_equal("stranger", model, lambda pixels, noise: noise.sum(), pixels, noise)


@pytest.mark.parametrize("benchmark", [train_step, asymmetry], ids=["train_step", "asymmetry"])
def test_last_line_has_the_promised_keys(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "quick_config", lambda: TINY)
    benchmark.main(["--quick", "--device", "cpu", "--batch", "2", "--rounds", "1", "--steps", "1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = benchmark.__name__.rpartition(".")[2]
    assert line["benchmark"] == name
    assert set(KEYS[name].split()) <= set(line)
    assert all(line[key] is not None for key in KEYS[name].split() if "_vs_" not in key)


def test_a_line_tells_what_probes_cost(monkeypatch, capsys):
    small = ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=1, num_heads=2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # of this process, which other tests use
    monkeypatch.setattr(probes, "SIZES", {"small": lambda: small, "base": lambda: small})
    probes.main(["--quick", "--device", "cpu", "--batch", "2", "--rounds", "1", "--steps", "1", "--classes", "5"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(KEYS["probes"].split()) <= set(line)


def test_efficient_probing_costs_a_tenth_of_the_full_probe_at_vit_b():
    full, efficient = (
        probes.head_flops(kind, probes.SIZES["base"](), num_classes=1000) for kind in ("full", "efficient")
    )
    assert efficient < full / 10


@pytest.mark.parametrize(("option", "compiled"), [("--whole", 2), ("--no-whole", 1)])
def test_whole_models_are_compiled_if_asked_for(batch, option, compiled):
    (plan,) = train_step.plans(["--quick", "--compile", "--no-ablations", "--device", "cpu", option])
    names = [way.name for way in train_step.our_ways(batch[0], plan)]
    assert names == [train_step.OURS, train_step.BY_BLOCK, train_step.WHOLE][: 1 + compiled]


def test_a_block_copies_nothing_but_the_three_gradients_of_its_attention():
    counted = step_traffic.count(TINY, batch=2, dtype=torch.float32)
    blocks = TINY.encoder.depth + TINY.decoder_depth
    assert counted.launches["stack"] == blocks
    assert counted.launches["clone"] < blocks
    # [2, 3, 16 + 1, 8] read and written by each of the decoder's blocks, with fewer tokens and twice the width in the encoder's
    assert counted.moved["stack"] == sum(2 * 2 * 3 * tokens * width * 4 * 2 for tokens, width in ((17, 8), (5, 16)))
    assert step_traffic.kind_of("_scaled_dot_product_flash_attention_for_cpu") == "attention"


def test_ways_that_cannot_run_or_begin_in_time_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(step_variants, "quick_config", lambda: TINY)
    for budget, timed in (("inf", {"eager", "attention by flash", "tf32", "fp32"}), ("0", {"eager"})):
        step_variants.main(["--quick", "--batch", "2", "--budget", budget])
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert line["benchmark"] == "step_variants"
        assert set(line["images_per_s"]) >= timed
        assert line["left_out"].keys() | line["images_per_s"].keys() == {
            "eager",
            *step_variants.ATTENTION,
            "tf32",
            "fp32",
        }
    assert line["left_out"]["fp32"].endswith("no time was left to begin it")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_first_step_that_takes_too_long_is_cut_off_even_where_exceptions_are_caught():
    def compiles() -> None:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - as autotuning does
            time.sleep(60)

    with pytest.raises(RuntimeError, match="cut off"), step_variants._cut_off(time.monotonic() + 0.05):
        compiles()


def test_a_ratio_is_the_median_of_the_ratios_per_round():
    # the machine is ten times slower in the second round, which must not matter
    seconds = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 3.0]}
    assert _timing.speed_ratio(seconds, of="ours", over="theirs") == 2.0
    assert _timing.speed_ratio(seconds, of="ours", over="not timed") is None


def test_a_variant_that_cannot_run_is_reported():
    def fails():
        raise torch.OutOfMemoryError("no room")

    variants = [_timing.Variant("works", lambda: torch.tensor(1.0)), _timing.Variant("fails", fails)]
    timed = _timing.take_turns(variants, rounds=2, steps=1, device=torch.device("cpu"), precision="float32")
    assert (len(timed.seconds["works"]), "fails" in timed.seconds) == (2, False)
    assert timed.failed == {"fails": "OutOfMemoryError: no room"}
