"""Specifications as JSON: those of older versions can still be replayed."""

import json

import pytest

from mae_core.config import MAEConfig, ViTConfig
from pipeline.cluster.resources import Resources
from pipeline.data.dataset.address import DatasetAddress
from pipeline.data.feed.order import OrderConfig
from pipeline.errors import DataError
from pipeline.storage import FileStore
from pipeline.training.spec.recipe import Recipe
from pipeline.training.spec.spec_json import as_json, from_json
from pipeline.training.spec.tasks import MAETask
from pipeline.training.spec.train_spec import TrainSpec

WRITTEN_BY_AN_OLDER_VERSION = """
{"task": {"model": {"encoder": {"image_size": [16, 16], "patch_size": 4, "in_channels": 3, "embed_dim": 16, "depth": 2,
    "num_heads": 2, "mlp_ratio": 4.0, "layer_norm_eps": 1e-06, "cls_tokens": 1, "positions": "sine_cosine",
    "pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225]},
    "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 1, "decoder_mlp_ratio": 4.0,
    "mask_ratio": 0.75, "masking": "random", "mask_cell": 2, "target": "normalised", "pca_components": 96,
    "encoder_input": "visible", "loss_on": "hidden"}, "weight_decay": 0.05, "seed": 5, "basis": null},
 "recipe": {"global_batch": 13, "epochs": 2, "base_lr": 0.05, "warmup_epochs": 0.5, "schedule": "cosine",
    "decay_share": 0.2, "min_lr": 0.0, "weight_decay": 0.05, "betas": [0.9, 0.95], "max_grad_norm": 1.0,
    "precision": "fp32", "augment": {"kind": "random_resized_crop", "scale": [0.2, 1.0],
    "ratio": [0.75, 1.3333333333333333], "shift_pixels": 4, "crop_ratio": 0.875, "flip": true},
    "guard": {"spikes": "report", "deviations": 20.0, "window": 128, "skips_in_a_row": 3, "roll_back_steps": 100,
    "roll_backs": 3, "lost_share": 0.1}},
 "order": {"seed": 5, "lanes": 64, "window_shards": 8}, "image_size": [16, 16],
 "dataset": {"manifest_uri": "file:///store/shard-0123456789ab/g0001", "root_uri": "file:///store/shard-0123456789ab",
    "digest": "ddd"},
 "train_samples": "all", "evaluation_split": "",
 "placement": {"zero_stage": 2, "micro_batch": 4, "offload": "none", "activation_checkpointing": false,
    "checkpoint_every_steps": 3, "keep_checkpoints": 10, "keep_every_steps": null, "keep_best": 0,
    "checkpoint_copy": "memory", "log_every_steps": 1, "profile_steps": [4, 2], "decode_threads": 1,
    "cache_directory": "/cache", "cache_max_bytes": 1048576, "watchdog_s": 60.0},
 "start": null, "kinds": ["MAETask", "Recipe"]}
"""


def test_a_bundle_from_when_resources_were_called_placement_is_read(tmp_path):
    """Its `placement` has only the fields that the loop reads; a replay takes the others at their defaults."""
    encoder = ViTConfig(image_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    recipe = Recipe(global_batch=13, epochs=2, base_lr=0.05, warmup_epochs=0.5, precision="fp32", max_grad_norm=1.0)
    spec = TrainSpec(
        task=MAETask(
            model=MAEConfig(encoder=encoder, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=1),
            weight_decay=0.05,
            seed=5,
        ),
        recipe=recipe,
        order=OrderConfig(seed=5),
        image_size=(16, 16),
        dataset=DatasetAddress(
            manifest_uri="file:///store/shard-0123456789ab/g0001",
            root_uri="file:///store/shard-0123456789ab",
            digest="ddd",
        ),
        train_samples="all",
        evaluation_split="",
        resources=Resources(
            zero_stage=2,
            micro_batch=4,
            checkpoint_every_steps=3,
            keep_checkpoints=10,
            keep_best=0,
            log_every_steps=1,
            profile_steps=(4, 2),
            cache_directory="/cache",
            cache_max_bytes=2**20,
            watchdog_s=60.0,
        ),
    )
    root = FileStore(tmp_path)
    assert from_json(json.loads(WRITTEN_BY_AN_OLDER_VERSION), root) == spec
    assert from_json(json.loads(json.dumps(as_json(spec))), root) == spec  # and as it is written now


def test_resources_that_this_version_does_not_know_are_a_data_error(tmp_path):
    body = json.loads(WRITTEN_BY_AN_OLDER_VERSION)
    with pytest.raises(DataError, match="a bundle's resources are not of this version"):
        from_json(body | {"placement": body["placement"] | {"zero_stage": 4}}, FileStore(tmp_path))
