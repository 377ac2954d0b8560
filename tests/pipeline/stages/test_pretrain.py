"""The pretraining stage as a whole: what it writes is what was trained."""

import dataclasses
import io
import json

import numpy as np
import torch
from safetensors.torch import load
from training_kit import SEED, TEST, mae_config, pretrain_here

from mae_core.mae import MaskedAutoencoder
from pipeline.config import RunConfig
from pipeline.stages.pretrain import BASIS, PANEL_IMAGES, RECONSTRUCTIONS
from pipeline.training.checkpoints.format import open_checkpoint
from pipeline.weights import CONFIG, ENCODER, MODEL, read_weights


def test_the_exported_weights_are_the_checkpoints_and_load(pretrained):
    weights = read_weights(pretrained.store, MODEL)
    with open_checkpoint(pretrained.root, pretrained.made["notes"]["checkpoint"]) as checkpoint:
        trained = checkpoint.weights()
    assert {f"model.{name}" for name in weights} == trained.keys()
    assert all(torch.equal(weights[name.removeprefix("model.")], value) for name, value in trained.items())
    model = MaskedAutoencoder(mae_config(), generator=torch.Generator().manual_seed(SEED))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    model.encoder.load_state_dict(read_weights(pretrained.store, ENCODER))
    after = model.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert not any(torch.equal(after[name], before[name]) for name in weights if name.endswith("weight"))


def test_the_facts_say_what_was_trained(pretrained, shards):
    facts = pretrained.facts
    assert facts["global_step"] == 10
    assert facts["images_seen"] == 130
    assert facts["dataset_digest"] == shards.facts["digest"]
    rows = [json.loads(line) for line in pretrained.store.read("history.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] == facts["loss"] < rows[0]["loss"]
    config = json.loads(pretrained.store.read(CONFIG))
    assert RunConfig.model_validate({"data": {"source": "x"}, "model": config}).model == mae_config()


def test_the_panel_shows_held_out_images_before_and_after(pretrained):
    images = np.load(io.BytesIO(pretrained.store.read(RECONSTRUCTIONS)))["images"]
    assert images.shape == (min(PANEL_IMAGES, TEST), 4, 16, 16, 3)
    assert images.dtype == np.uint8
    original, visible, before, after = images.transpose(1, 0, 2, 3, 4)
    shown = (original == visible).all(axis=-1).mean()
    assert 0.2 < shown < 0.5  # 4 of 16 patches, plus pixels that happen to have the mean colour
    assert (before != after).any()


def test_the_paper_s_variants_train_too(teams, shards, tmp_path):
    """Principal components as targets, blocks, mask tokens in the encoder, loss everywhere, three class tokens."""
    changes = {
        "encoder": dataclasses.replace(mae_config().encoder, cls_tokens=3, positions="learned"),
        "target": "pca",
        "pca_components": 6,
        "masking": "block",
        "encoder_input": "all",
        "loss_on": "all",
    }
    made = teams(1).run(pretrain_here, shards, tmp_path, changes)[0]
    assert made.facts["global_step"] == 10
    images = np.load(io.BytesIO(made.store.read(RECONSTRUCTIONS)))["images"].astype(np.float32)
    original, _, before, after = images.transpose(1, 0, 2, 3, 4)
    assert np.square(after - original).mean() < np.square(before - original).mean()
    basis = load(made.store.read(BASIS))
    assert basis["components"].shape == (6, 48)
    assert made.root.read(BASIS) == made.store.read(BASIS)
    weights = read_weights(made.store, MODEL)
    assert weights["decoder.head.weight"].shape == (6, 12)
    assert weights["mask_token"].shape == (1, 1, 16)
    encoder = read_weights(made.store, ENCODER)
    assert encoder["cls_token"].shape == (1, 3, 16)
    assert "positions" in encoder
    assert "mask_token" not in encoder
