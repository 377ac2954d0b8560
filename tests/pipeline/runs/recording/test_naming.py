"""What runs are called, and what tells them apart."""

from pathlib import Path

import pytest

from mae_core.config import size_name
from pipeline.config import RunConfig, load_config
from pipeline.runs.recording.naming import (
    data_label,
    data_name,
    differences,
    differs_label,
    experiment_name,
    identity_digest,
    run_title,
)

CONFIGS = Path(__file__).parents[4] / "jobs" / "configs"


def config(*overrides: str, recipe: str = "vit_base") -> RunConfig:
    return load_config(CONFIGS / f"{recipe}.yaml", ["data.source=s3://bucket/imagenet/train", *overrides])


def plain(**sections) -> RunConfig:
    return RunConfig.model_validate({"data": {"source": "/data/cats"}, "model": {}, **sections})


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("s3://bucket/imagenet/train", "imagenet"),
        ("s3://bucket/", "bucket"),
        ("/data/plankton/images/", "plankton"),
        ("/home/me/My Cats!", "My-Cats"),
        ("/data/images", "data"),
    ],
)
def test_data_is_named_by_the_part_of_its_address_that_says_something(source, name):
    assert data_name(RunConfig.model_validate({"data": {"source": source}, "model": {}})) == name


def test_the_name_that_the_user_gave_the_same_images_wins_and_snapshots_are_told_apart():
    named = plain(evaluation={"datasets": [{"name": "far", "source": "/x"}, {"name": "felines"}]})
    assert data_name(named) == "felines"
    assert data_label(config("data.snapshot=[a,b]")) == "imagenet@a+b"
    assert experiment_name(config("data.snapshot=[a,b]")) == "mae-imagenet"
    assert experiment_name(config("tracking.experiment=mine")) == "mine"


def test_sizes_have_the_names_that_papers_use():
    assert [size_name(config(f"model.size={name}").model.encoder) for name in ("tiny", "base", "huge")] == [
        "ViT-Ti/16",
        "ViT-B/16",
        "ViT-H/14",
    ]
    assert size_name(config(recipe="digits").model.encoder) == "ViT 96x4/4"


def test_what_follows_from_another_field_is_no_difference():
    assert differs_label(plain()) == "defaults"
    assert differs_label(plain(pretrain={"epochs": 100})) == "epochs=100"  # the warm-up fits
    assert differs_label(plain(evaluation={"preset": "mae-paper"})) == "preset=mae-paper"
    few = {"encoder": {"image_size": 32, "patch_size": 16}, "mask_ratio": 0.5}  # 4 patches, of which 0.75 leave one
    assert differs_label(plain(model=few)) == "mask_ratio=0.5 image_size=32"


def test_the_title_says_data_size_and_first_what_was_changed_on_the_command_line():
    assert run_title(plain()) == "mae · cats · ViT-B/16"
    assert run_title(plain(name="cats-b")) == "cats-b · ViT-B/16"
    assert run_title(config("model.mask_ratio=0.5")).startswith(
        "vit_base mask_ratio=0.5 · imagenet · ViT-B/16 · epochs=1600"
    )
    changed = config("model.decoder_depth=4", recipe="digits")
    assert next(iter(differences(changed))) == "decoder_depth"
    assert run_title(changed).startswith("digits decoder_depth=4 · ViT 96x4/4 · target=raw epochs=100")


def test_titles_differ_even_where_there_is_no_room_for_the_difference():
    one, two = (
        plain(
            pretrain={"epochs": 9, "base_lr": 1e-3, "global_batch": 8, "betas": [0.9, b]},
            model={"mask_ratio": 0.6, "target": "raw", "masking": "block"},
        )
        for b in (0.98, 0.99)
    )
    assert run_title(one)[:-4] == run_title(two)[:-4]
    assert run_title(one) != run_title(two)


def test_only_what_changes_a_result_changes_the_identity():
    same = identity_digest(config())
    for override in (
        "name=b",
        "store=/elsewhere",
        "resources.workers=4",
        "tracking.experiment=e",
        "data.bad_share_stop=0.2",
    ):
        assert identity_digest(config(override)) == same, override
    assert identity_digest(config("evaluation.milestone_images=5")) == same
    for override in ("model.mask_ratio=0.5", "seed=1", "data.source=/other", "evaluation.seeds=2", "data.snapshot=b"):
        assert identity_digest(config(override)) != same, override


def test_the_identity_of_a_configuration_stays():
    """A run of an earlier version is found again. If this fails, stored runs get a second parent."""
    assert identity_digest(plain(seed=3, pretrain={"epochs": 9})) == "3a94969ee8bba6bf927ab822580eb1b7"
