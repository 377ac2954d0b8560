"""The paper's recipes as they are shipped, against its tables 8, 9 and 10 (arXiv 2111.06377)."""

import pytest
from run_kit import ROOT

from mae_core import SIZES
from mae_core.optimisation.schedules import scaled_lr
from pipeline.config import load_config
from pipeline.planning.estimate import estimate_effort, estimate_memory, training_configs
from pipeline.planning.hardware import hardware_named
from pipeline.runs.workflow import build

SHAPES = {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}
FINETUNING = {"base": (100, 0.1), "large": (50, 0.1), "huge": (50, 0.2)}


@pytest.fixture(params=SHAPES)
def size(request) -> str:
    return request.param


@pytest.fixture
def config(size):
    return load_config(ROOT / f"jobs/configs/vit_{size}.yaml", ["data.source=/data/imagenet"])


def test_pretraining_is_table_8(config, size):
    encoder, recipe = config.model.encoder, config.pretrain
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.patch_size) == SHAPES[size]
    assert encoder == SIZES[size]()
    assert (config.model.decoder_embed_dim, config.model.decoder_depth, config.model.decoder_num_heads) == (512, 8, 16)
    assert (config.model.mask_ratio, config.model.masking, config.model.target) == (0.75, "random", "normalised")
    assert (recipe.betas, recipe.weight_decay, recipe.base_lr) == ((0.9, 0.95), 0.05, 1.5e-4)
    assert (recipe.global_batch, recipe.warmup_epochs, recipe.epochs) == (4096, 40, 1600)
    assert scaled_lr(recipe.base_lr, recipe.global_batch) == pytest.approx(2.4e-3)
    assert (recipe.schedule, recipe.min_lr, recipe.max_grad_norm) == ("cosine", 0.0, None)
    augment = recipe.augment
    assert (augment.kind, augment.scale, augment.flip) == ("random_resized_crop", (0.2, 1.0), True)


def test_fine_tuning_is_table_9_and_the_probe_table_10(config, size):
    tuning, probe = config.evaluation.finetune, config.evaluation.linear
    assert (tuning.epochs, tuning.drop_path) == FINETUNING[size]
    assert (tuning.betas, tuning.weight_decay, tuning.base_lr) == ((0.9, 0.999), 0.05, 1e-3)
    assert (tuning.global_batch, tuning.warmup_epochs, tuning.layer_decay) == (1024, 5, 0.75)
    assert (tuning.label_smoothing, tuning.mixup, tuning.cutmix) == (0.1, 0.8, 1.0)
    assert tuning.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (probe.base_lr, probe.batch, probe.epochs, probe.warmup_epochs, probe.pool) == (0.1, 16384, 90, 10, "cls")


def test_its_layout_fits_what_it_says_and_the_steps_are_the_paper_s(config):
    pretraining = training_configs(build(config))["pretrain"]
    assert estimate_memory(pretraining, config.resources, hardware_named("H100")).fits
    took = estimate_effort(pretraining, config.resources, hardware_named("H100"), images=1_281_167)
    assert took.steps == pytest.approx(1600 * 312, rel=0.003)  # the paper drops the last batch: 312 per epoch
